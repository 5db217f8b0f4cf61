"""What README.md claims, and every command it shows."""

import json
import platform
import re
from pathlib import Path

import pytest
import yaml

from stages.params import read_params
from stages.train import TrainParams
from tests.conftest import ROOT, Mirror, Project, clone, commit

README = (ROOT / "README.md").read_text()
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
# Elsewhere the last bits, and so the figures, are others.
SAME_BITS = (platform.system(), platform.machine()) == ("Linux", "x86_64")


def test_first_commands() -> None:
    assert re.findall("```sh\n(.*?)```", README, re.DOTALL)[0] == "make repro\nmake test\n"


def test_accuracy_is_the_committed_one() -> None:
    results = json.loads((ROOT / "metrics/accuracy.json").read_text())
    interval = f"{results['accuracy_95_low']} to {results['accuracy_95_high']}"
    assert results["accuracy"] >= 0.94
    assert f"accuracy of {results['accuracy']} (95% interval {interval})" in " ".join(
        README.split()
    )


def test_model_card() -> None:
    card = " ".join(README.partition("### Model card")[2].partition("\n## ")[0].split())
    results = json.loads((ROOT / "metrics/accuracy.json").read_text())
    classes = json.loads((ROOT / "metrics/classes.json").read_text())["accuracy_of"]
    train, validation_size = PARAMS["train"], PARAMS["preprocess"]["validation_size"]
    sizes = "-".join(["784", *[str(train["hidden_dim"])] * train["num_layers"], "10"])
    worst = min(classes, key=classes.get)
    assert f"a multi-layer perceptron, {sizes} with ReLU" in card
    assert f"{60_000 - validation_size:,} to train, {validation_size:,} to validate" in card
    assert f"{train['num_epochs']} epochs of SGD at {train['learning_rate']} on" in card
    assert f"minibatches of {train['batch_size']}, all in" in card
    assert f"{results['accuracy']} on the test split" in card
    assert f"the worst class is {worst} with {classes[worst]}" in card


def test_ladder_climbs_by_params_that_exist(tmp_path: Path) -> None:
    ladder = README.partition("### How good can it be?\n")[2].partition("\n## ")[0]
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    rungs = re.findall("^dvc exp run (.*)$", ladder, re.MULTILINE)
    for rung in rungs:
        for name, value in re.findall(r"-S train\.(\w+)=(\S+)", rung):
            assert name in params["train"]
            params["train"][name] = yaml.safe_load(value)
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
        read_params("train", TrainParams, tmp_path / "params.yaml")
    assert len(re.findall(r"\| 0\.\d+ ± 0\.\d+ \| \d+(\.\d)? s \|", ladder)) == len(rungs) + 1


def shown_sessions(section: str) -> list[tuple[str, str]]:
    """The commands that a section of the README shows, each with its output."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = "".join(re.findall("```console\n(.*?)```", text, re.DOTALL))
    return re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", blocks, re.MULTILINE)


def lines(output: str) -> list[str]:
    """The lines of `output`, without progress bars, empty ones and spaces that only align."""
    found = [" ".join(line.rpartition("\r")[2].split()) for line in output.splitlines()]
    return [line for line in found if line]


def pattern(line: str) -> str:
    """A regular expression for a line that is shown; "..." in it stands for anything."""
    literal = re.escape(line).replace(r"\.\.\.", ".*")
    return literal if SAME_BITS else re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", literal)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A clone in which `dvc repro` has run on the real data."""
    if not (ROOT / "data/raw").is_dir():
        pytest.skip("this needs the data of `make repro`")
    project = clone(tmp_path_factory.mktemp("walk"), Mirror(str(ROOT / "data/raw")))
    commit(project, "Start")
    project.repro()
    if not SAME_BITS:
        commit(project, "Run")
    return project


def walk(project: Project, section: str) -> None:
    """Run what a section shows, and find all its lines; only "..." allows more of them.

    They may come in another order, as `dvc metrics diff` takes the files in any.
    """
    for command, output in shown_sessions(section):
        printed = lines(project.run("bash", "-c", command))
        shown = lines(output)
        for line in shown:
            if line != "...":
                assert any(re.fullmatch(pattern(line), found) for found in printed), (line, printed)
        assert "..." in shown or len(printed) == len(shown), printed
        if command.startswith("dvc queue start"):
            project.wait_for_queue()


def test_daily_use(walked: Project) -> None:
    assert len(shown_sessions("Daily use")) == 3
    walked.edit("params.yaml", "learning_rate: 0.1", "learning_rate: 0.2")
    walk(walked, "Daily use")
    walked.edit("params.yaml", "learning_rate: 0.2", "learning_rate: 0.1")
    assert walked.repro() == []
    assert walked.run("git", "status", "--porcelain") == ""


def test_experiments(walked: Project) -> None:
    assert len(shown_sessions("Experiments")) > 10
    walk(walked, "Experiments")
    assert walked.run("git", "status", "--porcelain") == ""
    comments = re.findall("#.*", walked.read("params.yaml").decode())
    assert comments == re.findall("#.*", (ROOT / "params.yaml").read_text())


def test_shown_mistake_is_what_a_stage_says(tmp_path: Path, mirror: Mirror) -> None:
    project = clone(tmp_path, mirror)
    project.edit("params.yaml", "hidden_dim: 32", "hiden_dim: 32")
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
