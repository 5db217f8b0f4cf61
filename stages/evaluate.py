"""Score the model on the test split: accuracy, accuracy of each class, confusion, worst mistakes.

The accuracy comes with its 95% Wilson interval: two experiments whose intervals do not overlap
differ by more than the chance of which examples are in the test split.
"""

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from stages.shared.cli import run
from stages.shared.data import Split, load_split
from stages.shared.files import atomic_write, save_csv, save_json
from stages.shared.metrics import Predictions, predict
from stages.shared.model_file import load_model
from stages.shared.openblas import load_openblas

TEST = Path("data/test.npz")
METRICS = Path("metrics")

Z_95 = 1.959963984540054  # the standard normal's 97.5% quantile

COLUMNS, ROWS = 8, 4  # of the picture of the worst mistakes
SIDE = 112  # pixels of it, at most, that an image is high and wide
CELL = (150, 160)  # width and height in pixels: an image and two lines below it


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95% confidence interval of the fraction `correct / total` (Wilson, JASA 22, 1927)."""
    p, z2 = correct / total, Z_95**2
    centre = p + z2 / (2 * total)
    margin = Z_95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    scale = 1 + z2 / total
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def class_accuracies(split: Split, scores: Predictions) -> dict[str, float]:
    """The accuracy on the examples of each class that has some."""
    correct = {name: scores.correct[split.labels == n] for n, name in enumerate(split.class_names)}
    return {name: int(hits.sum()) / len(hits) for name, hits in correct.items() if len(hits)}


def draw(image: NDArray[np.uint8]) -> Image.Image:
    """An image of any shape as a picture of at most `SIDE` pixels a side."""
    channels = image.reshape(*image.shape[:2], -1)
    if channels.shape[2] not in (3, 4):  # neither RGB nor RGBA
        channels = channels[..., 0]
    rows, columns = (max(1, round(side * SIDE / max(image.shape[:2]))) for side in image.shape[:2])
    return Image.fromarray(channels).resize((columns, rows), Image.Resampling.BOX)


def draw_mistakes(split: Split, scores: Predictions) -> Image.Image:
    """Draw the mistakes of which the model is most confident, these first, line by line."""
    mistakes = np.flatnonzero(~scores.correct)
    worst = mistakes[np.argsort(-scores.confidences[mistakes], kind="stable")][: COLUMNS * ROWS]
    width, height = CELL
    page = Image.new("RGB", (COLUMNS * width, 30 + ROWS * height), "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=13)
    pen.text((8, 8), f"The worst {len(worst)} of {len(mistakes):,} mistakes", "black", font)
    for place, example in enumerate(worst):
        left, top = 8 + place % COLUMNS * width, 30 + place // COLUMNS * height
        page.paste(draw(split.images[example]), (left, top))
        actual, predicted = (
            f"{split.class_names[label]:.14}"
            for label in (split.labels[example], scores.predicted_labels[example])
        )
        caption = f"{actual}, predicted as\n{predicted} ({scores.confidences[example]:.2%})"
        pen.text((left, top + SIDE + 2), caption, "black", font, spacing=2)
    return page


def main() -> None:
    mx.set_default_device(mx.cpu)  # the same figures whatever trained the model
    load_openblas(1)
    model, metadata = load_model(Path("data/model.safetensors"))
    test = load_split(TEST)
    metadata.check_compatible(TEST, test)
    scores = predict(model, test)
    low, high = wilson_interval(int(scores.correct.sum()), len(test))
    accuracy = {
        "accuracy": scores.accuracy,
        "accuracy_95_low": round(low, 4),
        "accuracy_95_high": round(high, 4),
        "loss": round(scores.loss, 6),
    }
    save_json(METRICS / "accuracy.json", accuracy)
    of_class = {name: round(value, 4) for name, value in class_accuracies(test, scores).items()}
    save_json(METRICS / "classes.json", {"accuracy_of": of_class})
    names = np.array(test.class_names)
    pairs = zip(names[test.labels], names[scores.predicted_labels], strict=True)
    save_csv(METRICS / "confusion.csv", ("actual", "predicted"), pairs)
    wrong = np.flatnonzero(~scores.correct)  # few enough for Git
    rows = zip(wrong, names[test.labels[wrong]], names[scores.predicted_labels[wrong]], strict=True)
    save_csv(METRICS / "mistakes.csv", ("example", "actual", "predicted"), rows)
    with atomic_write(METRICS / "misclassified.png") as file:
        draw_mistakes(test, scores).save(file, "PNG")
    print(f"accuracy {scores.accuracy:.4f}, 95% interval {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    run(main)
