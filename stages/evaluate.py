"""Score the model on the test split: metrics/accuracy.json and metrics/confusion.csv.

The accuracy comes with its 95% Wilson interval: two experiments whose intervals do not overlap
differ by more than the chance of which examples are in the test split.
"""

import json
import math
from pathlib import Path

from stages.blas import use_threads

import mlx.core as mx

from stages.errors import run
from stages.files import atomic_write, load_split, save_csv
from stages.model import load_model, score

Z_95 = 1.959963984540054  # the standard normal's 97.5% quantile


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95% confidence interval of the fraction `correct / total` (Wilson, JASA 22, 1927)."""
    p, z2 = correct / total, Z_95**2
    centre = p + z2 / (2 * total)
    margin = Z_95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    scale = 1 + z2 / total
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def main() -> None:
    mx.set_default_device(mx.cpu)  # the same figures whatever trained the model
    use_threads(1)
    model, metadata = load_model(Path("data/model.safetensors"))
    test = load_split(Path("data/test.npz"))
    loss, predictions = score(model, test)
    correct, total = int((predictions == test.labels).sum()), len(test)
    low, high = wilson_interval(correct, total)
    accuracy = {
        "accuracy": correct / total,
        "accuracy_95_low": round(low, 4),
        "accuracy_95_high": round(high, 4),
        "loss": round(loss, 6),
    }
    names = metadata.class_names
    pairs = zip(test.labels, predictions, strict=True)
    save_csv(
        Path("metrics/confusion.csv"),
        ("actual", "predicted"),
        ((names[actual], names[predicted]) for actual, predicted in pairs),
    )
    with atomic_write(Path("metrics/accuracy.json")) as file:
        file.write(f"{json.dumps(accuracy, indent=2)}\n".encode())
    print(f"accuracy {correct / total:.4f}, 95% interval {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    run(main)
