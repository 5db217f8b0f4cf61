"""Decode the IDX files in data/raw/ into data/train.npz, data/validation.npz and data/test.npz.

Each split contains images, their labels and the class names. The validation split is a random part
of the training files, drawn with a seed. The test split is the test files as they are.
"""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct
from msgspec.json import Decoder
from numpy.typing import NDArray

from stages.shared.cli import run
from stages.shared.data import Split, save_split
from stages.shared.dvc_lock import check_recorded
from stages.shared.errors import UserError
from stages.shared.files import map_file, reading
from stages.shared.inputs import Inputs
from stages.shared.params import read_params

DATA = Path("data")
RAW = DATA / "raw"
Indices = NDArray[np.intp]


class PreprocessParams(Struct, frozen=True):
    """The section `preprocess` of params.yaml."""

    validation_size: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)]


# The types of IDX files that are not decoded here.
OTHER_TYPES = {9: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}


class WrongTypeError(UserError):
    """An IDX file whose values are not unsigned bytes."""


def decode_idx(data: bytes | mmap.mmap) -> NDArray[np.uint8]:
    """Decode an IDX file of unsigned bytes with any number of dimensions, without a copy.

    The MNIST page defines the format: two zero bytes, the type 8, the number of dimensions,
    each dimension as a big-endian uint32, then the values in C order. Raises `WrongTypeError` for
    another type, `ValueError` for any other file.
    """
    if len(data) >= 4 and data[:2] == b"\0\0" and data[2] in OTHER_TYPES:
        problem = f"holds {OTHER_TYPES[data[2]]}, must be unsigned bytes"
        raise WrongTypeError(f"{problem}; convert it with NumPy's .astype(np.uint8)")
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"magic number {data[:4].hex()}, expected 000008 and the dimensions")
    ndim = data[3]
    # NumPy raises `ValueError` if there are too few or too many bytes.
    shape = np.frombuffer(data, ">u4", ndim, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def read_file(path: Path, decode: Callable[[mmap.mmap], Any]) -> Any:
    """Decode the bytes of a file. Raises `UserError` if it is missing, damaged or of other type."""
    try:
        with reading(path, "get it with `dvc repro fetch`"):
            return decode(map_file(path))
    except WrongTypeError as error:
        raise UserError(f"{path}: {error}") from None


def read_raw(folder: Path, prefix: str) -> Split:
    """Read the files with the prefix "train" or "t10k", and the JSON files that fetch wrote.

    Raises `UserError` if one is missing, damaged or does not fit the others.
    """
    images = read_file(folder / f"{prefix}-images-idx3-ubyte", decode_idx)
    labels = read_file(folder / f"{prefix}-labels-idx1-ubyte", decode_idx)
    class_names = read_file(folder / "class_names.json", Decoder(tuple[str, ...]).decode)
    preprocessing = read_file(folder / "preprocessing.json", Decoder(str).decode)
    try:
        return Split(images, labels, class_names, preprocessing)
    except ValueError as error:
        raise UserError(f"{folder}/{prefix}-*: {error}") from None


def split_indices(count: int, validation_size: int, seed: int) -> tuple[Indices, Indices]:
    """Choose `validation_size` of `count` examples at random.

    Returns the indices of the remaining and of the chosen examples, both sorted.
    """
    permutation = np.random.default_rng(seed).permutation(count)
    return np.sort(permutation[validation_size:]), np.sort(permutation[:validation_size])


def save(name: str, split: Split, indices: Indices) -> None:
    """Save the examples at `indices` as data/`name`.npz."""
    path = DATA / f"{name}.npz"
    save_split(path, split, indices)
    print(f"{path}: {len(indices):,} examples")


def main() -> None:
    inputs = Inputs()
    params = read_params("preprocess", PreprocessParams)
    check_recorded(*RAW.glob("*"))
    labelled = read_raw(RAW, "train")
    test = read_raw(RAW, "t10k")
    if params.validation_size >= len(labelled):
        problem = f"is {params.validation_size}, must be less than the {len(labelled)} examples"
        raise UserError(f"params.yaml: preprocess.validation_size {problem}")
    train, validation = split_indices(len(labelled), params.validation_size, params.seed)
    inputs.check_unchanged()
    save("train", labelled, train)
    save("validation", labelled, validation)
    save("test", test, np.arange(len(test)))
    inputs.check_unchanged()


if __name__ == "__main__":
    run(main)
