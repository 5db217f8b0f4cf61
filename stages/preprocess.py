"""Decode the IDX files in data/raw/ into data/train.npz, data/validation.npz and data/test.npz.

Each has the images, their labels and the names of the classes. The validation split is held out of
the training files by a seeded shuffle; the test split is the test files as they are.
"""

import json
import math
import mmap
import struct
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from stages.shared.cli import run
from stages.shared.data import Split, save_split
from stages.shared.dvc_lock import check_recorded
from stages.shared.errors import DamagedError, UserError
from stages.shared.files import map_file
from stages.shared.params import read_params

DATA = Path("data")
RAW = DATA / "raw"


class PreprocessParams(Struct, frozen=True):
    """The section `preprocess` of params.yaml."""

    validation_size: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)]


def decode_idx(data: bytes | mmap.mmap) -> NDArray[np.uint8]:
    """Decode an IDX file of unsigned bytes in any number of dimensions.

    The format is the one of the MNIST page: two zero bytes, the type (8), the number of
    dimensions, each dimension as a big-endian uint32, then the bytes in C order. Raises
    `ValueError` for any other magic number and for a length that the dimensions do not give.
    """
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"its magic number is {data[:4].hex()}, not 000008 and the dimensions")
    ndim = data[3]
    header = 4 + 4 * ndim
    if len(data) < header:
        raise ValueError(f"{len(data)} bytes are too few for its header")
    shape = struct.unpack(f">{ndim}I", data[4:header])
    if len(data) - header != math.prod(shape):
        by = " x ".join(map(str, shape))
        raise ValueError(f"it has {len(data) - header} bytes of data where {by} were announced")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_raw(folder: Path, prefix: str) -> Split:
    """Read the pair of files in `folder` that start with `prefix`, "train" or "t10k".

    class_names.json and preprocessing.json beside them come from fetch. Raises `UserError` for a
    file that is missing, damaged or does not fit the others.
    """
    path = folder
    try:
        path = folder / f"{prefix}-images-idx3-ubyte"
        images = decode_idx(map_file(path))
        path = folder / f"{prefix}-labels-idx1-ubyte"
        labels = decode_idx(map_file(path))
        path = folder / "class_names.json"
        class_names = tuple(map(str, json.loads(path.read_bytes())))
        path = folder / "preprocessing.json"
        preprocessing = str(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; get it with `dvc repro fetch`") from None
    except (TypeError, ValueError) as error:
        raise DamagedError(path, error) from None
    try:
        return Split(images, labels, class_names, preprocessing)
    except ValueError as error:
        raise UserError(f"{folder}/{prefix}-*: {error}") from None


def hold_out(count: int, size: int, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Part `count` examples into (the rest, `size` drawn by a shuffle), both in their order."""
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[size:]), np.sort(order[:size])


def main() -> None:
    params = read_params("preprocess", PreprocessParams)
    check_recorded(RAW)
    labelled, test = read_raw(RAW, "train"), read_raw(RAW, "t10k")
    if params.validation_size >= len(labelled):
        raise UserError(
            f"params.yaml: preprocess.validation_size is {params.validation_size}, must be less"
            f" than the {len(labelled)} training examples"
        )
    rest, held_out = hold_out(len(labelled), params.validation_size, params.seed)
    every = np.arange(len(test))
    parts = {"train": (labelled, rest), "validation": (labelled, held_out), "test": (test, every)}
    for name, (split, chosen) in parts.items():
        save_split(DATA / f"{name}.npz", split, chosen)
        print(f"{DATA / name}.npz: {len(chosen):,} examples")


if __name__ == "__main__":
    run(main)
