"""Score the model on the test split: accuracy, accuracy of each class, confusion, worst mistakes.

The accuracy comes with its 95% Wilson interval: two experiments whose intervals do not overlap
differ by more than the chance of which examples are in the test split.
"""

import math
from pathlib import Path

from stages.blas import use_threads

import mlx.core as mx
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stages.errors import run
from stages.files import Split, atomic_write, load_split, save_csv, save_json
from stages.model import Scores, load_model, score

METRICS = Path("metrics")

Z_95 = 1.959963984540054  # the standard normal's 97.5% quantile

COLUMNS, ROWS = 8, 4  # of the picture of the worst mistakes
ZOOM = 4  # pixels of the picture for one of an image
CELL = (150, 160)  # width and height in pixels: an image and two lines below it


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95% confidence interval of the fraction `correct / total` (Wilson, JASA 22, 1927)."""
    p, z2 = correct / total, Z_95**2
    centre = p + z2 / (2 * total)
    margin = Z_95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    scale = 1 + z2 / total
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def class_accuracies(split: Split, scores: Scores, names: list[str]) -> dict[str, float]:
    """The accuracy on the examples of each class that has some."""
    found = {}
    for label, name in enumerate(names):
        correct = scores.correct[split.labels == label]
        if len(correct):
            found[name] = int(correct.sum()) / len(correct)
    return found


def draw_mistakes(split: Split, scores: Scores, names: list[str]) -> Image.Image:
    """Draw the mistakes of which the model is most confident, these first, line by line."""
    mistakes = np.flatnonzero(~scores.correct)
    worst = mistakes[np.argsort(-scores.confidences[mistakes], kind="stable")][: COLUMNS * ROWS]
    width, height = CELL
    picture = Image.new("L", (COLUMNS * width, 30 + ROWS * height), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=13)
    draw.text((8, 8), f"The worst {len(worst)} of {len(mistakes):,} mistakes", "black", font)
    side = math.isqrt(split.images.shape[1])
    for place, example in enumerate(worst):
        left, top = 8 + place % COLUMNS * width, 30 + place // COLUMNS * height
        image = Image.fromarray(255 - split.images[example].reshape(side, side))
        picture.paste(
            image.resize((ZOOM * side, ZOOM * side), Image.Resampling.NEAREST), (left, top)
        )
        actual, predicted = names[split.labels[example]], names[scores.predictions[example]]
        caption = f"{actual}, predicted as\n{predicted} ({scores.confidences[example]:.2%})"
        draw.text((left, top + ZOOM * side + 2), caption, "black", font, spacing=2)
    return picture


def main() -> None:
    mx.set_default_device(mx.cpu)  # the same figures whatever trained the model
    use_threads(1)
    model, metadata = load_model(Path("data/model.safetensors"))
    test = load_split(Path("data/test.npz"))
    scores = score(model, test)
    names = metadata.class_names
    correct, total = int(scores.correct.sum()), len(test)
    low, high = wilson_interval(correct, total)
    accuracy = {
        "accuracy": correct / total,
        "accuracy_95_low": round(low, 4),
        "accuracy_95_high": round(high, 4),
        "loss": round(scores.loss, 6),
    }
    save_json(METRICS / "accuracy.json", accuracy)
    of_class = {name: round(a, 4) for name, a in class_accuracies(test, scores, names).items()}
    save_json(METRICS / "classes.json", {"accuracy_of": of_class})
    pairs = zip(test.labels, scores.predictions, strict=True)
    save_csv(
        METRICS / "confusion.csv",
        ("actual", "predicted"),
        ((names[actual], names[predicted]) for actual, predicted in pairs),
    )
    with atomic_write(METRICS / "misclassified.png") as file:
        draw_mistakes(test, scores, names).save(file, "PNG")
    print(f"accuracy {correct / total:.4f}, 95% interval {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    run(main)
