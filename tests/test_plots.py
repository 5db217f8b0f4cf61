"""The page of `dvc plots show` in a real browser without internet access."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, Project

BROWSER = next(filter(shutil.which, ("chromium", "google-chrome", "chrome")), None)
PLOT = 'class="marks"'  # in the HTML of each plot that Vega drew


def browse(page: Path, *options: str) -> str:
    """Open `page` in a headless browser that finds no host. Return the output of the browser."""
    assert BROWSER
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    command = [BROWSER, *quiet, offline, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.skipif(not BROWSER, reason="there is no Chromium")
def test_plots_are_drawn_without_internet(finished: Project, tmp_path: Path) -> None:
    finished.run("dvc", "plots", "show")
    page = finished.root / "dvc_plots/index.html"
    assert PLOT not in browse(page, "--dump-dom")  # Vega is in .venv, which is missing
    (finished.root / ".venv").symlink_to(ROOT / ".venv")
    shown = browse(page, "--dump-dom")
    assert shown.count(PLOT) == 4
    for title in ("Loss", "Accuracy on the validation split", "misclassified.png"):
        assert title in shown
    for title in ("Confusion matrix of the test split", "Mistakes on the test split"):
        assert title in shown
    browse(page, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1300,1700")
    screenshot = np.array(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    curves = abs(screenshot - [0x94, 0x5D, 0xD6]).sum(axis=2) < 30
    assert curves[:400, :500].sum() > 200  # the loss
    assert curves[:400, 500:].sum() > 200  # the accuracy
    matrix = screenshot[400:820, :500]
    assert (matrix[..., 2] - matrix[..., 0] > 50).sum() > 5000  # its diagonal is blue
    assert (screenshot[820:] == 0).all(axis=2).sum() > 1000  # the digits are black
