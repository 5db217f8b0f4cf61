"""The figures and pictures of the test split, and the stage's mistakes."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages import evaluate as stage
from stages.evaluate import (
    CELL,
    COLUMNS,
    ROWS,
    SIDE,
    class_accuracies,
    draw,
    draw_mistakes,
    wilson_interval,
)
from stages.shared.data import Split, save_split
from stages.shared.metrics import Predictions
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
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def scores(labels: list[int], predictions: list[int], confidences: list[float]) -> Predictions:
    """Predictions with these predictions, made with about these confidences."""
    logits = np.zeros((len(labels), len(NAMES)), np.float32)
    odds = np.array(confidences) / (1 - np.array(confidences)) * (len(NAMES) - 1)
    logits[np.arange(len(labels)), predictions] = np.log(odds)
    return Predictions(logits, np.array(labels, np.uint8))


def test_what_follows_from_the_logits() -> None:
    found = scores([0, 1, 2, 1], [0, 2, 2, 1], [0.9, 0.5, 0.8, 0.7])
    assert found.predicted_labels.tolist() == [0, 2, 2, 1]
    assert found.confidences == pytest.approx([0.9, 0.5, 0.8, 0.7], abs=1e-6)
    assert found.correct.tolist() == [True, False, True, True]
    assert found.accuracy == 0.75
    expected = -np.log([0.9, 0.25, 0.8, 0.7]).mean()
    assert found.loss == pytest.approx(expected, abs=1e-6)


def test_the_worst_mistakes_come_first() -> None:
    labels, predictions = [0, 1, 2, 0, 1], [0, 2, 0, 1, 1]
    images = np.zeros((5, 28, 28), np.uint8)
    images[1:4] = np.array([50, 100, 150])[:, None, None]  # their shades tell them from each other
    split = Split(images, np.array(labels, np.uint8), NAMES)
    page = draw_mistakes(split, scores(labels, predictions, [0.99, 0.5, 0.9, 0.7, 0.99]))
    assert page.size == (COLUMNS * CELL[0], 30 + ROWS * CELL[1])
    middles = [(8 + place * CELL[0] + SIDE // 2, 30 + SIDE // 2) for place in range(4)]
    assert [page.getpixel(middle) for middle in middles] == [
        (shade,) * 3 for shade in (100, 150, 50, 255)
    ]


def test_no_mistake_at_all() -> None:
    split = Split(np.zeros((2, 28, 28), np.uint8), np.array([0, 1], np.uint8), NAMES)
    page = draw_mistakes(split, scores([0, 1], [0, 1], [0.9, 0.9]))
    assert page.crop((0, 30, *page.size)).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize(
    ("image_shape", "size"),
    [
        ((28, 28), (SIDE, SIDE)),
        ((8, 8, 1), (SIDE, SIDE)),
        ((32, 20, 3), (SIDE * 20 // 32, SIDE)),
        ((100, 300, 4), (SIDE, round(SIDE / 3))),
        ((10, 10, 7), (SIDE, SIDE)),
        ((1, 500), (SIDE, 1)),
    ],
)
def test_an_image_of_any_shape_fits_its_place(
    image_shape: tuple[int, ...], size: tuple[int, int]
) -> None:
    image = small_split(1, image_shape).images[0]
    picture = draw(image)
    assert picture.size == size
    assert np.array(picture.convert("L")).max() > 0
    page = draw_mistakes(
        Split(image[None], np.array([0], np.uint8), NAMES), scores([0], [1], [0.9])
    )
    caption = page.crop((8, 30 + SIDE + 2, 8 + SIDE, 30 + CELL[1])).convert("L")
    assert np.array(caption).min() < 100  # it can be read


def test_accuracy_of_each_class() -> None:
    split = Split(np.zeros((4, 4, 4), np.uint8), np.array([0, 0, 1, 0], np.uint8), NAMES)
    found = class_accuracies(split, scores([0, 0, 1, 0], [0, 1, 1, 0], [0.9] * 4))
    assert found == {"zero": 2 / 3, "one": 1.0}


def test_results_agree_with_each_other(finished: Project) -> None:
    accuracy = json.loads(finished.read("metrics/accuracy.json"))
    rows = list(csv.reader(finished.read("metrics/confusion.csv").decode().splitlines()))
    test = SMALL["test"]
    assert rows[0] == ["actual", "predicted"]
    assert [row[0] for row in rows[1:]] == [test.class_names[label] for label in test.labels]
    correct = sum(actual == predicted for actual, predicted in rows[1:])
    assert accuracy["accuracy"] == correct / len(test) > 0.9
    assert accuracy["accuracy_95_low"] < accuracy["accuracy"] < accuracy["accuracy_95_high"] <= 1
    wrong = [[str(n), *row] for n, row in enumerate(rows[1:]) if row[0] != row[1]]
    mistakes = list(csv.reader(finished.read("metrics/mistakes.csv").decode().splitlines()))
    assert mistakes == [["example", "actual", "predicted"], *wrong]
    classes = json.loads(finished.read("metrics/classes.json"))["accuracy_of"]
    assert list(classes) == list(test.class_names)
    assert Image.open(finished.root / "metrics/misclassified.png").size[0] == COLUMNS * CELL[0]


def occupy(project: Project) -> None:
    """Put a file where the folder of the metrics has to be."""
    for path in (project.root / "metrics").iterdir():
        path.unlink()
    (project.root / "metrics").rmdir()
    (project.root / "metrics").write_text("")


MISTAKES: list[tuple[Callable[[Project], object], str]] = [
    (
        lambda project: (project.root / "data/model.safetensors").unlink(),
        "error: data/model.safetensors: not found; make it with `dvc repro`",
    ),
    (
        lambda project: save_split(project.root / "data/test.npz", small_split(3, (9, 11, 3))),
        "error: data/test.npz: has images (9, 11, 3) and classes ant, bee, cow, but the network is"
        " for (9, 11) and ant, bee, cow; make the splits from one data set",
    ),
    (
        lambda project: save_split(project.root / "data/test.npz", SMALL["test"][:0]),
        "error: data/test.npz: has no examples; it needs some",
    ),
    (
        occupy,
        "error: metrics/accuracy.json: cannot be written (File exists); fix that and rerun",
    ),
]


@pytest.mark.parametrize(("mistake", "line"), MISTAKES)
def test_mistake(
    mistake: Callable[[Project], object],
    line: str,
    finished: Project,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(finished)
    assert error_of(stage.main, finished, monkeypatch) == line


def test_it_needs_nothing_but_its_two_files(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No params: the model file says all about the network."""
    for name in ("data/model.safetensors", "data/test.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(finished.read(name))
    monkeypatch.chdir(tmp_path)
    stage.main()
    for name in ("accuracy.json", "classes.json", "confusion.csv", "mistakes.csv"):
        assert (tmp_path / "metrics" / name).read_bytes() == finished.read(f"metrics/{name}")
