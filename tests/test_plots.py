"""The page of `dvc plots show`, in a real browser without internet, and the picture on it."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.evaluate import CELL, COLUMNS, ROWS, class_accuracies, draw_mistakes
from stages.files import Split
from stages.model import Scores
from tests.conftest import ROOT, Project

BROWSER = next(filter(shutil.which, ("chromium", "google-chrome", "chrome")), None)
MARKS = 'class="marks"'  # a drawing by Vega
NAMES = ["zero", "one", "two"]


def browse(page: Path, *options: str) -> str:
    """Open `page` in a headless browser that finds no host; return what it prints."""
    assert BROWSER
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    command = [BROWSER, *quiet, offline, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.skipif(not BROWSER, reason="there is no Chromium")
def test_plots_draw_without_internet(finished: Project, tmp_path: Path) -> None:
    finished.run("dvc", "plots", "show")
    page = finished.root / "dvc_plots/index.html"
    assert MARKS not in browse(page, "--dump-dom")  # no scripts, no drawing
    (finished.root / ".venv").symlink_to(ROOT / ".venv")
    shown = browse(page, "--dump-dom")
    assert shown.count(MARKS) == 3
    for title in ("Loss", "Accuracy on the validation split", "Confusion matrix of the test split"):
        assert title in shown
    assert "misclassified.png" in shown
    browse(page, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1300,1700")
    screenshot = np.array(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    curves = abs(screenshot - [0x94, 0x5D, 0xD6]).sum(axis=2) < 30
    assert curves[:400, :500].sum() > 200  # of the losses
    assert curves[:400, 500:].sum() > 200  # of the accuracy
    matrix = screenshot[400:820, :500]
    assert (matrix[..., 2] - matrix[..., 0] > 50).sum() > 5000  # its diagonal is blue
    assert (screenshot[820:] == 0).all(axis=2).sum() > 1000  # the digits are black


def scores(labels: list[int], predictions: list[int], confidences: list[float]) -> Scores:
    correct = np.array(labels) == np.array(predictions)
    return Scores(0.5, np.array(predictions, np.uint8), np.array(confidences, np.float32), correct)


def test_the_worst_mistakes_come_first() -> None:
    labels, predictions = [0, 1, 2, 0, 1], [0, 2, 0, 1, 1]
    images = np.zeros((5, 784), np.uint8)
    images[1:4] = np.array([[50], [100], [150]])  # their shades tell them from each other
    split = Split(images, np.array(labels, np.uint8))
    picture = draw_mistakes(split, scores(labels, predictions, [1, 0.5, 0.9, 0.7, 1]), NAMES)
    assert picture.size == (COLUMNS * CELL[0], 30 + ROWS * CELL[1])
    shades = [picture.getpixel((8 + place * CELL[0] + 56, 30 + 56)) for place in range(4)]
    assert shades == [255 - 100, 255 - 150, 255 - 50, 255]


def test_no_mistake_at_all() -> None:
    split = Split(np.zeros((2, 784), np.uint8), np.array([0, 1], np.uint8))
    picture = draw_mistakes(split, scores([0, 1], [0, 1], [1, 1]), NAMES)
    assert picture.crop((0, 30, *picture.size)).getextrema() == (255, 255)


def test_accuracy_of_each_class() -> None:
    split = Split(np.zeros((4, 4), np.uint8), np.array([0, 0, 1, 0], np.uint8))
    found = class_accuracies(split, scores([0, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]), NAMES)
    assert found == {"zero": 2 / 3, "one": 1.0}
