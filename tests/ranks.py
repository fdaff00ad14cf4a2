"""Run a script as several ranks on this machine, without torchrun.

    python tests/ranks.py RANKS SCRIPT FLAGS

Ranks are forked after the imports, with that of DistributedDataParallel's compiler, which take
longer than such a run. The exit status is 1 if a rank fails.
"""

import os
import runpy
import socket
import sys

import torch._dynamo  # noqa: F401

if __name__ == "__main__":
    ranks, *command = sys.argv[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for rank in range(int(ranks)):
        if not os.fork():
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    sys.exit(any(os.wait()[1] for _ in range(int(ranks))))
