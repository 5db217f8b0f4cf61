"""The real `dvc repro`, in temporary clones with small data."""

import ast
import csv
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import md5
from pathlib import Path

import pytest

from tests.conftest import ROOT, STAGES, Project, clone, commit
from tests.faults.damage import Damage, check, damages
from tests.faults.drill import drill

RESULTS = ("data/model.safetensors", "metrics/history.csv", "metrics/accuracy.json")


def modules_of(path: Path) -> set[str]:
    """Return the names of the modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imported(path: Path) -> set[Path]:
    """Return `path` and all files of this project that it imports, directly or indirectly.

    Importing `stages.shared.cli` runs the `__init__.py` of `stages` and of `stages.shared`, too.
    """
    found, todo = set(), [path]
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found.add(file)
        for name in modules_of(file):
            *packages, module = name.split(".")
            files = [
                ROOT.joinpath(*packages[:n], "__init__.py") for n in range(1, len(packages) + 1)
            ]
            files += [ROOT.joinpath(*packages, f"{module}.py")]
            files += [ROOT.joinpath(*packages, module, "__init__.py")]
            todo += [file for file in files if file.is_file()]
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_code_deps_are_what_the_stage_imports(stage: str) -> None:
    (script,) = re.findall(r"python -m (stages\.\w+)", STAGES[stage]["cmd"])
    deps = {ROOT / dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert deps == imported(ROOT / f"{script.replace('.', '/')}.py")


def test_stages_import_only_shared_modules_and_the_model() -> None:
    """Nothing in stages/ imports a stage or a tool; in shared/ only model_file.py the model."""
    scripts = {ROOT / f"stages/{stage}.py" for stage in STAGES}
    for path in (ROOT / "stages").rglob("*.py"):
        others = imported(path) - {path}
        assert not others & scripts, path
        assert all(file.is_relative_to(ROOT / "stages") for file in others), path
        if path.parent.name == "shared" and "stages.model" in modules_of(path):
            assert path.name == "model_file.py"


@pytest.mark.parametrize("stage", STAGES)
def test_help_is_the_docstring(stage: str, finished: Project) -> None:
    (script,) = re.findall(r"python -m (stages\.\w+)", STAGES[stage]["cmd"])
    docstring = ast.get_docstring(ast.parse((ROOT / f"{script.replace('.', '/')}.py").read_text()))
    assert docstring
    assert docstring in finished.run("python", "-m", script, "--help")


def test_nothing_to_do(finished: Project) -> None:
    assert finished.repro() == []
    assert finished.run("git", "status", "--porcelain") == ""


def test_history(finished: Project) -> None:
    history = list(csv.DictReader(finished.read("metrics/history.csv").decode().splitlines()))
    epochs = finished.params()["train"]["num_epochs"]
    assert [row["epoch"] for row in history] == [str(epoch) for epoch in range(1, epochs + 1)]
    assert float(history[-1]["validation_accuracy"]) > 0.9


def test_a_fresh_clone_gets_the_committed_results(finished: Project, tmp_path: Path) -> None:
    fresh = finished.clone(tmp_path / "clone")
    fresh.use_cache(finished.root / ".dvc/cache")
    assert fresh.repro() == []  # all is in the cache
    fresh.run("dvc", "repro", "--force")
    assert fresh.run("git", "status", "--porcelain") == ""
    assert fresh.read("data/model.safetensors") == finished.read("data/model.safetensors")


def test_a_learning_rate_and_back(finished: Project) -> None:
    before = {name: finished.read(name) for name in RESULTS}
    finished.set(learning_rate=0.05)
    assert finished.repro() == ["train", "evaluate"]
    assert all(finished.read(name) != data for name, data in before.items())
    assert "train.learning_rate  0.1     0.05" in finished.run("dvc", "params", "diff")
    assert "metrics/accuracy.json  loss" in finished.run("dvc", "metrics", "diff")

    finished.set(learning_rate=0.1)
    assert finished.repro() == []
    assert {name: finished.read(name) for name in RESULTS} == before
    assert finished.run("git", "status", "--porcelain") == ""


def test_an_edit_reruns_no_more_than_it_must(finished: Project) -> None:
    with (finished.root / "stages/evaluate.py").open("a") as file:
        file.write("# a comment\n")
    assert finished.repro() == ["evaluate"]


def test_no_validation_split(finished: Project) -> None:
    python = (
        "from pathlib import Path; from stages.shared.data import *; path = Path('data/validation"
        ".npz'); save_split(path, load_split(path)[:0])"
    )
    finished.run("python", "-c", python)
    assert finished.repro() == ["train"]  # with the same weights
    assert finished.read("metrics/history.csv").decode().split("\n")[1].endswith(",,")
    assert "file://" in finished.run("dvc", "plots", "show")


def test_a_bad_param_costs_nothing(finished: Project) -> None:
    before = {name: finished.read(name) for name in RESULTS}
    finished.set(learning_rate=200)
    printed = finished.run("dvc", "repro", ok=False)
    assert "\nerror: params.yaml: train.learning_rate is 200, must be" in printed
    assert "Traceback" not in printed
    assert "gitignore" not in finished.run("git", "status", "--porcelain")
    finished.set(learning_rate=0.1)
    assert finished.repro() == []
    assert {name: finished.read(name) for name in RESULTS} == before


def test_killed_runs_lose_nothing(finished: Project) -> None:
    hits = drill(finished, kills=2, seed=0)
    assert sum(count for hit, count in hits.items() if hit.startswith("kills in")) == 2


@contextmanager
def long_training(project: Project) -> Iterator[subprocess.Popen[bytes]]:
    """Run `dvc repro` on a training of seconds, and wait until that is on its way."""
    project.set(num_epochs=100)
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
    os.killpg(process.pid, signal.SIGSTOP)  # or it might end before the test has looked
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGCONT)
    process.wait()
    assert checkpoint.exists() == (process.returncode != 0)


def test_an_interrupted_training_goes_on(finished: Project) -> None:
    with long_training(finished) as process:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    checkpoint = finished.read("data/checkpoint.safetensors")
    assert re.search(r"^resumed after epoch \d+,", finished.run("dvc", "repro"), re.MULTILINE)
    resumed = {name: finished.read(name) for name in RESULTS}
    assert "resumed" not in finished.run("dvc", "repro", "--force")
    assert {name: finished.read(name) for name in RESULTS} == resumed
    if sys.platform == "linux" and platform.machine() == "x86_64":
        (finished.root / "data/checkpoint.safetensors").write_bytes(checkpoint)
        elsewhere = Project(finished.root, {**finished.extra, "OPENBLAS_CORETYPE": "Nehalem"})
        assert "resumed" not in elsewhere.run("dvc", "repro", "--force")


def test_a_second_run_says_who_holds_the_lock(finished: Project) -> None:
    with long_training(finished) as process:
        printed = finished.run("dvc", "repro", ok=False)
    assert re.search(rf"is busy, it is being blocked by:\s*\(PID {process.pid}\): ", printed)
    assert process.returncode == 0
    assert finished.repro() == []


def test_two_clones_share_a_cache(finished: Project, tmp_path: Path) -> None:
    projects = [finished.clone(tmp_path / name) for name in ("one", "two")]
    for project in projects:
        project.use_cache(finished.root / ".dvc/cache")
        project.set(learning_rate=0.2)
    runs = [
        subprocess.Popen(["dvc", "repro"], cwd=project.root, env=project.environment())
        for project in projects
    ]
    for run in runs:
        run.wait()  # DVC may give up in one, where both come by the same file at a time
    for project in projects:
        project.repro()
    for name in RESULTS:
        assert projects[0].read(name) == projects[1].read(name) != finished.read(name)
    for path in (finished.root / ".dvc/cache/files").glob("md5/*/*"):
        digest = md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        assert digest == path.parent.name + path.stem


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("data/model.safetensors", "workspace, unseen"),
        ("data/model.safetensors", "cache, and gone from the workspace"),
        ("metrics/accuracy.json", "workspace"),
    ],
)
def test_damage_is_made_good(file: str, place: str, finished: Project) -> None:
    damage = Damage(file, "flipped", place)
    assert damage in damages(finished)
    check(finished, damage)


def test_the_committed_lock_file_is_true(tmp_path: Path) -> None:
    project = clone(tmp_path)
    commit(project, "Start")
    lines = project.run("dvc", "repro", "--allow-missing", "--dry").splitlines()
    expected = [f"Stage '{stage}' didn't change, skipping" for stage in STAGES]
    assert [line for line in lines if "skipping" not in line or line in expected] == [
        *expected,
        "Data and pipelines are up to date.",
    ]
