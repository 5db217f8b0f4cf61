"""Read the arrays of an .npz file by memory map, which `np.load` cannot do."""

import mmap
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.shared.errors import UserError
from stages.shared.files import map_file, reading


def map_npz(path: Path, *, random_access: bool = False) -> dict[str, NDArray[Any]]:
    """Map the arrays of an .npz file written by `np.savez`. Return them by name.

    They are read-only and stay on disk until they are used, so they can be larger than memory.
    Only an array in Fortran order is copied. Every checksum is verified; nothing is unpickled.
    `random_access` turns off the read-ahead of the operating system.

    Raises `UserError` if the file is missing, compressed, damaged or holds Python objects.
    """
    arrays = {}
    with reading(path), zipfile.ZipFile(path) as archive:
        file = map_file(path)
        # Every array, also an unknown one: its name could be damaged.
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{path}: is compressed; write it with np.savez")
            arrays[member.filename.removesuffix(".npy")] = _map_array(archive, member, file)
    if random_access:  # from now on; the checksums were computed in order
        file.madvise(mmap.MADV_RANDOM)
    return arrays


def _map_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: mmap.mmap) -> NDArray[Any]:
    """Return the array of an uncompressed `member` as a view of `file`, which is the archive."""
    # The data begin with this prefix. If a header contains it too, the checksum differs.
    start = file.find(np.lib.format.MAGIC_PREFIX, member.header_offset)
    npy = memoryview(file)[start : start + member.file_size]
    checksum = zlib.crc32(npy)
    if checksum != member.CRC:
        raise ValueError(f"{member.filename}: CRC is {checksum:08x}, must be {member.CRC:08x}")
    with archive.open(member) as stream:  # also compares the two names that a member has
        np.lib.format.read_magic(stream)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        data = npy[stream.tell() :]
    if dtype.hasobject:
        remedy = "give all images one shape, and convert text with .astype(str)"
        raise UserError(f"{archive.filename}: {member.filename} has dtype object; {remedy}")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
    return np.ascontiguousarray(array)
