"""Run scripts, one after another, as several ranks on this machine, without torchrun.

    python tests/ranks.py RANKS SCRIPT FLAGS [+ SCRIPT FLAGS]...

Ranks are forked after the imports, with that of DistributedDataParallel's compiler, which take
longer than such a run. The exit status is 1 as soon as a rank of a script fails.
"""

import os
import runpy
import socket
import sys
from pathlib import Path

import torch._dynamo  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def run(ranks, command):
    """Run `command` as `ranks` forked processes; exit with status 1 if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for rank in range(ranks):
        if not os.fork():
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    if sum(os.wait()[1] for _ in range(ranks)):
        sys.exit(1)


if __name__ == "__main__":
    ranks, *words = sys.argv[1:]
    while words:
        end = words.index("+") if "+" in words else len(words)
        run(int(ranks), words[:end])
        words = words[end + 1 :]
