"""Evaluate the model on the test split: accuracy, accuracy per class, confusion, worst mistakes.

The accuracy has a 95% confidence interval for the choice of the test examples. To compare two
models or two settings, use `python -m tools.compare`.
"""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from stages.shared.cli import run
from stages.shared.data import Split, load_split
from stages.shared.errors import UserError
from stages.shared.files import atomic_write, save_csv, save_json
from stages.shared.inputs import Inputs
from stages.shared.metrics import Predictions, predict
from stages.shared.model_file import load_model
from stages.shared.openblas import load_openblas

MODEL = Path("data/model.safetensors")
TEST = Path("data/test.npz")
METRICS = Path("metrics")

Z_95 = 1.959963984540054  # 97.5% quantile of the standard normal distribution

# The picture of the worst mistakes: a grid below a title. All sizes are in pixels.
GRID_COLUMNS, GRID_ROWS = 8, 4
CELL_WIDTH, CELL_HEIGHT = 150, 160  # an image and two lines of text below it
IMAGE_SIDE = 112  # the longer side of an image
TITLE_HEIGHT = 30


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95% Wilson interval of the fraction `correct / total` (Wilson, JASA 22, 1927)."""
    p, z2 = correct / total, Z_95**2
    centre = p + z2 / (2 * total)
    margin = Z_95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    scale = 1 + z2 / total
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def class_accuracies(split: Split, predictions: Predictions) -> dict[str, float]:
    """Return the accuracy per class, rounded to 4 decimals, of the classes that have examples."""
    accuracies = {}
    for label, name in enumerate(split.class_names):
        correct = predictions.correct[split.labels == label]
        if len(correct):
            accuracies[name] = round(int(correct.sum()) / len(correct), 4)
    return accuracies


def accuracy_metrics(split: Split, predictions: Predictions) -> dict[str, Any]:
    """Return the accuracy with its confidence interval, per class, and the loss in nats."""
    low, high = wilson_interval(int(predictions.correct.sum()), len(predictions.labels))
    return {
        "accuracy": predictions.accuracy,
        "accuracy_95_low": round(low, 4),
        "accuracy_95_high": round(high, 4),
        "loss": round(predictions.loss, 6),
        "examples": len(predictions.labels),
        "accuracy_of": class_accuracies(split, predictions),
    }


def draw_image(image: NDArray[np.uint8]) -> Image.Image:
    """Draw an image, uint8 (rows, columns, ...), with IMAGE_SIDE as its longer side."""
    pixels = image.reshape(*image.shape[:2], -1)
    if pixels.shape[2] not in (3, 4):  # not RGB or RGBA: show the first channel
        pixels = pixels[..., 0]
    longer = max(image.shape[:2])
    height, width = (max(1, round(side * IMAGE_SIDE / longer)) for side in image.shape[:2])
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)


def draw_mistakes(split: Split, predictions: Predictions) -> Image.Image:
    """Draw the mistakes of highest confidence, in descending order, row by row."""
    mistakes = np.flatnonzero(~predictions.correct)
    order = np.argsort(-predictions.confidences[mistakes], kind="stable")
    worst = mistakes[order][: GRID_COLUMNS * GRID_ROWS]
    size = (GRID_COLUMNS * CELL_WIDTH, TITLE_HEIGHT + GRID_ROWS * CELL_HEIGHT)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(size=13)
    draw.text((8, 8), f"The worst {len(worst)} of {len(mistakes):,} mistakes", "black")
    for cell, index in enumerate(worst):
        row, column = divmod(cell, GRID_COLUMNS)
        left, top = 8 + column * CELL_WIDTH, TITLE_HEIGHT + row * CELL_HEIGHT
        picture.paste(draw_image(split.images[index]), (left, top))
        actual = split.class_names[split.labels[index]]
        predicted = split.class_names[predictions.predicted_labels[index]]
        confidence = predictions.confidences[index]
        caption = f"{actual:.14}, predicted as\n{predicted:.14} ({confidence:.2%})"
        draw.text((left, top + IMAGE_SIDE + 2), caption, "black", spacing=2)
    return picture


def main() -> None:
    inputs = Inputs()
    mx.set_default_device(mx.cpu)  # the same metrics, whatever device trained the model
    load_openblas(1)
    model, metadata = load_model(MODEL)
    test = load_split(TEST)
    metadata.check_compatible(TEST, test)
    predictions = predict(model, test)
    if not math.isfinite(predictions.loss):
        problem = f"its loss on {TEST} is {predictions.loss}, so its training diverged"
        raise UserError(f"{MODEL}: {problem}; lower train.learning_rate in params.yaml")
    metrics = accuracy_metrics(test, predictions)
    inputs.check_unchanged()
    save_json(METRICS / "accuracy.json", metrics)
    names = np.array(test.class_names)
    rows = list(zip(names[test.labels], names[predictions.predicted_labels], strict=True))
    save_csv(METRICS / "confusion.csv", ("actual", "predicted"), rows)
    # Git keeps the mistakes, because they are few, but not all predictions.
    mistakes = [(index, *rows[index]) for index in np.flatnonzero(~predictions.correct)]
    save_csv(METRICS / "mistakes.csv", ("example", "actual", "predicted"), mistakes)
    with atomic_write(METRICS / "misclassified.png") as file:
        draw_mistakes(test, predictions).save(file, "PNG")
    interval = "{accuracy_95_low:.4f} to {accuracy_95_high:.4f}".format_map(metrics)
    print(f"accuracy {predictions.accuracy:.4f}, 95% interval {interval}", flush=True)
    inputs.check_unchanged()


if __name__ == "__main__":
    run(main)
