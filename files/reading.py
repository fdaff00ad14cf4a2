"""Files that are read: plain ones, and zip files of uncompressed records."""

import errno
import os
import stat
import struct
import zipfile
from typing import BinaryIO


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """A plain file, opened to be read as bytes.

    Raises OSError, also for a pipe or a device: one that nothing writes to would never end.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no plain file", path)
    return file


def records(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Where each record of a zip file begins, and its size, in bytes, by its name.

    Every byte is read and compared with the checksums. Raises zipfile.BadZipFile for a record that
    is changed, compressed, or overlaps another, and as zipfile does for what is no zip file.
    """
    places, end = {}, 0
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
        for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
            file.seek(entry.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            begin = entry.header_offset + 30 + name + extra
            stored = entry.compress_type == zipfile.ZIP_STORED
            if damaged or not stored or entry.header_offset < end or entry.filename in places:
                raise zipfile.BadZipFile(f"{damaged or entry.filename} is no whole record")
            end = begin + entry.file_size
            places[entry.filename] = (begin, entry.file_size)
    return places
