"""Reading plain files."""

import errno
import os
import stat
from typing import IO, Any


def opened(path: str | os.PathLike[str], mode: str = "rb", **options: Any) -> IO[Any]:
    """Open a plain file as `open` does, by default for reading bytes.

    Raises OSError, also for a pipe or a device: a pipe without a writer would never end.
    """

    def open_at_once(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK, 0o666)

    file = open(path, mode, opener=open_at_once, **options)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no plain file", path)
    return file
