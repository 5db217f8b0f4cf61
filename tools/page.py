"""Write page.html, a page to draw a digit on: it holds the model, and works offline anywhere."""

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from stages.shared.cli import run
from stages.shared.errors import UserError
from stages.shared.files import atomic_write
from stages.shared.model_file import Metadata, load_model
from tools.predict import BOX, MODEL

TEMPLATE = Path(__file__).with_suffix(".html")
PAGE = Path("page.html")


def forward(layers: list[list[NDArray[np.float32]]], pixels: NDArray[np.float32]) -> Any:
    """The logits, float32 (N, classes), of `pixels`, (N, inputs), as the page computes them."""
    for number, (weight, bias) in enumerate(layers):
        pixels = (pixels if number == 0 else np.maximum(pixels, 0)) @ weight + bias
    return pixels


def layers_of(model: nn.Module, metadata: Metadata) -> list[list[NDArray[np.float32]]] | None:
    """The weight and bias of each layer; None if the model computes anything but such layers."""
    model.eval()
    arrays = {
        name: np.array(array) for name, array in dict(tree_flatten(model.parameters())).items()
    }
    pixels = np.random.default_rng(0).random((8, *metadata.image_shape), np.float32)
    try:
        layers = [
            [arrays.pop(f"layers.{number}.{part}") for part in ("weight", "bias")]
            for number in range(len(arrays) // 2)
        ]
        same = np.allclose(forward(layers, pixels.reshape(8, -1)), model(mx.array(pixels)), 0, 1e-3)
    except (KeyError, ValueError):
        return None
    return layers if same and not arrays else None


def make_page(path: Path, model: nn.Module, metadata: Metadata) -> str:
    """Put the model of `path` into the page. Raises `UserError` for one that it cannot run."""
    remedy = "; use `python -m tools.predict`"
    if metadata.preprocessing != "mnist" or len(metadata.image_shape) != 2:
        raise UserError(f"{path}: is not a model of digits, which the page draws{remedy}")
    layers = layers_of(model, metadata)
    if layers is None:
        raise UserError(f"{path}: is not the multi-layer perceptron that the page can run{remedy}")
    values = {
        "image_shape": metadata.image_shape,
        "class_names": metadata.class_names,
        "box": BOX,
        "layers": [[b64encode(array.tobytes()).decode() for array in layer] for layer in layers],
    }
    text = json.dumps(values).replace("<", r"\u003c")  # a class may be named </script>
    return TEMPLATE.read_text().replace('"MODEL"', text)


def main() -> None:
    page = make_page(MODEL, *load_model(MODEL))
    with atomic_write(PAGE) as file:
        file.write(page.encode())
    print(f"{PAGE}: open it in a browser, or send it to a friend")


if __name__ == "__main__":
    run(main)
