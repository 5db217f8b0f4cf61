"""Decode the IDX files in data/raw/ into data/train.npz, data/validation.npz and data/test.npz.

Each has `images` (uint8, N x 784) and `labels` (uint8, N). The validation split is held out of
the training files by a seeded shuffle; the test split is the test files as they are.
"""

import math
import struct
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from stages.datasets import DATASETS, Dataset, FetchParams
from stages.errors import UserError, run
from stages.files import DamagedError, Split, save_split
from stages.params import Range, read_params

DATA = Path("data")


@dataclass(frozen=True)
class PreprocessParams:
    """The section `preprocess` of params.yaml."""

    validation_size: Annotated[int, Range(0, 59_999)]
    seed: Annotated[int, Range(0, 2**32 - 1)]


def decode_idx(data: bytes, ndim: int) -> NDArray[np.uint8]:
    """Decode an IDX file of unsigned bytes in `ndim` dimensions.

    The format is the one of the MNIST page: two zero bytes, the type (8), the number of
    dimensions, each dimension as a big-endian uint32, then the bytes in C order. Raises
    `ValueError` for any other magic number and for a length that the dimensions do not give.
    """
    header = 4 + 4 * ndim
    if data[:4] != bytes((0, 0, 8, ndim)):
        raise ValueError(f"its magic number is {data[:4].hex()}, not 000008{ndim:02x}")
    if len(data) < header:
        raise ValueError(f"{len(data)} bytes are too few for its header")
    shape = struct.unpack(f">{ndim}I", data[4:header])
    if len(data) - header != math.prod(shape):
        by = " x ".join(map(str, shape))
        raise ValueError(f"it has {len(data) - header} bytes of data where {by} were announced")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def decode_split(images: bytes, labels: bytes, num_classes: int) -> Split:
    """Decode a pair of IDX files: images (N, rows, columns) and labels (N,) below `num_classes`.

    Raises `ValueError` for damaged files and for pairs that do not fit.
    """
    stack = decode_idx(images, ndim=3)
    flat = stack.reshape(len(stack), math.prod(stack.shape[1:]))
    split = Split(flat, decode_idx(labels, ndim=1))
    if len(split.images) != len(split.labels):
        raise ValueError(f"{len(split.images)} images have {len(split.labels)} labels")
    if len(split) == 0:
        raise ValueError("there are no examples")
    if split.labels.max() >= num_classes:
        raise ValueError(f"a label is {split.labels.max()}, there are {num_classes} classes")
    return split


def read_raw(folder: Path, prefix: str, dataset: Dataset) -> Split:
    """Read the pair of files in `folder` that start with `prefix`, "train" or "t10k".

    Raises `UserError` for a file that is missing or not the data set's own.
    """
    images = _read_verified(folder / f"{prefix}-images-idx3-ubyte", dataset)
    labels = _read_verified(folder / f"{prefix}-labels-idx1-ubyte", dataset)
    try:
        return decode_split(images, labels, len(dataset.class_names))
    except ValueError as error:
        raise UserError(f"{folder}/{prefix}-*: {error}; see stages/datasets.py") from None


def _read_verified(path: Path, dataset: Dataset) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: not found; get it with `dvc repro fetch`") from None
    if sha256(data).hexdigest() != dataset.digests[path.name]:
        raise DamagedError(path, "other bytes than those of the data set")
    return data


def hold_out(split: Split, size: int, seed: int) -> tuple[Split, Split]:
    """Part `split` into (rest, `size` examples drawn by a shuffle), both in their old order."""
    order = np.random.default_rng(seed).permutation(len(split))
    rest, held_out = np.sort(order[size:]), np.sort(order[:size])
    return (
        Split(split.images[rest], split.labels[rest]),
        Split(split.images[held_out], split.labels[held_out]),
    )


def main() -> None:
    dataset = DATASETS[read_params("fetch", FetchParams).dataset]
    params = read_params("preprocess", PreprocessParams)
    labelled = read_raw(DATA / "raw", "train", dataset)
    if params.validation_size >= len(labelled):
        raise UserError(
            f"params.yaml: preprocess.validation_size is {params.validation_size}, must be less"
            f" than the {len(labelled)} training examples"
        )
    train, validation = hold_out(labelled, params.validation_size, params.seed)
    test = read_raw(DATA / "raw", "t10k", dataset)
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        save_split(DATA / f"{name}.npz", split)
        print(f"{DATA / name}.npz: {len(split):,} examples")


if __name__ == "__main__":
    run(main)
