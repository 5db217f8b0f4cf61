"""The metrics and pictures of the test split, and the mistakes that end the stage."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from stages import evaluate
from stages.evaluate import IMAGE_SIDE, MODEL, TEST, TITLE_HEIGHT, draw_image, draw_mistakes
from stages.shared.data import Split, save_split
from stages.shared.metrics import Predictions
from stages.shared.model_file import flat_parameters, load_model, save_model
from tests.conftest import SMALL, Project, error_of, small_split

NAMES = ("zero", "one", "two")


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # The example and the extremes in Newcombe, Statistics in Medicine 17, 1998, table I.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert evaluate.wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def predictions(labels: list[int], predicted: list[int], confidences: list[float]) -> Predictions:
    """Return predictions with these labels, predicted labels and confidences."""
    odds = np.array(confidences) / (1 - np.array(confidences)) * (len(NAMES) - 1)
    logits = np.zeros((len(labels), len(NAMES)), np.float32)
    logits[np.arange(len(labels)), predicted] = np.log(odds)
    return Predictions(logits, np.array(labels, np.uint8))


def split_of(images: object, labels: list[int]) -> Split:
    return Split(np.array(images, np.uint8), np.array(labels, np.uint8), NAMES)


def test_metrics_follow_from_logits() -> None:
    found = predictions([0, 1, 2, 1], [0, 2, 2, 1], [0.9, 0.5, 0.8, 0.7])
    assert found.predicted_labels.tolist() == [0, 2, 2, 1]
    assert found.confidences == pytest.approx([0.9, 0.5, 0.8, 0.7], abs=1e-6)
    assert found.correct.tolist() == [True, False, True, True]
    assert found.accuracy == 0.75
    assert found.loss == pytest.approx(-np.log([0.9, 0.25, 0.8, 0.7]).mean(), abs=1e-6)


def test_accuracy_of_each_class_with_examples() -> None:
    split = split_of(np.zeros((4, 4, 4)), [0, 0, 1, 0])
    found = evaluate.class_accuracies(split, predictions([0, 0, 1, 0], [0, 1, 1, 0], [0.9] * 4))
    assert found == {"zero": 0.6667, "one": 1.0}


def test_mistakes_are_drawn_in_order_of_confidence() -> None:
    labels, predicted = [0, 1, 2, 0, 1], [0, 2, 0, 1, 1]
    images = np.multiply.outer([0, 50, 100, 150, 0], np.ones((28, 28)))
    found = predictions(labels, predicted, [0.99, 0.5, 0.9, 0.7, 0.99])
    picture = draw_mistakes(split_of(images, labels), found)
    assert picture.size == (8 * 150, 30 + 4 * 160)  # 8 x 4 cells of 150 x 160 pixels below a title
    middles = [(8 + column * 150 + IMAGE_SIDE // 2, 30 + IMAGE_SIDE // 2) for column in range(4)]
    levels = [picture.convert("L").getpixel(middle) for middle in middles]
    assert levels == [100, 150, 50, 255]


def test_picture_without_mistakes_is_empty() -> None:
    split = split_of(np.zeros((2, 28, 28)), [0, 1])
    picture = draw_mistakes(split, predictions([0, 1], [0, 1], [0.9, 0.9]))
    assert picture.crop((0, TITLE_HEIGHT, *picture.size)).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize(
    ("image_shape", "size"),
    [
        ((28, 28), (IMAGE_SIDE, IMAGE_SIDE)),
        ((8, 8, 1), (IMAGE_SIDE, IMAGE_SIDE)),
        ((32, 20, 3), (IMAGE_SIDE * 20 // 32, IMAGE_SIDE)),
        ((100, 300, 4), (IMAGE_SIDE, round(IMAGE_SIDE / 3))),
        ((10, 10, 7), (IMAGE_SIDE, IMAGE_SIDE)),
        ((1, 500), (IMAGE_SIDE, 1)),
    ],
)
def test_image_of_any_shape_fits_its_cell(
    image_shape: tuple[int, ...], size: tuple[int, int]
) -> None:
    image = small_split(1, image_shape).images[0]
    drawn = draw_image(image)
    assert drawn.size == size
    assert np.array(drawn.convert("L")).max() > 0
    picture = draw_mistakes(split_of([image], [0]), predictions([0], [1], [0.9])).convert("L")
    caption = picture.crop((8, TITLE_HEIGHT + IMAGE_SIDE + 2, 8 + IMAGE_SIDE, TITLE_HEIGHT + 160))
    assert np.array(caption).min() < 100  # dark letters


def rows_of(project: Project, file: str) -> list[list[str]]:
    return list(csv.reader(project.read(file).decode().splitlines()))


def test_outputs_agree_with_each_other(finished: Project) -> None:
    test = SMALL["test"]
    header, *rows = rows_of(finished, "metrics/confusion.csv")
    assert header == ["actual", "predicted"]
    assert [actual for actual, _ in rows] == [test.class_names[label] for label in test.labels]
    mistakes = [[str(index), *row] for index, row in enumerate(rows) if row[0] != row[1]]
    assert rows_of(finished, "metrics/mistakes.csv") == [["example", *header], *mistakes]
    metrics = json.loads(finished.read("metrics/accuracy.json"))
    assert metrics["accuracy"] == (len(test) - len(mistakes)) / len(test) > 0.9
    assert metrics["accuracy_95_low"] < metrics["accuracy"] < metrics["accuracy_95_high"] <= 1
    assert metrics["examples"] == len(test)
    assert list(metrics["accuracy_of"]) == list(test.class_names)
    assert Image.open(finished.root / "metrics/misclassified.png").width == 8 * 150


def write_huge_weights(root: Path) -> None:
    model, metadata = load_model(root / MODEL)
    weights = {name: mx.full(array.shape, 3e38) for name, array in flat_parameters(model).items()}
    model.load_weights(list(weights.items()))
    save_model(root / MODEL, model, metadata)


def write_file_at_metrics(root: Path) -> None:
    shutil.rmtree(root / "metrics")
    (root / "metrics").touch()


@pytest.mark.parametrize(
    ("mistake", "pattern"),
    [
        (lambda root: (root / MODEL).unlink(), f"{MODEL}: not found; .*`dvc repro`"),
        (
            lambda root: save_split(root / TEST, small_split(3, (9, 11, 3))),
            rf"{TEST}: .*\(9, 11, 3\).*\(9, 11\).*one data set",
        ),
        (lambda root: save_split(root / TEST, SMALL["test"][:0]), f"{TEST}: has no examples"),
        (write_huge_weights, rf"{MODEL}: .*loss on {TEST} is .*train\.learning_rate"),
        (write_file_at_metrics, r"metrics/accuracy\.json: cannot be written .*File exists"),
    ],
)
def test_mistake_ends_in_one_line(
    mistake: Callable[[Path], None],
    pattern: str,
    finished: Project,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(finished.root)
    assert re.match(f"error: {pattern}", error_of(evaluate.main, finished, monkeypatch))


def test_evaluate_needs_only_the_model_and_the_test_split(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    for path in (MODEL, TEST):
        shutil.copy(finished.root / path, tmp_path / path)
    monkeypatch.chdir(tmp_path)
    evaluate.main()
    for name in ("accuracy.json", "confusion.csv", "mistakes.csv"):
        assert (tmp_path / "metrics" / name).read_bytes() == finished.read(f"metrics/{name}")
