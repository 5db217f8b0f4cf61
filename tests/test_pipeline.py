"""The real `dvc repro` from one end to the other, in temporary clones."""

import ast
import csv
import json
import os
import re
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import md5
from pathlib import Path

import pytest
import yaml

from stages.datasets import DATASETS
from tests.conftest import NUM_TEST, ROOT, SMALL, Mirror, Project, clone, commit, running_mirror
from tests.damage import Damage, check, damages
from tests.drill import drill

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
RESULTS = ("data/model.safetensors", "metrics/history.csv", "metrics/accuracy.json")


def imported(path: Path) -> set[Path]:
    """The file and all files of stages/ that it imports, directly or not, anywhere in its code."""
    found = {path}
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            if module and module.startswith("stages."):
                found |= imported(path.parent / f"{module.removeprefix('stages.')}.py")
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_code_deps_are_what_the_stage_imports(stage: str) -> None:
    deps = {ROOT / dep for dep in STAGES[stage]["deps"] if dep.startswith("stages/")}
    assert deps == imported(ROOT / "stages" / f"{stage}.py")


@pytest.mark.parametrize("stage", STAGES)
def test_help_is_the_docstring(stage: str, finished: Project) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / "stages" / f"{stage}.py").read_text()))
    assert docstring
    assert docstring in finished.run("python", "-m", f"stages.{stage}", "--help")


def test_results(finished: Project) -> None:
    accuracy = json.loads(finished.read("metrics/accuracy.json"))
    rows = list(csv.reader(finished.read("metrics/confusion.csv").decode().splitlines()))
    assert rows[0] == ["actual", "predicted"]
    assert len(rows) == 1 + NUM_TEST
    correct = sum(actual == predicted for actual, predicted in rows[1:])
    assert accuracy["accuracy"] == correct / NUM_TEST > 0.9
    assert accuracy["accuracy_95_low"] < accuracy["accuracy"] < accuracy["accuracy_95_high"] <= 1
    history = list(csv.DictReader(finished.read("metrics/history.csv").decode().splitlines()))
    assert [row["epoch"] for row in history] == [str(epoch) for epoch in range(1, 11)]
    assert float(history[-1]["validation_accuracy"]) > 0.9
    assert finished.run("git", "status", "--porcelain") == ""


def test_nothing_to_do(finished: Project) -> None:
    assert finished.repro() == []
    assert finished.run("git", "status", "--porcelain") == ""


def test_fresh_clone_gets_the_committed_results(finished: Project, tmp_path: Path) -> None:
    clone = finished.clone(tmp_path / "clone")
    assert clone.repro() == ["fetch", "preprocess", "train", "evaluate"]
    assert clone.run("git", "status", "--porcelain") == ""
    assert clone.read("data/model.safetensors") == finished.read("data/model.safetensors")


def test_a_learning_rate_and_back(finished: Project) -> None:
    before = {name: finished.read(name) for name in RESULTS}
    finished.edit("params.yaml", "learning_rate: 0.1", "learning_rate: 0.05")
    assert finished.repro() == ["train", "evaluate"]
    assert all(finished.read(name) != data for name, data in before.items())
    assert "train.learning_rate  0.1     0.05" in finished.run("dvc", "params", "diff")
    old = json.loads(before["metrics/accuracy.json"])["loss"]
    new = json.loads(finished.read("metrics/accuracy.json"))["loss"]
    lines = finished.run("dvc", "metrics", "diff").splitlines()
    (loss,) = [line.split() for line in lines if " loss " in line]
    assert [float(cell) for cell in loss[2:4]] == pytest.approx([old, new], rel=1e-3)

    finished.edit("params.yaml", "learning_rate: 0.05", "learning_rate: 0.1")
    assert finished.repro() == []
    assert {name: finished.read(name) for name in RESULTS} == before
    assert finished.run("git", "status", "--porcelain") == ""


def test_an_edit_reruns_no_more_than_it_must(finished: Project) -> None:
    with (finished.root / "stages/evaluate.py").open("a") as file:
        file.write("# a comment\n")
    assert finished.repro() == ["evaluate"]


def test_another_dataset_is_one_word(finished: Project) -> None:
    with running_mirror() as mirror:
        mirror.serve(SMALL["fashion-mnist"])
        project = Project(finished.root, mirror)
        project.edit("params.yaml", "dataset: mnist", "dataset: fashion-mnist")
        assert project.repro() == ["fetch", "preprocess", "train", "evaluate"]
    rows = csv.DictReader(project.read("metrics/confusion.csv").decode().splitlines())
    assert {row["actual"] for row in rows} == set(DATASETS["fashion-mnist"].class_names)
    assert json.loads(project.read("metrics/accuracy.json"))["accuracy"] > 0.9
    assert b'[\\"T-shirt/top\\", \\"Trouser\\"' in project.read("data/model.safetensors")


def test_no_validation_split(finished: Project) -> None:
    finished.edit("params.yaml", "validation_size: 100", "validation_size: 0")
    assert finished.repro() == ["preprocess", "train", "evaluate"]
    assert finished.read("metrics/history.csv").decode().split("\n")[1].endswith(",,")
    assert "file://" in finished.run("dvc", "plots", "show")


def test_a_bad_param_costs_nothing(finished: Project) -> None:
    before = {name: finished.read(name) for name in RESULTS}
    finished.edit("params.yaml", "learning_rate: 0.1", "learning_rate: 200")
    printed = finished.run("dvc", "repro", ok=False)
    assert "\nerror: params.yaml: train.learning_rate is 200, must be" in printed
    assert "Traceback" not in printed
    assert "gitignore" not in finished.run("git", "status", "--porcelain")
    finished.edit("params.yaml", "learning_rate: 200", "learning_rate: 0.1")
    assert finished.repro() == []
    assert {name: finished.read(name) for name in RESULTS} == before


def test_killed_runs_lose_nothing(finished: Project) -> None:
    hits = drill(finished, kills=2, seed=0)
    assert sum(count for hit, count in hits.items() if hit.startswith("SIG")) == 4


@contextmanager
def long_training(project: Project) -> Iterator[subprocess.Popen[bytes]]:
    """Run `dvc repro` on a training of seconds, and wait until that is on its way."""
    project.edit("params.yaml", "num_epochs: 10", "num_epochs: 120")
    checkpoint = project.root / "data/checkpoint.safetensors"
    process = subprocess.Popen(
        ["dvc", "repro", "--quiet"],
        cwd=project.root,
        env=project.environment(),
        start_new_session=True,
    )
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    yield process
    process.wait()
    assert checkpoint.exists() == (process.returncode != 0)


def test_an_interrupted_training_goes_on(finished: Project) -> None:
    with long_training(finished) as process:
        os.killpg(process.pid, signal.SIGKILL)
    assert re.search(r"^resumed after epoch \d+,", finished.run("dvc", "repro"), re.MULTILINE)
    resumed = {name: finished.read(name) for name in RESULTS}
    assert "resumed" not in finished.run("dvc", "repro", "--force", "--single-item", "train")
    finished.run("dvc", "repro", "--force", "--single-item", "evaluate")
    assert {name: finished.read(name) for name in RESULTS} == resumed


def test_a_second_run_says_who_holds_the_lock(finished: Project) -> None:
    with long_training(finished) as process:
        printed = finished.run("dvc", "repro", ok=False)
    assert re.search(rf"is busy, it is being blocked by:\s*\(PID {process.pid}\): ", printed)
    assert process.returncode == 0
    assert finished.repro() == []


def test_two_clones_share_a_cache(finished: Project, tmp_path: Path) -> None:
    projects = [finished.clone(tmp_path / name) for name in ("one", "two")]
    for project in projects:
        project.run("dvc", "cache", "dir", "--local", str(tmp_path / "cache"))
    runs = [
        subprocess.Popen(["dvc", "repro"], cwd=project.root, env=project.environment())
        for project in projects
    ]
    for run in runs:
        run.wait()  # DVC may give up in one, where both come by the same file at a time
    for project in projects:
        project.repro()
        for name in RESULTS:
            assert project.read(name) == finished.read(name)
        assert project.run("git", "status", "--porcelain") == ""
    objects = [path for path in (tmp_path / "cache/files").glob("md5/*/*") if path.is_file()]
    assert len(objects) > len(RESULTS)
    for path in objects:
        digest = md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        assert digest == path.parent.name + path.stem


@pytest.mark.parametrize("damage", list(damages())[2::13], ids=str)
def test_damage_is_refused_and_mended(damage: Damage, finished: Project) -> None:
    check(finished, damage)


def test_a_terminal_sees_a_progress_bar_and_a_log_does_not(finished: Project) -> None:
    command = ["python", "-m", "stages.fetch"]
    assert "%|" not in finished.run(*command)
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = finished.environment()
    subprocess.run(command, cwd=finished.root, env=environment, stderr=theirs, check=True)
    assert b"train-images-idx3-ubyte:" in (shown := os.read(ours, 10_000))
    assert b"%|" in shown
    os.close(ours)
    os.close(theirs)


def test_committed_lock_file_is_true(tmp_path: Path, mirror: Mirror) -> None:
    project = clone(tmp_path, mirror)
    commit(project, "Start")
    assert project.run("dvc", "repro", "--allow-missing", "--dry").splitlines() == [
        *(f"Stage '{stage}' didn't change, skipping" for stage in STAGES),
        "Data and pipelines are up to date.",
    ]
