"""What README.md claims, and the two commands it opens with."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT, Mirror, clone

README = (ROOT / "README.md").read_text()


def test_first_commands() -> None:
    assert re.findall("```sh\n(.*?)```", README, re.DOTALL)[0] == "make repro\nmake test\n"


def test_accuracy_is_the_committed_one() -> None:
    results = json.loads((ROOT / "metrics/accuracy.json").read_text())
    interval = f"{results['accuracy_95_low']} to {results['accuracy_95_high']}"
    assert results["accuracy"] >= 0.94
    assert f"accuracy of {results['accuracy']} (95% interval {interval})" in " ".join(
        README.split()
    )


def test_shown_mistake_is_what_a_stage_says(tmp_path: Path, mirror: Mirror) -> None:
    project = clone(tmp_path, mirror)
    project.edit("params.yaml", "learning_rate: 0.1", "learning_rate: 1e-1")
    (shown,) = re.findall("^error: .*\n", README, re.MULTILINE)
    assert project.run("python", "-m", "stages.train", ok=False) == shown


def test_locked_mlx_is_the_one_of_the_cuda_line() -> None:
    (version,) = re.findall(r"mlx\[cuda13\]==([0-9.]+)", README)
    assert f"\nmlx=={version} ;" in (ROOT / "requirements.txt").read_text()


@pytest.mark.parametrize("python", ["", "no-such-python", "./old-python"])
def test_no_python_that_will_do(python: str, tmp_path: Path, mirror: Mirror) -> None:
    project = clone(tmp_path, mirror)
    (tmp_path / "old-python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "old-python").chmod(0o755)
    printed = project.run("make", "repro", f"PYTHON={python}", ok=False)
    assert "error: no Python 3.11 to 3.14" in printed
    assert "install one (apt install python3 python3-venv, brew install python@3.14)" in printed
    assert not (tmp_path / ".venv").exists()
