"""The last line of `make repro`, in clones for each of its forms."""

import csv
import json
import re
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from stages.shared.model_file import load_model, save_model
from tests.conftest import ROOT, Project, commit

REPRODUCED = "reproduced: bitwise identical to the committed run"


def output_of(project: Project) -> str:
    return project.run("python", "-m", "tools.compare").rstrip("\n")


def predictions(project: Project) -> list[str]:
    text = project.read("metrics/confusion.csv").decode()
    return [row["predicted"] for row in csv.DictReader(text.splitlines())]


def accuracy(project: Project) -> float:
    return float(json.loads(project.read("metrics/accuracy.json"))["accuracy"])


def accuracy_change(old: float, new: float) -> str:
    return f"accuracy {old:.4f} -> {new:.4f} ({new - old:+.4f})"


def add_noise(project: Project, scale: float) -> None:
    """Change the weights that train gave, as another kind of CPU would, and run the rest."""
    path = project.root / "data/model.safetensors"
    model, metadata = load_model(path)

    def noisy(array: mx.array) -> mx.array:
        return array + scale * mx.random.normal(array.shape, key=mx.random.key(0))

    model.update(tree_map(noisy, model.parameters()))
    path.unlink()
    save_model(path, model, metadata)
    project.run("dvc", "commit", "--force", "train")
    project.repro()


def test_same_outputs_are_reproduced(finished: Project) -> None:
    assert output_of(finished) == REPRODUCED
    with (finished.root / "stages/evaluate.py").open("a") as file:
        file.write("# a comment\n")
    finished.repro()
    assert output_of(finished) == REPRODUCED


@pytest.mark.parametrize("scale", [0.2, 1e-7])
def test_changed_predictions_are_counted(scale: float, finished: Project) -> None:
    """Other last bits change no prediction. Neither the cache nor the old results are needed."""
    old_predictions, old = predictions(finished), accuracy(finished)
    add_noise(finished, scale)
    changed = sum(a != b for a, b in zip(old_predictions, predictions(finished), strict=True))
    assert bool(changed) == (scale == 0.2)
    line = (
        "not bitwise identical to the committed run;"
        f" {changed} predictions on the test split differ;"
        f" {accuracy_change(old, accuracy(finished))}"
    )
    shutil.rmtree(finished.root / ".dvc/cache")
    assert output_of(finished) == line
    finished.run("git", "rm", "--quiet", "--cached", "metrics/mistakes.csv")
    finished.run("git", "commit", "--quiet", "--message=Forget the mistakes")
    assert output_of(finished) == re.sub(r" \d+ predictions.*?;", "", line)


def test_changed_params_are_listed(finished: Project) -> None:
    old, params = accuracy(finished), finished.params()["train"]
    finished.set(num_epochs=1, momentum=0.5)
    finished.repro()
    assert output_of(finished) == (
        f"changed params: train.num_epochs {params['num_epochs']} -> 1, train.momentum"
        f" {params['momentum']} -> 0.5; {accuracy_change(old, accuracy(finished))}"
    )
    commit(finished, "Train less")
    assert output_of(finished) == REPRODUCED


def test_changed_code_is_listed(finished: Project) -> None:
    with (finished.root / "stages/shared/metrics.py").open("a") as file:
        file.write("_normalize = normalize\ndef normalize(images): return _normalize(images) / 2\n")
    finished.repro()
    line = output_of(finished)
    assert line.startswith("changed code or data: stages/shared/metrics.py; accuracy ")


def test_there_may_be_no_committed_run(finished: Project) -> None:
    finished.run("git", "rm", "--quiet", "--cached", "dvc.lock")
    finished.run("git", "commit", "--quiet", "--message=Forget the run")
    assert output_of(finished) == "no committed run to compare with"


def test_make_repro_verifies_runs_and_compares() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^repro:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    commands = re.compile(r"dvc repro|tools\.\w+(?: --[\w-]+)?")
    assert [commands.findall(line) for line in recipe.splitlines()] == [
        ["tools.verify"],
        ["dvc repro", "tools.verify --disk-space"],
        ["tools.compare"],
    ]
