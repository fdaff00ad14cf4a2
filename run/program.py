"""How a script starts and ends: its error message and exit status."""

import contextlib
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from run.device import keep_memory
from run.signals import Output, Stopped
from utils import ToolkitError


def run(main: Callable[[], None]) -> NoReturn:
    """Call a script's `main` and end the process.

    A ToolkitError becomes one line on stderr and exit status 1; a signal that was obeyed becomes
    one line and 128 + its number. If the reader of the output has ended, as `head` does, there is
    no line.
    """
    # Log lines reach a file or a pipe at once, and a word or a file name that the terminal cannot
    # show does not end the run.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    keep_memory()
    start_optimizers_sooner()
    try:
        output = Output(sys.stdout)
        with contextlib.redirect_stdout(output):
            main()
        if output.failure:
            raise ToolkitError(output.failure)
    except ToolkitError as error:
        _leave(1, f"error: {error}")
    except BrokenPipeError:
        _leave(128 + signal.SIGPIPE)
    except OSError as error:
        if error.filename is None:
            raise
        _leave(
            1,
            f"error: cannot use {error.filename} ({error.strerror}): name another path, or remove "
            "the cause",
        )
    except Stopped as stopped:
        _leave(128 + stopped.signum, f"{stopped}")
    except KeyboardInterrupt:
        _leave(130)
    _leave(0)


def start_optimizers_sooner() -> None:
    """Call four methods of optimisers directly: PyTorch's wrappers import its compiler (2 s)."""
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        # The wrapper keeps the method to call here once the compiler has made it.
        method.__dict__.setdefault("__dynamo_disable", method)


def _leave(status: int, sentence: str = "") -> NoReturn:
    """Print the sentence to stderr and end this process, even if it trains with others.

    PyTorch's communication threads do not always end with the interpreter: they sometimes abort the
    process, and may wait for a dead rank.
    """
    # The terminal may be gone; the exit status still reports the error.
    with contextlib.suppress(OSError):
        if sentence:
            sys.stderr.write(f"{Path(sys.argv[0]).name}: {sentence}\n")
        if dist.is_available() and dist.is_initialized():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(status)


@contextlib.contextmanager
def out_of_memory(cure: str) -> Iterator[None]:
    """Turn an out-of-memory error, of a GPU or the CPU, into a ToolkitError that names the `cure`.

    This context manager is also a decorator.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # PyTorch's CPU allocator raises plain RuntimeErrors.
        cpu = re.search("not enough memory|can't allocate memory|size .*overflow", str(error))
        if not cpu and not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            raise
        where = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "memory"
        raise ToolkitError(
            f"{where} is too small for this: lower {cure}, or use a smaller model"
        ) from error
