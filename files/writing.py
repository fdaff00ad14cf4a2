"""Writing files completely or not at all."""

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from utils import ToolkitError


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], keep: bool = False, own: bool = False
) -> Iterator[IO[bytes]]:
    """A file to write that replaces `path` in one step once it is complete and on the disk.

    After a failure the old file is unchanged and no other file is left. A killed process leaves
    its temporary file, which the next call for the same path uses again. With `keep`, the old file
    is kept as `previous(path)`. A link is followed to the file it names, and a path that is not a
    plain file, such as a terminal or a pipe, is written directly, except for a file of the
    toolkit's `own`, which replaces what is there. Raises OSError, also while another process writes
    the same path.
    """
    target = Path(path) if own else Path(os.path.realpath(path))
    if not own and target.exists() and not target.is_file():
        with open(target, "wb") as file:
            yield file
        return
    temporary = _beside(target, "tmp")
    with _locked(temporary) as file:
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if keep and target.exists():
                _keep(target)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _sync_folder(target.parent)


def previous(path: str | os.PathLike[str]) -> Path:
    """The path at which `replacing` keeps the old file; for a link, beside its target."""
    return Path(f"{os.path.realpath(path)}.previous")


@contextlib.contextmanager
def sole_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """A context that only one process at a time can be in for the same `path`.

    A file beside `path` is locked; the lock ends with the process, however the process ends.
    Raises ToolkitError if another process is in the context, and OSError.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        yield
        return
    lock = _beside(target, "lock")
    try:
        file = _locked(lock)
    except BlockingIOError:
        raise ToolkitError(
            f"another run writes {path} now ({lock.read_text(encoding='utf-8')}): wait for its "
            "end, or pass another --save"
        ) from None
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}".encode())
        file.flush()
        try:
            yield
        finally:
            # A lock that was removed by hand may be another run's by now.
            if _is_at(file, lock):
                lock.unlink()


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str], flag: str, keep: bool = False, own: bool = False
) -> Iterator[IO[bytes]]:
    """As `replacing`, for a path that the user gives with `flag`; raises ToolkitError."""
    try:
        with replacing(path, keep, own) as file:
            yield file
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        # torch's zip writer raises RuntimeError, and again as it closes: that hides the OSError.
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        reason = unwritable(path) or getattr(cause, "strerror", None) or str(error).split("\n")[0]
        raise ToolkitError(
            f"cannot write {path} ({reason}): the old file, if any, is unchanged; free disk space "
            f"or pass another {flag}"
        ) from error


def check_writable(path: str | os.PathLike[str], flag: str, *inputs: str) -> None:
    """Raise ToolkitError if `writing(path, flag)` would fail, or replace one of the `inputs`.

    An existing file is not changed.
    """
    overwritten = os.path.realpath(path) in map(os.path.realpath, inputs)
    problem = "it is an input" if overwritten else unwritable(path)
    if problem:
        raise ToolkitError(f"cannot write {path} ({problem}): pass another {flag}")


def unwritable(path: str | os.PathLike[str]) -> str | None:
    """The reason why `replacing(path)` would fail, or None if no reason is visible now."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        return "it is a folder"
    if target.exists() and not os.access(target, os.W_OK):
        return "it is write-protected"
    if target.exists() and not target.is_file():
        return None
    if not target.parent.is_dir():
        return f"there is no folder {target.parent}"
    if len(os.fsencode(_beside(target, "lock").name)) > 255:
        return "its name is too long"
    return None if os.access(target.parent, os.W_OK) else "its folder cannot be written"


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def _locked(path: Path) -> IO[bytes]:
    """Open `path`, a file of the toolkit's own, for writing as the only process that does.

    A link there is replaced. Raises BlockingIOError if another process has it open so, and OSError.
    """
    while True:
        if path.is_symlink():
            path.unlink(missing_ok=True)
        file = open(path, "wb", opener=_without_truncating)  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError:
            return file  # a file system without locks
        if _is_at(file, path):
            return file
        file.close()  # the process that had it has just renamed or removed it


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _without_truncating(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_TRUNC | os.O_NONBLOCK, 0o666)


def _keep(target: Path) -> None:
    """Keep the file as `previous(target)` too, so that at every moment there is one at `target`."""
    kept = previous(target)
    kept.unlink(missing_ok=True)
    try:
        os.link(target, kept)
    except OSError:
        shutil.copyfile(target, kept)  # a file system without hard links


def _sync_folder(folder: Path) -> None:
    """Write a rename to the disk, if the file system can do that for a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
