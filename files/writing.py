"""Writing files completely or not at all."""

import contextlib
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from utils import ToolkitError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], keep: bool = False) -> Iterator[IO[bytes]]:
    """A file to write that replaces `path` in one step once it is complete and on the disk.

    After a failure the old file is unchanged and no other file is left; the next call removes the
    temporary file of a killed run. With `keep`, the old file is kept as `previous(path)`. A path
    that is not a plain file, such as a terminal or a pipe, is written directly. Raises OSError.
    """
    # A link is followed to the file it names, as a plain write would do.
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with open(target, "wb") as file:
            yield file
        return
    remove_stale(target.parent)
    temporary = _temporary(target)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and target.exists():
            os.replace(target, previous(path))
        os.replace(temporary, target)
        _sync_folder(target.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


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
    lock = target.with_name(f".{target.name}.lock")
    with contextlib.ExitStack() as stack:
        same = False
        while not same:
            file = stack.enter_context(open(lock, "a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                same = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
            except FileNotFoundError:
                continue  # a run that ended just now has removed the lock file
            except BlockingIOError:
                file.seek(0)
                raise ToolkitError(
                    f"another run writes {path} now ({file.read()}): wait for its end, or pass "
                    "another --save"
                ) from None
            except OSError:
                same = True  # a file system without locks
        stack.callback(lock.unlink)
        file.truncate(0)
        print(f"process {os.getpid()} of {socket.gethostname()}", end="", file=file, flush=True)
        yield


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], flag: str) -> Iterator[IO[bytes]]:
    """As `replacing`, for a path that the user gives with `flag`; raises ToolkitError."""
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
    """This machine's name, for a file name: a process number is valid on one machine only."""
    return re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:32]


def remove_stale(folder: Path) -> None:
    """Remove temporary files of dead runs from `folder`; raises OSError if it does not exist."""
    pattern = re.compile(rf"\..+\.{_host()}-(\d+)\.tmp")
    for name in os.listdir(folder):
        match = pattern.fullmatch(name)
        if match and not _alive(int(match[1])):
            # Another run may have removed the file already; a file that stays is harmless.
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Write a rename to the disk, if the file system can do that for a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def unwritable(path: str | os.PathLike[str]) -> str | None:
    """The reason why `replacing(path)` would fail, or None if no reason is visible now."""
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
