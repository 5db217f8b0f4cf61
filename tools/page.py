"""Write page.html, a page to draw a digit on. It contains the model and works offline."""

import json
from base64 import b64encode
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from stages.shared.cli import run
from stages.shared.errors import UserError
from stages.shared.files import atomic_write
from stages.shared.model_file import Metadata, flat_parameters, load_model
from stages.shared.pictures import BOX_FRACTION
from tools.predict import MODEL

TEMPLATE = Path(__file__).with_suffix(".html")
PAGE = Path("page.html")

Layer = tuple[mx.array, mx.array]  # weight (inputs, outputs), bias (outputs,)


def mlp_forward(layers: list[Layer], activations: mx.array) -> mx.array:
    """Compute the logits of a multi-layer perceptron, float32 (N, classes), as the page does.

    `activations` are its inputs, float32 (N, inputs). Between layers it has ReLU.
    """
    for number, (weight, bias) in enumerate(layers):
        if number > 0:
            activations = mx.maximum(activations, 0)
        activations = activations @ weight + bias
    return activations


def mlp_layers(model: nn.Module, metadata: Metadata) -> list[Layer] | None:
    """Return the layers of a multi-layer perceptron, or None if `model` is another network."""
    model.eval()
    arrays = flat_parameters(model)
    names = [f"layers.{n}" for n in range(len(arrays) // 2)]
    pixels = mx.random.uniform(shape=(8, *metadata.image_shape), key=mx.random.key(0))
    try:
        layers = [(arrays.pop(f"{name}.weight"), arrays.pop(f"{name}.bias")) for name in names]
        logits = mlp_forward(layers, pixels.reshape(8, -1))
        is_mlp = mx.allclose(logits, model(pixels), rtol=0, atol=1e-3).item()
    except (KeyError, ValueError):  # parameters with other names or shapes
        return None
    return layers if is_mlp and not arrays else None


def encode(array: mx.array) -> str:
    """Encode the values of a float32 array as Base64."""
    return b64encode(np.array(array).tobytes()).decode()


def make_page(path: Path, model: nn.Module, metadata: Metadata) -> str:
    """Return the page with the model of `path`. Raises `UserError` if the page cannot run it."""
    remedy = "use `python -m tools.predict`"
    if metadata.preprocessing != "mnist" or len(metadata.image_shape) != 2:
        raise UserError(f"{path}: is not a model of digits; {remedy}")
    is_float32 = all(array.dtype == mx.float32 for array in flat_parameters(model).values())
    layers = mlp_layers(model, metadata) if is_float32 else None
    if layers is None:
        kind = "a multi-layer perceptron with ReLU and float32 weights"
        raise UserError(f"{path}: is not {kind}; {remedy}")
    values = {
        "image_shape": metadata.image_shape,
        "class_names": metadata.class_names,
        "box_fraction": BOX_FRACTION,
        "layers": [[encode(weight), encode(bias)] for weight, bias in layers],
    }
    text = json.dumps(values).replace("<", r"\u003c")  # a class may be named </script>
    return TEMPLATE.read_text(encoding="utf-8").replace('"MODEL"', text)


def main() -> None:
    mx.set_default_device(mx.cpu)  # a GPU may round products, and `mlp_layers` compares them
    page = make_page(MODEL, *load_model(MODEL))
    with atomic_write(PAGE) as file:
        file.write(page.encode())
    print(f"{PAGE}: open it in a browser, or send it to a friend")


if __name__ == "__main__":
    run(main)
