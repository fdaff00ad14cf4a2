"""Reading plain files."""

import errno
import os
import stat
from typing import BinaryIO


def opened(path: str | os.PathLike[str], pipe: bool = False) -> BinaryIO:
    """Open a plain file, or a `pipe`, for reading bytes.

    A pipe without a writer is empty, so that no call waits for ever. Raises OSError, also for a
    device, and for a pipe where none is expected.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if pipe and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
        os.set_blocking(file.fileno(), True)
    elif not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no plain file", path)
    return file
