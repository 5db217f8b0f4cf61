"""A split of the data, the one form in which any data set reaches the training."""

import math
import mmap
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.shared.dvc_lock import check_recorded
from stages.shared.errors import DamagedError, UserError
from stages.shared.files import atomic_write, map_file

NAMES = ("images", "labels", "class_names")  # of the arrays in a file; preprocessing may be there
PART = 1 << 22  # bytes of images in memory at a time
GROUP = 1 << 26  # bytes of images that are shuffled together, more than MNIST has
BLOCK = GROUP >> 8  # of those that stay together before that


@dataclass(frozen=True)
class Split:
    """N examples: an image, its label, and what the labels mean.

    `images` are uint8 (N, rows, columns) or (N, rows, columns, channels), `labels` uint8 (N,), each
    the place of a name in `class_names`. `preprocessing` says how a picture becomes such an image:
    "mnist" as tools/predict.py does it, "" by scaling alone. Raises `ValueError` for anything else.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    class_names: tuple[str, ...]
    preprocessing: str = ""

    def __post_init__(self) -> None:
        images, labels, names = self.images, self.labels, self.class_names
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape[1:]:
            raise ValueError(
                f"images are {images.dtype} {images.shape}, must be uint8 (N, rows, columns) or"
                " (N, rows, columns, channels)"
            )
        if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels are {labels.dtype} {labels.shape}, must be uint8 ({len(images)},) as"
                f" there are {len(images)} images"
            )
        if not 0 < len(names) == len(set(names)) <= 256:
            raise ValueError(f"there are {len(names)} class names, must be 1 to 256 different ones")
        if len(labels) and labels.max() >= len(names):
            raise ValueError(f"a label is {labels.max()}, but there are {len(names)} class names")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Any) -> "Split":
        """The examples that an index of NumPy's chooses."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(rows, columns) or (rows, columns, channels)."""
        return self.images.shape[1:]


def shuffled_indices(split: Split, random: np.random.Generator) -> NDArray[np.intp]:
    """The places of all examples in random order, int64 (N,).

    Above GROUP bytes, random blocks of neighbours make a group, which is shuffled. So the disk is
    read a block at a time, and it is enough if a group fits into memory.
    """
    size = math.prod(split.image_shape)
    group = max(1, GROUP // size)
    block = len(split) if len(split) <= group else max(1, BLOCK // size)
    starts = random.permutation(range(0, len(split), block))
    order = (starts[:, None] + np.arange(block)).ravel()
    order = order[order < len(split)]  # the last block may be shorter
    for start in range(0, len(order), group):
        random.shuffle(order[start : start + group])
    return order


def save_split(path: Path, split: Split, chosen: NDArray[np.intp] | None = None) -> None:
    """Write `split`, or the examples `chosen` of it, as `np.savez` does, a part at a time.

    The same examples give the same bytes.
    """
    if chosen is None:
        chosen = np.arange(len(split))
    rows = max(1, PART // math.prod(split.image_shape))
    shape = (len(chosen), *split.image_shape)
    others = {
        "preprocessing": np.array(split.preprocessing),  # first, for damage could hide the last one
        "labels": split.labels[chosen],
        "class_names": np.array(split.class_names),
    }
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in others.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array)
        with archive.open("images.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for start in range(0, len(chosen), rows):
                member.write(split.images[chosen[start : start + rows]].tobytes())


def load_split(path: Path, *, may_be_empty: bool = False, in_random_order: bool = False) -> Split:
    """Map a split from the .npz at `path`, written by `save_split` or by `np.savez`.

    Its images stay on the disk until they are used, so it may be larger than the memory. Where that
    is short, `in_random_order` keeps the system from reading what is next. Raises `UserError` for a
    file that is missing, damaged or holds anything else.
    """
    check_recorded(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if missing := {f"{name}.npy" for name in NAMES}.difference(archive.namelist()):
                raise UserError(f"{path}: has no {min(missing)}; it must hold {', '.join(NAMES)}")
            if any(member.compress_type for member in archive.infolist()):  # it cannot be mapped
                raise UserError(f"{path}: is compressed; write it with np.savez")
            pages = map_file(path)
            file = memoryview(pages)
            # All, for the name of one that may be missing could be damaged.
            arrays = {name: _map_array(archive, file, name) for name in archive.namelist()}
            if in_random_order:
                pages.madvise(mmap.MADV_RANDOM)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; make it with `dvc repro`") from None
    except (UserError, PermissionError):
        raise
    except Exception as error:  # zipfile and NumPy know a dozen kinds for damaged bytes
        raise DamagedError(path, error) from None
    try:
        images, labels, class_names = (arrays[f"{name}.npy"] for name in NAMES)
        form = "".join(map(str, arrays.get("preprocessing.npy", np.array("")).ravel()))
        split = Split(images, labels, tuple(map(str, class_names.ravel())), form)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not (len(split) or may_be_empty):
        raise UserError(f"{path}: has no examples; it needs some")
    return split


def _map_array(archive: zipfile.ZipFile, file: memoryview, name: str) -> NDArray[Any]:
    """The array in a member of `archive`, which is stored in `file` as the .npy that it is."""
    member = archive.getinfo(name)
    lengths = struct.unpack_from("<2H", file, member.header_offset + 26)  # of name and extra field
    start = member.header_offset + 30 + sum(lengths)
    npy = file[start : start + member.file_size]
    if zlib.crc32(npy) != member.CRC:
        raise ValueError(f"{name}: its checksum is not the one it names")
    with archive.open(member) as stream:
        np.lib.format.read_magic(stream)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
        data = npy[stream.tell() :]
    # Nothing of no size, of which any number would fit.
    if dtype.hasobject or not dtype.itemsize or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{name}: {len(data)} bytes are not an array of {dtype} {shape}")
    return np.ascontiguousarray(np.ndarray(shape, dtype, data, order="F" if by_columns else "C"))
