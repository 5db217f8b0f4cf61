"""Save a model as a safetensors file with metadata, and rebuild it from this file alone."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
from mlx.utils import tree_flatten
from msgspec import UNSET, Meta, Struct, UnsetType

from stages.model import Model, ModelParams
from stages.shared.data import Split, check_class_names
from stages.shared.dvc_lock import check_recorded
from stages.shared.errors import UserError
from stages.shared.files import atomic_write, reading

MAX_HEADER_BYTES = 1 << 20  # of a safetensors file: enough for about 10,000 arrays


class Metadata(Struct, frozen=True, forbid_unknown_fields=True):
    """The data that are needed to rebuild a model, prepare its images and name its classes.

    `image_shape` is (rows, columns) or (rows, columns, channels). `class_names` belong to the
    labels 0, 1, .... `preprocessing` is the one of the training split. `backend` describes the GPU
    that trained the model and its MLX. The file has no such entry if a CPU trained it.
    """

    params: ModelParams
    image_shape: Annotated[tuple[Annotated[int, Meta(ge=1)], ...], Meta(min_length=2, max_length=3)]
    class_names: Annotated[tuple[str, ...], Meta(min_length=1, max_length=256)]
    preprocessing: str = ""
    backend: tuple[str, ...] | UnsetType = UNSET

    def build(self) -> Model:
        """Return a model of this kind with random weights."""
        return Model(self.params, self.image_shape, len(self.class_names))

    def check_compatible(self, path: Path, split: Split) -> None:
        """Raise `UserError` if the model cannot be used for `split`, which was read from `path`."""
        if (split.image_shape, split.class_names) != (self.image_shape, self.class_names):
            problem = f"has {_describe(split)}, but the network is for {_describe(self)}"
            raise UserError(f"{path}: {problem}; make the splits from one data set")
        if split.preprocessing != self.preprocessing:
            problem = f"preprocessing is {split.preprocessing!r:.60}, but the network is for"
            raise UserError(f"{path}: {problem} {self.preprocessing!r:.60}; prepare both alike")


def _describe(data: Split | Metadata) -> str:
    """Describe images and classes; of many classes, only the first names are shown."""
    names = ", ".join(data.class_names)
    return f"images {data.image_shape} and {len(data.class_names)} classes ({names:.60})"


def flat_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return the parameters of `model` under their names in MLX, such as "layers.0.weight"."""
    return dict(tree_flatten(model.parameters()))


def save_model(path: Path, model: nn.Module, metadata: Metadata) -> None:
    """Write the parameters of `model`, under their names in MLX, and `metadata`."""
    save_arrays(path, flat_parameters(model), msgspec.to_builtins(metadata))


def load_model(path: Path) -> tuple[Model, Metadata]:
    """Rebuild the model that `save_model` wrote.

    Raises `UserError` if the file is missing, damaged, or does not fit the code, for example
    because another version of stages/model.py wrote it.
    """
    check_recorded(path)
    arrays, entries = load_arrays(path)
    try:
        metadata = msgspec.convert(entries, Metadata)
        check_class_names(metadata.class_names)
        model = metadata.build()
        model.load_weights(list(arrays.items()))
    except MemoryError:
        raise
    except Exception as error:  # another stages/model.py can raise anything
        problem = f"does not fit this version of the code ({' '.join(str(error).split()):.200})"
        raise UserError(f"{path}: {problem}; train a new one with `dvc repro`") from None
    for name, array in arrays.items():
        if not mx.isfinite(array).all():
            problem = f"{name:.60} holds values that are not finite"
            raise UserError(f"{path}: {problem}; train a new one with `dvc repro`")
    return model, metadata


def save_arrays(path: Path, arrays: dict[str, mx.array], entries: dict[str, Any]) -> None:
    """Write `arrays` as safetensors, with `entries` as JSON and a SHA-256 of both as metadata."""
    metadata = {key: json.dumps(value) for key, value in entries.items()}
    with atomic_write(path) as file:
        mx.save_safetensors(file, arrays, {**metadata, "sha256": _digest(arrays, metadata)})


def load_arrays(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Read the arrays and entries that `save_arrays` wrote.

    Raises `UserError` if the file is missing or damaged.
    """
    with reading(path):
        with path.open("rb") as file:  # MLX raises RuntimeError if it cannot
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:  # to parse it would take long
            raise ValueError(f"the header has {header_bytes:,} bytes, more than a model needs")
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        array_bytes = sum(array.nbytes for array in arrays.values())
        file_bytes = path.stat().st_size
        if array_bytes > file_bytes:  # overlapping arrays of a small file could fill the memory
            raise ValueError(f"arrays overlap: {array_bytes:,} bytes in a file of {file_bytes:,}")
        mx.eval(arrays)
        expected, actual = metadata.pop("sha256", ""), _digest(arrays, metadata)
        if expected != actual:
            raise ValueError(f"SHA-256 mismatch: expected {expected!r}, got {actual!r}")
        entries = {key: json.loads(value) for key, value in metadata.items()}
    return arrays, entries


def _digest(arrays: dict[str, mx.array], metadata: dict[str, str]) -> str:
    """Return the SHA-256 of metadata, and of the names, dtypes, shapes and values of arrays."""
    digest = sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
