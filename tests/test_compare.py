"""`tools.compare` in clones: the last line of `make repro`, and two models."""

import csv
import json
import re
import shutil
from typing import Any

import mlx.core as mx
import pytest
from dvc.utils.serialize import modify_yaml
from mlx.utils import tree_map

from stages.shared.data import save_split
from stages.shared.model_file import load_model, save_model
from tests.conftest import ROOT, SMALL, Project, commit, small_split
from tools.significance import mcnemar_p

REPRODUCED = "reproduced: bitwise identical to the committed run"


def last_run(project: Project) -> str:
    return project.run("python", "-m", "tools.compare", "--last-run").rstrip("\n")


def compare(project: Project, *arguments: str, ok: bool = True) -> str:
    return project.run("python", "-m", "tools.compare", *arguments, ok=ok)


def error_of(project: Project, *arguments: str) -> str:
    line = compare(project, *arguments, ok=False)
    assert re.fullmatch("error: .+\n", line)
    return line


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
    assert last_run(finished) == REPRODUCED
    with (finished.root / "stages/evaluate.py").open("a") as file:
        file.write("# a comment\n")
    finished.repro()
    assert last_run(finished) == REPRODUCED


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
    assert last_run(finished) == line
    finished.run("git", "rm", "--quiet", "--cached", "metrics/mistakes.csv")
    finished.run("git", "commit", "--quiet", "--message=Forget the mistakes")
    assert last_run(finished) == re.sub(r" \d+ predictions.*?;", "", line)


def test_changed_params_are_listed(finished: Project) -> None:
    old, params = accuracy(finished), finished.params()["train"]
    finished.set(num_epochs=1, momentum=0.5)
    finished.repro()
    assert last_run(finished) == (
        f"changed params: train.num_epochs {params['num_epochs']} -> 1, train.momentum"
        f" {params['momentum']} -> 0.5; {accuracy_change(old, accuracy(finished))}"
    )
    commit(finished, "Train less")
    assert last_run(finished) == REPRODUCED


def test_changed_code_is_listed(finished: Project) -> None:
    with (finished.root / "stages/shared/metrics.py").open("a") as file:
        file.write("_normalize = normalize\ndef normalize(images): return _normalize(images) / 2\n")
    finished.repro()
    line = last_run(finished)
    assert line.startswith("changed code or data: stages/shared/metrics.py; accuracy ")


def test_there_may_be_no_committed_run(finished: Project) -> None:
    finished.run("git", "rm", "--quiet", "--cached", "dvc.lock")
    finished.run("git", "commit", "--quiet", "--message=Forget the run")
    assert last_run(finished) == "no committed run to compare with"


def test_make_repro_verifies_runs_and_compares() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^repro:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    commands = re.compile(r"dvc repro|tools\.\w+(?: --[\w-]+)?")
    assert [commands.findall(line) for line in recipe.splitlines()] == [
        ["tools.verify"],
        ["dvc repro", "tools.verify --disk-space"],
        ["tools.compare --last-run"],
    ]


def test_new_stage_is_named_and_not_compared(finished: Project) -> None:
    with modify_yaml(finished.root / "dvc.yaml") as pipeline:
        command = "cp metrics/accuracy.json metrics/copy-${item}.json"
        stage = {"cmd": command, "params": ["train"], "outs": ["metrics/copy-${item}.json"]}
        pipeline["stages"]["copy"] = {"matrix": {"number": [1, 2]}, **stage}
    with_matrix = (finished.root / "dvc.yaml").read_text().replace("{item}", "{item.number}")
    (finished.root / "dvc.yaml").write_text(with_matrix)
    finished.repro()
    line = last_run(finished)
    assert line.startswith(REPRODUCED)
    assert line.endswith("copy@1, copy@2")
    commit(finished, "Add a stage")
    assert last_run(finished) == REPRODUCED


def test_git_that_refuses_the_repository_is_an_error(finished: Project) -> None:
    """Git does so, for example, if another user owns the folder."""
    refusing = finished.with_variables(GIT_TEST_ASSUME_DIFFERENT_OWNER="1")
    assert "dubious ownership" in error_of(refusing, "--last-run")


def test_two_models_are_compared_by_their_predictions(finished: Project) -> None:
    old_accuracy = accuracy(finished)
    old = wrong_examples(finished)
    finished.set(num_epochs=1)
    finished.repro()
    new = wrong_examples(finished)
    assert new - old
    finished.run("dvc", "gc", "--workspace", "--force")  # it needs no data
    counts = {"became_right": len(old - new), "became_wrong": len(new - old)}
    report = json.loads(compare(finished, "--json"))
    assert report["names"] == ["HEAD", "workspace"]
    assert report["params"] == {"train.num_epochs": [5, 1]}
    assert report["accuracies"] == [old_accuracy, accuracy(finished)]
    assert report["examples"] == len(SMALL["test"])
    assert {name: report[name] for name in counts} == counts
    assert report["p"] == mcnemar_p(*counts.values())
    text, markdown = compare(finished), compare(finished, "--md")
    for number in (*counts.values(), f"{old_accuracy:.4f}", f"{report['p']:.2g}"):
        assert str(number) in text
        assert str(number) in markdown
    assert re.search(r"^\| train.num_epochs +\| 5 +\| 1 +\|$", markdown, re.MULTILINE)

    commit(finished, "Train less")
    assert "compare HEAD~1`" in compare(finished)  # HEAD and the workspace are the same now
    assert json.loads(compare(finished, "HEAD~1", "--json"))["became_right"] == len(old - new)
    backwards = json.loads(compare(finished, "HEAD", "HEAD~1", "--json"))
    assert backwards["became_right"] == len(new - old)


def wrong_examples(project: Project) -> set[str]:
    rows = csv.DictReader(project.read("metrics/mistakes.csv").decode().splitlines())
    return {row["example"] for row in rows}


def test_experiments_branches_and_tags_are_revisions(finished: Project) -> None:
    finished.run("dvc", "exp", "run", "--quiet", "--name=short", "-S", "train.num_epochs=1")
    finished.run("git", "checkout", "--quiet", ".")
    finished.run("git", "tag", "first")
    for names in (("first", "short"), ("main", "short"), ("HEAD", "short")):
        assert json.loads(compare(finished, *names, "--json"))["names"] == list(names)
    assert "train.num_epochs" in compare(finished, "main", "short")


def test_params_edited_after_the_last_run_are_an_error(finished: Project) -> None:
    text = finished.read("params.yaml").decode()
    number = finished.params()["train"]["learning_rate"]
    finished.append("params.yaml", "\tbroken")
    assert "params.yaml: " in error_of(finished)
    (finished.root / "params.yaml").write_text(
        re.sub(r"learning_rate: \S+", f"learning_rate: {number * 10}e-1", text)
    )
    assert "same params" in compare(finished)  # the same value in another form
    finished.set(num_epochs=1)
    assert "train.num_epochs is 1" in error_of(finished)
    assert "`dvc repro`" in error_of(finished, "HEAD", "workspace")
    assert json.loads(compare(finished, "HEAD", "HEAD", "--json"))["params"] == {}


def test_revision_that_cannot_be_compared_is_one_line(finished: Project) -> None:
    assert "none-such: unknown revision" in error_of(finished, "none-such")
    assert "HEAD~9: unknown revision" in error_of(finished, "HEAD~9")
    assert "--metric f1: " in error_of(finished, "--metric", "f1")
    metrics = json.loads(finished.read("metrics/accuracy.json"))

    def write(**changes: Any) -> None:
        text = json.dumps({**metrics, **changes})
        (finished.root / "metrics/accuracy.json").write_text(text)

    write(examples=metrics["examples"] + 1)
    assert f"{metrics['examples'] + 1} examples" in error_of(finished)
    write(accuracy_of={"dog": 1.0})
    assert "classes" in error_of(finished)
    for text in ("{", "[]", '{"accuracy": "high"}', '{"accuracy_of": 1}'):
        (finished.root / "metrics/accuracy.json").write_text(text)
        assert "workspace: metrics/accuracy.json" in error_of(finished)
    finished.run("git", "checkout", "--quiet", "metrics")
    (finished.root / "metrics/mistakes.csv").write_bytes(b"\x00\xff,\n\xff")
    assert "workspace: " in error_of(finished)
    (finished.root / "metrics/mistakes.csv").unlink()
    assert "workspace: has no accuracy" in error_of(finished)


def test_another_test_split_of_the_same_size_is_noted(finished: Project) -> None:
    count = len(SMALL["test"])
    save_split(finished.root / "data/test.npz", small_split(count, seed=9))
    finished.run("dvc", "commit", "--force", "data/test.npz.dvc")
    finished.repro()
    assert re.search("^note: data/test.npz", compare(finished), re.MULTILINE)
    assert last_run(finished) == "changed code or data: data/test.npz"  # not the accuracies
