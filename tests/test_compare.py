"""The line after `make repro`, in clones where it says each of what it can say."""

import csv
import json
import re
import shutil

import mlx.core as mx
from mlx.utils import tree_map

from stages.shared.model_file import load_model, save_model
from tests.conftest import ROOT, Project, commit
from tools.compare import changes


def verdict(project: Project) -> str:
    return project.run("python", "-m", "tools.compare").rstrip("\n")


def predicted(project: Project) -> list[str]:
    text = project.read("metrics/confusion.csv").decode()
    return [row["predicted"] for row in csv.DictReader(text.splitlines())]


def accuracy(project: Project) -> float:
    return float(json.loads(project.read("metrics/accuracy.json"))["accuracy"])


def other_bits(project: Project, noise: float) -> None:
    """Let train have given other weights, as on another kind of CPU; run the rest."""
    path = project.root / "data/model.safetensors"
    model, metadata = load_model(path)
    model.update(
        tree_map(
            lambda array: array + noise * mx.random.normal(array.shape, key=mx.random.key(0)),
            model.parameters(),
        )
    )
    path.unlink()
    save_model(path, model, metadata)
    project.run("dvc", "commit", "--force", "train")
    project.repro()


def test_the_same_bits(finished: Project) -> None:
    assert verdict(finished) == "reproduced: the same bits as the committed run"
    with (finished.root / "stages/evaluate.py").open("a") as file:
        file.write("# a comment\n")
    finished.repro()
    assert verdict(finished) == "reproduced: the same bits as the committed run"


def test_other_bits(finished: Project) -> None:
    """It says how many predictions differ, and needs neither the cache nor the old results."""
    before, old = predicted(finished), accuracy(finished)
    other_bits(finished, 0.2)
    after, new = predicted(finished), accuracy(finished)
    others = sum(a != b for a, b in zip(before, after, strict=True))
    assert others
    line = (
        f"other bits than the committed run; the same predictions on all but {others} of the test"
        f" examples; accuracy {old:.4f} -> {new:.4f} ({new - old:+.4f})"
    )
    shutil.rmtree(finished.root / ".dvc/cache")
    assert verdict(finished) == line
    finished.run("git", "rm", "--quiet", "--cached", "metrics/mistakes.csv")
    finished.run("git", "commit", "--quiet", "--message=Forget")
    assert verdict(finished) == re.sub("; the same.*?;", ";", line)


def test_the_last_bits_alone(finished: Project) -> None:
    other_bits(finished, 1e-7)
    figure = f"{accuracy(finished):.4f}"
    assert verdict(finished) == (
        "other bits than the committed run; the same predictions on all but 0 of the test"
        f" examples; accuracy {figure} -> {figure} (+0.0000)"
    )


def test_a_changed_experiment(finished: Project) -> None:
    old, params = accuracy(finished), finished.params()["train"]
    finished.set(num_epochs=1, momentum=0.5)
    finished.repro()
    new = accuracy(finished)
    line = verdict(finished)
    assert line == (
        f"a changed experiment: train.num_epochs {params['num_epochs']} -> 1, train.momentum"
        f" {params['momentum']} -> 0.5; accuracy {old:.4f} -> {new:.4f} ({new - old:+.4f})"
    )
    commit(finished, "Keep it")
    assert verdict(finished) == "reproduced: the same bits as the committed run"


def test_changed_code(finished: Project) -> None:
    path = finished.root / "stages/train.py"
    seed = "mx.random.seed(params.seed)"
    assert seed in path.read_text()
    path.write_text(path.read_text().replace(seed, "mx.random.seed(params.seed + 1)"))
    finished.repro()
    assert verdict(finished).startswith("changed code or data: stages/train.py; accuracy ")


def test_nothing_to_compare_with(finished: Project) -> None:
    finished.run("git", "rm", "--quiet", "--cached", "dvc.lock")
    finished.run("git", "commit", "--quiet", "--message=Forget")
    assert verdict(finished) == "no committed run to compare this one with"


def test_it_comes_after_dvc_repro() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^repro .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert [re.findall("dvc repro|tools.[a-z]+", line) for line in recipe.splitlines()] == [
        ["tools.verify"],
        ["dvc repro", "tools.room"],
        ["tools.compare"],
    ]


def test_a_name_with_a_space_is_named_whole() -> None:
    assert list(changes({"data/my letters": "abc"}, {"data/my letters": "def"})) == [
        "data/my letters"
    ]
