"""The pictures of the documents: they show the committed results, and can show any others."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import draw
import numpy as np
import pytest
from msgspec.structs import asdict, replace
from PIL import Image

from stages.shared.errors import UserError
from tests.conftest import ROOT, SMALL, Project, small_split, stale
from tests.docs.pages import DOCS, check_states, section

NUMBER = r"-?\d+(?:\.\d+)?"
Row = dict[str, str]


def texts(svg: bytes) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.text]


def pixels(png: bytes) -> Any:
    return np.array(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def shapes(svg: bytes) -> str:
    """Return the tags and attributes of all elements."""
    elements = ElementTree.fromstring(svg).iter()
    return "\n".join(f"{element.tag} {sorted(element.items())}" for element in elements)


def same(picture: bytes, other: bytes) -> bool:
    """Return whether two pictures have nearly the same pixels, or texts, shapes and coordinates."""
    if not picture.startswith(b"<svg"):
        first, second = pixels(picture), pixels(other)
        return first.shape == second.shape and bool((abs(first - second) < 4).all())
    first, second = shapes(picture), shapes(other)
    if re.sub(NUMBER, "0", first) != re.sub(NUMBER, "0", second) or texts(picture) != texts(other):
        return False
    coordinates, others = (np.array(re.findall(NUMBER, text), float) for text in (first, second))
    return bool((abs(coordinates - others) < 0.015).all())  # pixels, cut after two decimals


@pytest.mark.parametrize("name", draw.PICTURES)
def test_picture_shows_the_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for path in draw.PICTURES[name][1]:
        if not Path(path).exists():
            pytest.skip(f"{path} is not there; `make repro` makes it")
    committed = Path("docs/pictures", name).read_bytes()
    assert len(committed) <= draw.MAX_BYTES
    if not same(draw.draw(name), committed):
        stale(f"docs/pictures/{name} shows other results; run `make docs`")


def test_page_has_the_graph_of_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = Path(draw.PAGE).read_text()
    assert "\n```mermaid\nflowchart " in page
    if draw.with_graph(page) != page:
        stale(f"{draw.PAGE} shows another graph; run `make docs`")


def test_ladder_is_the_table_of_the_page() -> None:
    page = (ROOT / "docs/experiments.md").read_text()
    with (ROOT / "docs/ladder.csv").open(newline="") as file:
        rungs = list(csv.DictReader(file))
    for rung in rungs[1:]:
        assert f"\ndvc exp run {rung['params']}\n" in page
    assert re.findall(r"^\| .* s \| .*$", page, re.MULTILINE) == [
        "| {name} | {validation_accuracy} ± {validation_deviation}"
        " | {test_accuracy} ± {test_deviation} | {seconds} s"
        " | {fashion_accuracy} ± {fashion_deviation} |".format_map(rung)
        for rung in rungs
    ]


def history(epochs: int, validated: bool = True, **last: str) -> list[Row]:
    """Return the history of a training, with the values `last` in its last epoch."""
    validation = {"validation_loss": "0.5", "validation_accuracy": "0.75"}
    if not validated:
        validation = dict.fromkeys(validation, "")
    rows = [
        {"epoch": str(epoch), "train_loss": f"{1 / epoch:.6g}", **validation}
        for epoch in range(1, epochs + 1)
    ]
    return [*rows[:-1], rows[-1] | last]


def confusion(pairs: list[tuple[int, int]], accuracy: float = 0.5) -> bytes:
    rows = [{"actual": f"class {a}", "predicted": f"class {p}"} for a, p in pairs]
    of_class = {f"class {label}": 0.5 for label in sorted({actual for actual, _ in pairs})}
    interval = {"accuracy_95_low": 0.4, "accuracy_95_high": 0.6}
    return draw.draw_confusion(rows, {"accuracy": accuracy, **interval, "accuracy_of": of_class})


def test_curves_depend_on_all_metrics() -> None:
    curves = draw.draw_curves(history(10))
    assert same(curves, draw.draw_curves(history(10)))
    assert not same(curves, draw.draw_curves(history(10, validation_accuracy="0.7501")))
    assert not same(curves, draw.draw_curves([*history(5, train_loss="0.202"), *history(10)[5:]]))
    assert not same(curves, draw.draw_curves(history(11)))
    assert not same(curves, draw.draw_curves(history(10, validated=False)))


def test_confusion_depends_on_all_predictions() -> None:
    pairs = [(0, 0), (0, 1), (1, 1), (1, 1)]
    matrix = confusion(pairs)
    assert same(matrix, confusion(pairs))
    assert not same(matrix, confusion(pairs, accuracy=0.5001))
    assert not same(matrix, confusion([*pairs, (1, 1)]))
    assert not same(matrix, confusion([*pairs[:-1], (1, 0)]))


def test_ladder_depends_on_all_numbers() -> None:
    low = {"name": "a", "test_accuracy": "0.95", "test_deviation": "0.0020", "seconds": "4.5"}
    high = {"name": "b", "test_accuracy": "0.99", "test_deviation": "0.0010", "seconds": "126"}
    ladder = draw.draw_ladder([low, high])
    assert same(ladder, draw.draw_ladder([low, high]))
    for change in ({"name": "c"}, {"test_deviation": "0.0021"}, {"seconds": "4.6"}):
        assert not same(ladder, draw.draw_ladder([low | change, high]))


def test_png_depends_on_small_differences() -> None:
    page = Image.new("RGB", (1208, 670), "white")
    before = draw.to_png(page)
    page.paste("black", (8, 30, 12, 34))  # a pixel of an image of 28 x 28
    assert same(before, before)
    assert not same(before, draw.to_png(page))


def test_distortions_depend_on_the_params(monkeypatch: pytest.MonkeyPatch) -> None:
    train = small_split(50, (28, 28))
    before = draw.draw_distorted(train)
    assert same(before, draw.draw_distorted(train))
    monkeypatch.setattr(draw, "DISTORTIONS", replace(draw.DISTORTIONS, elastic=1.1))
    assert not same(before, draw.draw_distorted(train))


def test_distortions_are_those_of_the_page() -> None:
    distortions = [f"{name}: {value}" for name, value in asdict(draw.DISTORTIONS).items()]
    check_states(section(DOCS / "experiments.md", "What the network sees"), *distortions)


@pytest.mark.parametrize("image_shape", [(28, 28), (9, 40, 1), (6, 4, 2), (32, 20, 3), (9, 9, 4)])
def test_distortions_of_any_images(image_shape: tuple[int, ...]) -> None:
    png = draw.draw_distorted(small_split(50, image_shape))
    assert len(png) <= draw.MAX_BYTES
    rows, columns = image_shape[:2]
    assert pixels(png).shape[:2] == (2 * (3 * (rows + 2) - 2), 2 * (9 * (columns + 2) - 2))


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("epochs", [1, 2, 10_000])
def test_curves_of_any_training(epochs: int, validated: bool) -> None:
    svg = draw.draw_curves(history(epochs, validated))
    assert len(svg) <= draw.MAX_BYTES
    assert f"train {1 / epochs:.4f}" in texts(svg)
    assert ("validation 0.7500" in texts(svg)) == validated
    assert f"{epochs:,}" in texts(svg)  # on the axis
    assert b"NaN" not in svg


@pytest.mark.parametrize(
    "num_classes", [2, draw.MAX_CLASSES_WITH_COUNTS, draw.MAX_CLASSES_WITH_COUNTS + 1, 30, 256]
)
def test_confusion_of_any_classes(num_classes: int) -> None:
    count = 20_000  # half of them correct, the others random
    labels = np.random.default_rng(0).integers(0, num_classes, (count, 2))
    labels[: count // 2, 1] = labels[: count // 2, 0]
    svg = confusion([(actual, predicted) for actual, predicted in labels.tolist()])
    assert len(svg) <= draw.MAX_BYTES
    counts = [int(text) for text in texts(svg) if text.isdigit()]
    assert sum(counts) == (count if num_classes <= draw.MAX_CLASSES_WITH_COUNTS else 0)
    assert texts(svg).count("class 0") == 2  # one on each axis


def test_confusion_shows_classes_without_examples() -> None:
    svg = confusion([(0, 1), (0, 0)])
    assert texts(svg).count("class 1") == 2  # one on each axis
    assert "NaN" not in svg.decode()


def test_png_of_photographs_is_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (670, 1208, 3), np.uint8)
    assert len(draw.to_png(Image.fromarray(noise))) <= draw.MAX_BYTES


def test_script_draws_other_results(finished: Project) -> None:
    page = finished.read(draw.PAGE)
    Project(finished.root, {"PYTHONPATH": "."}).run("python", "docs/pictures/draw.py")
    shown = texts(finished.read("docs/pictures/confusion.svg"))
    accuracy = json.loads(finished.read("metrics/accuracy.json"))["accuracy"]
    test = SMALL["test"]
    assert f"Accuracy {accuracy:.4f}" in shown
    assert set(test.class_names) <= set(shown)
    assert sum(int(text) for text in shown if text.isdigit()) == len(test)
    assert len(pixels(finished.read("docs/pictures/mistakes.png")))
    assert finished.read(draw.PAGE) != page
    assert '["train"]' in finished.read(draw.PAGE).decode()


def test_missing_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^metrics/history\.csv: not found; .*`make repro`"):
        draw.draw("curves.svg")
