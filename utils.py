"""Small things every stage needs: batches, hidden state, seeds, device, log lines."""

import contextlib
import ctypes
import json
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class ToolkitError(Exception):
    """A problem the user can mend; its text is one sentence: what is wrong and what to do."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` at once, when it is whole and on the disk.

    If anything fails, the old file stays as it was and no other is left behind; what a killed run
    left behind goes with the next call. What is not a plain file, a terminal or a pipe, is written
    directly. Raises OSError.
    """
    # Through a link to the file it names, which is what a plain write would do.
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with open(target, "wb") as file:
            yield file
        return
    _remove_stale(target)
    temporary = _temporary(target)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], flag: str) -> Iterator[IO[bytes]]:
    """As `replacing`, for a result whose place the user names with `flag`: raises ToolkitError."""
    try:
        with replacing(path) as file:
            yield file
    except OSError as error:
        raise ToolkitError(
            f"cannot write {path} ({os.strerror(error.errno)}): pass another {flag}"
        ) from error


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{_host()}-{os.getpid()}.tmp")


def _host() -> str:
    """This machine's name for a file name: process numbers mean something on one machine only."""
    return re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:32]


def _remove_stale(target: Path) -> None:
    """Remove what runs that are dead by now left half written beside `target`."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{_host()}-(\d+)\.tmp")
    for name in os.listdir(target.parent):
        match = pattern.fullmatch(name)
        if match and not _alive(int(match[1])):
            # Another run may have been faster; what cannot be removed is no reason to stop.
            with contextlib.suppress(OSError):
                (target.parent / name).unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Put a rename on the disk, where the file system can do that for a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def unwritable(path: str | os.PathLike[str]) -> str | None:
    """Why `replacing(path)` would fail, as far as can be told now; None if nothing is wrong."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        return "it is a folder"
    if target.exists():
        if not os.access(target, os.W_OK):
            return "it is write-protected"
        if not target.is_file():
            return None
    if not target.parent.is_dir():
        return f"there is no folder {target.parent}"
    if len(os.fsencode(_temporary(target).name)) > 255:
        return "its name is too long"
    return None if os.access(target.parent, os.W_OK) else "its folder cannot be written"


def batchify(data: Tensor, bsz: int) -> Tensor:
    """Lay a stream of ids (n,) out in `bsz` columns: (n // bsz, bsz).

    Time runs down, each column is a stream of its own, and the tail that does not fill `bsz` equal
    columns is dropped::

        a b c d e f g  in 3 columns:  a c e
                                      b d f
    """
    rows = data.size(0) // bsz
    return data[: rows * bsz].view(bsz, rows).t().contiguous()


def get_batch(source: Tensor, i: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Inputs (n, bsz) from row `i` of `source` (rows, bsz) and the words that follow (n * bsz,).

    `n = min(seq_len, rows - 1 - i)`. Both are int64, whatever the ids are stored as.
    """
    n = min(seq_len, source.size(0) - 1 - i)
    window = source[i : i + n + 1].long()
    return window[:-1], window[1:].flatten()


def check_length(source: Tensor, name: str, cure: str) -> None:
    """Raise ToolkitError if `source` (rows, bsz) is too short to train on or to evaluate."""
    if source.size(0) < 3:
        raise ToolkitError(
            f"{name} is too short for {source.size(1)} columns of 3 or more tokens each: {cure}"
        )


def check_valid_loss(loss: float, epoch: int, lr: float) -> None:
    """Raise ToolkitError if the validation loss, in nats, is no number any more."""
    if not math.isfinite(loss):
        raise ToolkitError(
            f"the validation loss became {loss} in epoch {epoch} at the rate {lr:g}: lower --lr or "
            "set --clip; the saved model is the last good one"
        )


def repackage_hidden(hidden: Any) -> Any:
    """The same state cut off from the history that made it."""
    if isinstance(hidden, Tensor):
        return hidden.detach()
    return type(hidden)(repackage_hidden(part) for part in hidden)


def seed_everything(seed: int) -> np.random.RandomState:
    """Seed PyTorch on every device; the generator returned draws the sequence lengths.

    It is numpy's older generator, so that a seed gives the lengths it gave in the original.
    """
    torch.manual_seed(seed)
    return np.random.RandomState(seed)


def rng_state(rng: np.random.RandomState) -> str:
    """The state of a generator of sequence lengths as text."""
    name, key, *rest = rng.get_state()
    return json.dumps([name, key.tolist(), *rest])


def set_rng_state(rng: np.random.RandomState, state: str) -> None:
    """Go on from what `rng_state` returned."""
    name, key, *rest = json.loads(state)
    rng.set_state((name, np.array(key, dtype=np.uint32), *rest))


def make_deterministic() -> None:
    """Make CUDA give the same bits for the same work, at some cost in speed; for this process.

    To be called before CUDA is first used: cuBLAS reads its setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


@contextlib.contextmanager
def out_of_memory(cure: str) -> Iterator[None]:
    """Turn running out of memory, on a GPU or the CPU, into a ToolkitError that names the `cure`.

    A context, and so also a decorator.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # PyTorch's allocator for the CPU has no kind of error of its own.
        cpu = re.search("not enough memory|can't allocate memory", str(error))
        if not cpu and not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            raise
        where = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "memory"
        raise ToolkitError(
            f"{where} is too small for this: lower {cure}, or use a smaller model"
        ) from error


def select_device(cuda: bool | None) -> torch.device:
    """The device to run on: CUDA when there is one, unless `cuda` is False.

    Raises ToolkitError if `cuda` is True and there is none.
    """
    if cuda is False:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if cuda:
        raise ToolkitError(
            "--cuda was given but PyTorch finds no CUDA device: leave it out to run on the CPU"
        )
    return torch.device("cpu")


def set_precision(precision: str | None, device: torch.device) -> str:
    """Set what float32 matrix products are made in, and return the precision in use.

    `precision` is fp32, tf32, bf16 or None: tf32 on CUDA, fp32 elsewhere. With bf16 those that
    autocast leaves alone are as with tf32 on CUDA. Raises ToolkitError for tf32 without CUDA.
    """
    cuda = device.type == "cuda"
    if precision is None:
        precision = "tf32" if cuda else "fp32"
    if precision == "tf32" and not cuda:
        raise ToolkitError(
            "--precision tf32 is a format of GPUs: leave it out on the CPU, or take fp32 or bf16"
        )
    if cuda:
        # PyTorch's own default is tf32 for cuDNN's recurrent layers only.
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return precision


def score_as_trained(recorded: Mapping[str, Any], device: torch.device) -> None:
    """Set float32 matrix products to the precision that evaluation in training had.

    `recorded` are the flags in the model file. On the CPU there is only one.
    """
    if device.type == "cuda":
        set_precision(recorded.get("precision"), device)


def keep_memory() -> None:
    """Have glibc keep freed memory for the next allocation instead of giving it back.

    Every step allocates the same large tensors; by default each gets fresh pages from the system,
    whose first use costs more than many of the operations on them. Elsewhere than on glibc, nothing
    happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def perplexity(loss: float) -> float:
    """`exp(loss)` for a loss in nats a token, infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits(loss: float) -> float:
    """A loss in nats a token as bits a token: bits per character on a character corpus."""
    return loss / math.log(2)


def batch_line(epoch: int, batch: int, batches: int, lr: float, ms: float, loss: float) -> str:
    """The classic log line within an epoch; `ms` is milliseconds a batch, `loss` nats a token."""
    return (
        f"| epoch {epoch:3d} | {batch:5d}/{batches:5d} batches | lr {lr:05.5f} | "
        f"ms/batch {ms:5.2f} | loss {loss:5.2f} | ppl {perplexity(loss):8.2f} | "
        f"bpc {bits(loss):8.3f}"
    )


def epoch_line(epoch: int, seconds: float, loss: float) -> str:
    """The classic log line at the end of an epoch; `loss` is the validation loss."""
    return (
        f"| end of epoch {epoch:3d} | time: {seconds:5.2f}s | valid loss {loss:5.2f} | "
        f"valid ppl {perplexity(loss):8.2f} | valid bpc {bits(loss):8.3f}"
    )


def end_line(loss: float) -> str:
    """The classic last line of training; `loss` is the test loss."""
    return (
        f"| End of training | test loss {loss:5.2f} | test ppl {perplexity(loss):8.2f} | "
        f"test bpc {bits(loss):8.3f}"
    )


def pointer_line(part: str, loss: float) -> str:
    """The classic last line of pointer.py for a `part`, val or test."""
    return f"| End of pointer | {part} loss {loss:5.2f} | {part} ppl {perplexity(loss):8.2f}"
