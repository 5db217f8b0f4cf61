"""Weights as safetensors: arrays with metadata, and a model that its file alone can rebuild."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
from mlx.utils import tree_flatten
from msgspec import Meta, Struct

from stages.model import Model, ModelParams
from stages.shared.data import Split
from stages.shared.dvc_lock import check_recorded
from stages.shared.errors import DamagedError, UserError
from stages.shared.files import atomic_write


class Metadata(Struct, frozen=True, forbid_unknown_fields=True):
    """What a model file says about itself: what `Model` is built from, and its outputs' names."""

    params: ModelParams
    image_shape: Annotated[tuple[Annotated[int, Meta(ge=1)], ...], Meta(min_length=2)]
    class_names: Annotated[tuple[str, ...], Meta(min_length=1, max_length=256)]
    preprocessing: str = ""  # as of a split

    def build(self) -> Model:
        """A network of this kind with new weights."""
        return Model(self.params, self.image_shape, len(self.class_names))

    def check_compatible(self, path: Path, split: Split) -> None:
        """Raise `UserError` if `split`, read from `path`, does not fit such a network."""
        if (split.image_shape, split.class_names) != (self.image_shape, self.class_names):
            raise UserError(
                f"{path}: has images {split.image_shape} and classes {_few(split.class_names)},"
                f" but the network is for {self.image_shape} and {_few(self.class_names)}; make the"
                " splits from one data set"
            )


def _few(names: tuple[str, ...]) -> str:
    text = ", ".join(names[:3])
    return f"{text:.60}" + (f", ... ({len(names)})" if len(names) > 3 else "")


def save_model(path: Path, model: nn.Module, metadata: Metadata) -> None:
    """Write the parameters under their names, and `metadata`, to `path`."""
    save_arrays(path, dict(tree_flatten(model.parameters())), msgspec.to_builtins(metadata))


def load_model(path: Path) -> tuple[Model, Metadata]:
    """Read what `save_model` wrote. Raises `UserError` for a file that is missing or damaged."""
    check_recorded(path)
    try:
        arrays, entries = load_arrays(path)
        metadata = msgspec.convert(entries, Metadata)
        model = metadata.build()
        model.load_weights(list(arrays.items()))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; make it with `dvc repro`") from None
    except (msgspec.ValidationError, ArithmeticError, TypeError, ValueError) as error:
        raise DamagedError(path, error) from None
    return model, metadata


def save_arrays(path: Path, arrays: dict[str, mx.array], entries: dict[str, Any]) -> None:
    """Write `arrays` to `path` as safetensors, with `entries` (as JSON) and a digest of it all."""
    metadata = {key: json.dumps(value) for key, value in entries.items()}
    with atomic_write(path) as file:
        mx.save_safetensors(file, arrays, {**metadata, "sha256": _digest(arrays, metadata)})


def load_arrays(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Read what `save_arrays` wrote. Raises `ValueError` for a damaged file."""
    try:
        with path.open("rb") as file:
            loaded: Any = mx.load(file, format="safetensors", return_metadata=True)
            arrays, metadata = loaded
            if sum(array.nbytes for array in arrays.values()) > path.stat().st_size:
                raise ValueError("its arrays overlap")  # a little file could become a huge one
            mx.eval(arrays)
        if metadata.pop("sha256", None) != _digest(arrays, metadata):
            raise ValueError("its SHA-256 is not the one it names")
        return arrays, {key: json.loads(value) for key, value in metadata.items()}
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # MLX has several kinds for damaged bytes
        raise ValueError(str(error)) from None


def _digest(arrays: dict[str, mx.array], metadata: dict[str, str]) -> str:
    digest = sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
