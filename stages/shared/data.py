"""Labelled images: the form in which every data set reaches training and evaluation."""

import io
import math
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.shared.dvc_lock import check_recorded
from stages.shared.errors import UserError, escape
from stages.shared.files import atomic_write
from stages.shared.mapped_npz import map_npz

WRITE_BYTES = 4 << 20  # of images, copied into memory at a time by `save_split`
GROUP_BYTES = 64 << 20  # of images, shuffled as one group; all of MNIST is less
BLOCK_BYTES = 256 << 10  # of neighbouring images, read from disk together into a group
MAX_SAMPLE = 100  # images that `check_contrast` looks at, up to twice as many
MAX_BLANK = 0.9  # fraction of these images that may have a single value


def check_class_names(names: tuple[str, ...]) -> None:
    """Raise `ValueError` unless there are 1 to 256 different names that can be printed anywhere.

    DVC copies them into the HTML of its plots without escaping them, so "<" is not allowed.
    """
    if not 0 < len(names) == len(set(names)) <= 256:
        raise ValueError(f"there are {len(names)} class names, must be 1 to 256 different ones")
    for name in names:
        if not (name.isprintable() and name.strip()) or "<" in name:
            problem = "is empty, or has a control character, '<' or invalid Unicode"
            raise ValueError(f"the class name '{escape(name):.60}' {problem}; rename the class")


def images_remedy(images: NDArray[Any]) -> str:
    """Return the way to convert images of another dtype or shape."""
    if images.ndim not in (3, 4) or 0 in images.shape[1:]:
        return "reshape them with .reshape(-1, rows, columns)"
    if images.dtype.kind == "f":
        return "scale them to 0 to 255, then convert them with .astype(np.uint8)"
    return "if they are 0 to 255, convert them with .astype(np.uint8)"


def labels_remedy(labels: NDArray[Any]) -> str:
    """Return the way to convert labels of another dtype or shape."""
    if labels.dtype.kind in "US":
        return "get them with class_names, labels = np.unique(labels, return_inverse=True)"
    if labels.ndim == 2:
        return f"use labels{'.ravel()' if labels.shape[1] == 1 else '.argmax(axis=1)'}"
    return "convert them with .astype(np.uint8), one per image"


@dataclass(frozen=True)
class Split:
    """N labelled images: the examples for training, validation or test.

    `images` are uint8 (N, rows, columns) or (N, rows, columns, channels). `labels` are uint8 (N,),
    indices into `class_names`. `preprocessing` is the way to make such an image from a picture:
    "mnist" crops and centres it as pictures.py does, "" only resizes it. Raises `ValueError`
    for other dtypes, shapes, labels or names.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    class_names: tuple[str, ...]
    preprocessing: str = ""

    def __post_init__(self) -> None:
        images, labels, names = self.images, self.labels, self.class_names
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape[1:]:
            form = "uint8 (N, rows, columns) or (N, rows, columns, channels)"
            problem = f"images are {images.dtype} {images.shape}, must be {form}"
            raise ValueError(f"{problem}; {images_remedy(images)}")
        if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
            form = f"uint8 ({len(images)},) as there are {len(images)} images"
            problem = f"labels are {labels.dtype} {labels.shape}, must be {form}"
            raise ValueError(f"{problem}; {labels_remedy(labels)}")
        check_class_names(names)
        if len(labels) and labels.max() >= len(names):
            remedy = "; subtract 1 if the labels start from 1" if labels.min() else ""
            problem = f"a label is {labels.max()}, but there are {len(names)} class names"
            raise ValueError(f"{problem}, whose labels are 0 to {len(names) - 1}{remedy}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Any) -> "Split":
        """Return the examples at `indices`, which is a slice, an array or a list."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(rows, columns) or (rows, columns, channels)."""
        return self.images.shape[1:]


def shuffled_indices(split: Split, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return the indices of all examples in random order, int64 (N,).

    Images of more than GROUP_BYTES are shuffled in two steps: blocks of neighbouring images are put
    in random order, then the images in each group of blocks. The disk is read by the block, and
    only one group has to fit into memory.
    """
    image_bytes = math.prod(split.image_shape)
    group_size = max(1, GROUP_BYTES // image_bytes)
    block_size = max(1, BLOCK_BYTES // image_bytes)
    if len(split) <= group_size:
        return rng.permutation(len(split))
    block_starts = rng.permutation(range(0, len(split), block_size))
    indices = (block_starts[:, None] + np.arange(block_size)).ravel()
    indices = indices[indices < len(split)]  # the last block can be shorter
    for start in range(0, len(indices), group_size):
        rng.shuffle(indices[start : start + group_size])
    return indices


def save_split(path: Path, split: Split, indices: NDArray[np.intp] | None = None) -> None:
    """Write `split`, or its examples at `indices`, as an uncompressed .npz file.

    Only WRITE_BYTES of images are in memory at a time. Equal examples give equal bytes.
    """
    if indices is None:
        indices = np.arange(len(split))
    small_arrays = {
        # First, because damage to the ZIP directory can hide the last array, and this is optional.
        "preprocessing": np.array(split.preprocessing),
        "labels": split.labels[indices],
        "class_names": np.array(split.class_names),
    }
    images_per_write = max(1, WRITE_BYTES // math.prod(split.image_shape))
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in small_arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue())
        header = io.BytesIO()
        shape = (len(indices), *split.image_shape)
        form = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, form)
        # With the size known, all versions of Python write the same ZIP headers.
        info = zipfile.ZipInfo("images.npy")
        info.file_size = len(header.getvalue()) + math.prod(shape)
        with archive.open(info, "w") as member:
            member.write(header.getvalue())
            for start in range(0, len(indices), images_per_write):
                member.write(split.images[indices[start : start + images_per_write]].tobytes())


def load_split(path: Path, *, may_be_empty: bool = False, random_access: bool = False) -> Split:
    """Map the split in the .npz file at `path`, written by `save_split` or by `np.savez`.

    The images stay on disk until they are used. `random_access` speeds up reading them in random
    order if they do not fit into memory. Raises `UserError` if the file is missing, damaged, not a
    split or, unless it `may_be_empty`, without examples.
    """
    check_recorded(path)
    arrays = map_npz(path, random_access=random_access)
    if missing := {"images", "labels", "class_names"}.difference(arrays):
        raise UserError(f"{path}: has no {min(missing)}.npy; add this array")
    try:
        class_names = tuple(map(str, arrays["class_names"].ravel()))
        preprocessing = str(arrays.get("preprocessing", np.array("")).item())
        split = Split(arrays["images"], arrays["labels"], class_names, preprocessing)
    except (SystemError, ValueError) as error:  # SystemError: a name is not valid Unicode
        raise UserError(f"{path}: {error}") from None
    if not (len(split) or may_be_empty):
        raise UserError(f"{path}: has no examples; it needs some")
    check_contrast(path, split)
    return split


def check_contrast(path: Path, split: Split) -> None:
    """Raise `UserError` if nearly every image has a single value, or if no value is above 1.

    A sample of the images is checked.
    """
    sample = split.images[:: max(1, len(split) // MAX_SAMPLE)]
    blank = [image.min() == image.max() for image in sample]
    problem = None
    if math.prod(split.image_shape) > 1 and sum(blank) > MAX_BLANK * len(blank):
        problem = f"{sum(blank)} of {len(blank)} images have a single value"
    elif len(sample) and sample.max() <= 1:
        problem = f"no value of {len(blank)} images is above 1"
    if problem:
        remedy = "multiply values from 0 to 1 by 255 before .astype(np.uint8)"
        raise UserError(f"{path}: {problem}; {remedy}, and read pictures of 16 bits as such")
