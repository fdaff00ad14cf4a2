"""Reading plain files, and zip files of uncompressed records."""

import errno
import os
import stat
import struct
import zipfile
from typing import BinaryIO


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a plain file for reading bytes.

    Raises OSError, also for a pipe or a device: a pipe without a writer would never end.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no plain file", path)
    return file


def records(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """The first byte and the size in bytes of each record of a zip file, by name.

    The bytes are checked against the checksums. Raises zipfile.BadZipFile for a record that is
    changed, compressed, or overlaps another, and zipfile's errors for a file that is not a zip.
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
