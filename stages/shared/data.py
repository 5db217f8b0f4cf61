"""A split of the data, the one form in which any data set reaches the training."""

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.shared.errors import DamagedError, UserError
from stages.shared.files import atomic_write, verify

NAMES = ("images", "labels", "class_names")  # of the arrays in a file


@dataclass(frozen=True)
class Split:
    """N examples: an image, its label, and what the labels mean.

    `images` are uint8 (N, rows, columns) or (N, rows, columns, channels), `labels` uint8 (N,), each
    the place of a name in `class_names`. Raises `ValueError` for anything else.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    class_names: tuple[str, ...]

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
        return Split(self.images[chosen], self.labels[chosen], self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(rows, columns) or (rows, columns, channels)."""
        return self.images.shape[1:]


def save_split(path: Path, split: Split) -> None:
    """Write `split` to `path` as an uncompressed .npz: the same split gives the same bytes."""
    with atomic_write(path) as file:
        names = np.array(split.class_names)
        np.savez(file, images=split.images, labels=split.labels, class_names=names)


def load_split(path: Path, *, may_be_empty: bool = False) -> Split:
    """Read a split from the .npz at `path`, written by `save_split` or by `np.savez`.

    Raises `UserError` for a file that is missing, damaged or holds anything else.
    """
    verify(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if missing := {f"{name}.npy" for name in NAMES}.difference(archive.namelist()):
                raise UserError(f"{path}: has no {min(missing)}; it must hold {', '.join(NAMES)}")
            if any(member.compress_type for member in archive.infolist()):
                # A little file could become a huge one.
                raise UserError(f"{path}: is compressed; write it with np.savez")
            images, labels, class_names = (_read_array(archive, name) for name in NAMES)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; make it with `dvc repro`") from None
    except (UserError, PermissionError):
        raise
    except Exception as error:  # zipfile and NumPy know a dozen kinds for damaged bytes
        raise DamagedError(path, error) from None
    try:
        split = Split(images, labels, tuple(map(str, class_names.ravel())))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not (len(split) or may_be_empty):
        raise UserError(f"{path}: has no examples; it needs some")
    return split


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """As `np.load` does, but without its words on pickles and with no more memory than bytes."""
    with archive.open(f"{name}.npy") as member:
        np.lib.format.read_magic(member)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(member)
        data = member.read()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{name}: {len(data)} bytes are not an array of {dtype} {shape}")
    flat = np.frombuffer(data, dtype)
    return np.ascontiguousarray(flat.reshape(shape, order="F" if by_columns else "C"))
