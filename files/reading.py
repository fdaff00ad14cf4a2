"""Reading plain files."""

import errno
import os
import re
import stat
from typing import IO, Any


def opened(
    path: str | os.PathLike[str], mode: str = "rb", pipe: bool = False, **options: Any
) -> IO[Any]:
    """Open a plain file, or a `pipe`, as `open` does, by default for reading bytes.

    A pipe without a writer is empty, so that no call waits for ever. Raises OSError, also for a
    device, and for a pipe where none is expected.
    """

    def open_at_once(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK, 0o666)

    file = open(path, mode, opener=open_at_once, **options)  # noqa: SIM115
    if pipe and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
        os.set_blocking(file.fileno(), True)
    elif not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no plain file", path)
    return file


def not_utf8(path: str | os.PathLike[str]) -> str:
    """What is wrong with a text that cannot be decoded as UTF-8, and what to do."""
    with opened(path, "r", encoding="utf-8-sig", errors="surrogateescape") as file:
        line = next(n for n, text in enumerate(file, start=1) if re.search("[\udc80-\udcff]", text))
    return f"line {line} of {path} is not UTF-8: convert the file to UTF-8 (iconv does it)"
