"""The multi-layer perceptron of MLX's documentation: build, score, save and load it."""

import json
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from stages.errors import UserError
from stages.files import DamagedError, Split, atomic_write, verify

SCORE_BATCH = 1000  # examples at a time, to bound memory; no result depends on it


class Linear(nn.Linear):
    """MLX's linear layer with its weight turned round, to float32 (inputs, outputs).

    The gradient of the weight then comes in the layout of the weight and need not be copied.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = mx.contiguous(self.weight.T)

    def __call__(self, x: mx.array) -> mx.array:
        """Map `x`, float32 (N, inputs), to float32 (N, outputs)."""
        return mx.addmm(self.bias, x, self.weight)


class MLP(nn.Module):
    """Linear layers from each of `layer_sizes` to the next, with ReLU and dropout in between."""

    def __init__(self, layer_sizes: list[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.layers = [Linear(inputs, outputs) for inputs, outputs in pairwise(layer_sizes)]

    def __call__(self, pixels: mx.array) -> mx.array:
        """The logits, float32 (N, classes), of `pixels`, float32 (N, pixels)."""
        activations = pixels
        for layer in self.layers[:-1]:
            activations = self.dropout(mx.maximum(layer(activations), 0))
        logits: mx.array = self.layers[-1](activations)
        return logits


def to_pixels(images: mx.array) -> mx.array:
    """Turn uint8 images into float32 pixels in [0, 1]."""
    return images.astype(mx.float32) / 255


@dataclass(frozen=True)
class Scores:
    """How a model does on N examples.

    `loss` is the mean cross entropy (nats), `predictions` the labels of the greatest logits, uint8
    (N,), `confidences` the softmax probabilities of these, float32 (N,), `correct` bool (N,).
    """

    loss: float
    predictions: NDArray[np.uint8]
    confidences: NDArray[np.float32]
    correct: NDArray[np.bool_]


def score(model: MLP, split: Split) -> Scores:
    """Score a model on a split, without dropout."""
    model.eval()
    losses, predictions, confidences = [], [], []
    for start in range(0, len(split), SCORE_BATCH):
        part = slice(start, start + SCORE_BATCH)
        logits = model(to_pixels(mx.array(split.images[part])))
        labels = mx.array(split.labels[part])
        losses.append(np.array(nn.losses.cross_entropy(logits, labels)))
        predictions.append(np.array(logits.argmax(axis=1), np.uint8))
        confidences.append(np.array(mx.softmax(logits, axis=1).max(axis=1)))
    predicted = np.concatenate(predictions)
    return Scores(
        loss=float(np.concatenate(losses).mean(dtype=np.float64)),
        predictions=predicted,
        confidences=np.concatenate(confidences),
        correct=predicted == split.labels,
    )


@dataclass(frozen=True)
class Metadata:
    """What a model file says about itself: enough to rebuild the network and name its outputs."""

    layer_sizes: list[int]
    dataset: str
    class_names: list[str]

    def __post_init__(self) -> None:
        """Raise `ValueError` if this describes no network."""
        sizes, names = self.layer_sizes, self.class_names
        if not (
            isinstance(sizes, list)
            and len(sizes) >= 2
            and all(type(size) is int and 0 < size < 2**31 for size in sizes)
            and isinstance(names, list)
            and len(names) == sizes[-1]
            and all(isinstance(name, str) for name in (self.dataset, *names))
        ):
            raise ValueError("its metadata describe no network")


def save_model(path: Path, model: MLP, metadata: Metadata) -> None:
    """Write the parameters, as `nn.Linear` has them, and `metadata` to `path`."""
    parameters = dict(tree_flatten(model.parameters()))
    save_arrays(path, {name: array.T for name, array in parameters.items()}, vars(metadata))


def load_model(path: Path) -> tuple[MLP, Metadata]:
    """Read what `save_model` wrote. Raises `UserError` for a file that is missing or damaged."""
    verify(path)
    try:
        parameters, entries = load_arrays(path)
        metadata = Metadata(**entries)
        model = MLP(metadata.layer_sizes)
        model.load_weights([(name, mx.contiguous(array.T)) for name, array in parameters.items()])
    except FileNotFoundError:
        raise UserError(f"{path}: not found; make it with `dvc repro train`") from None
    except (TypeError, ValueError) as error:
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
