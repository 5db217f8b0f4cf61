"""`dvc repro` in temporary clones with small data."""

import ast
import csv
import importlib
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stages.shared.data import load_split, save_split
from stages.shared.dvc_lock import digest
from tests.conftest import PACKAGES, ROOT, STAGES, Project, clone, commit
from tests.faults.damage import Damage, all_damages, check_repair
from tests.faults.drill import check_kills

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
    """Return `path` and the project's files that it imports, directly or indirectly.

    Importing `stages.shared.cli` runs the `__init__.py` of `stages` and of `stages.shared`, too.
    """
    found, todo = set[Path](), {path}
    while todo:
        file = todo.pop()
        found.add(file)
        for name in modules_of(file):
            parts = name.split(".")
            for n in range(1, len(parts) + 1):
                module = ROOT.joinpath(*parts[:n])
                files = {module.with_suffix(".py"), module / "__init__.py"}
                todo |= {file for file in files - found if file.is_file()}
    return found


def module_of(stage: str) -> str:
    (module,) = re.findall(r"-m (stages\.\w+)", STAGES[stage]["cmd"])
    return str(module)


@pytest.mark.parametrize("stage", STAGES)
def test_code_deps_are_what_the_stage_imports(stage: str) -> None:
    deps = {ROOT / dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert deps == imported(ROOT / f"{module_of(stage).replace('.', '/')}.py")


def test_stages_import_only_shared_modules_and_the_model() -> None:
    """Nothing in stages/ imports a stage or a tool; in shared/ only model_file.py the model."""
    scripts = {ROOT / f"stages/{stage}.py" for stage in STAGES}
    for path in (ROOT / "stages").rglob("*.py"):
        others = imported(path) - {path}
        assert not others & scripts, path
        assert all(file.is_relative_to(ROOT / "stages") for file in others), path
        if path.parent.name == "shared" and "stages.model" in modules_of(path):
            assert path.name == "model_file.py"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_win_over_installed_ones(package: str, tmp_path: Path) -> None:
    """Mako 1.4.0, for example, installs a top-level package called tools."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    project = Project(ROOT, {"PYTHONPATH": str(tmp_path)})
    found = project.run("python", "-c", f"import {package}; print({package}.__file__)")
    assert Path(found.strip()).parent == ROOT / package


@pytest.mark.parametrize("stage", STAGES)
def test_help_is_the_docstring(stage: str, finished: Project) -> None:
    module = module_of(stage)
    docstring = importlib.import_module(module).__doc__
    assert docstring
    assert docstring.strip() in finished.run("python", "-m", module, "--help")


def test_history_has_a_row_per_epoch(finished: Project) -> None:
    history = list(csv.DictReader(finished.read("metrics/history.csv").decode().splitlines()))
    epochs = finished.params()["train"]["num_epochs"]
    assert [row["epoch"] for row in history] == [str(epoch) for epoch in range(1, epochs + 1)]
    assert float(history[-1]["validation_accuracy"]) > 0.9


def test_fresh_clone_gives_the_committed_results(finished: Project, tmp_path: Path) -> None:
    fresh = finished.clone(tmp_path / "clone")
    fresh.use_cache(finished.root / ".dvc/cache")
    assert fresh.repro() == []  # the cache has all outputs
    fresh.run("dvc", "repro", "--force")
    assert fresh.run("git", "status", "--porcelain") == ""
    assert fresh.read("data/model.safetensors") == finished.read("data/model.safetensors")


def test_earlier_learning_rate_is_restored_from_the_cache(finished: Project) -> None:
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


def test_edit_reruns_only_the_stages_that_import_the_file(finished: Project) -> None:
    with (finished.root / "stages/evaluate.py").open("a") as file:
        file.write("# a comment\n")
    assert finished.repro() == ["evaluate"]


def test_validation_split_may_be_empty(finished: Project) -> None:
    path = finished.root / "data/validation.npz"
    save_split(path, load_split(path)[:0])
    assert finished.repro() == ["train"]  # evaluate is up to date: the weights are the same
    assert finished.read("metrics/history.csv").decode().split("\n")[1].endswith(",,")
    assert "file://" in finished.run("dvc", "plots", "show")


def test_bad_param_loses_no_result(finished: Project) -> None:
    before = {name: finished.read(name) for name in RESULTS}
    finished.set(learning_rate=200)
    printed = finished.run("dvc", "repro", ok=False)
    assert re.search(r"^error: params\.yaml: train\.learning_rate is 200, ", printed, re.MULTILINE)
    assert "Traceback" not in printed
    assert "gitignore" not in finished.run("git", "status", "--porcelain")
    finished.set(learning_rate=0.1)
    assert finished.repro() == []
    assert {name: finished.read(name) for name in RESULTS} == before


def test_killed_runs_lose_nothing(finished: Project) -> None:
    counts = check_kills(finished, kills=2, seed=0)
    assert sum(count for name, count in counts.items() if name.startswith("kills in")) == 2


@contextmanager
def paused_training(project: Project) -> Iterator[subprocess.Popen[bytes]]:
    """Run `dvc repro` and pause its training after the first epoch, until the block ends."""
    project.set(num_epochs=100)
    checkpoint = project.root / "data/checkpoint.safetensors"
    command, environment = ["dvc", "repro", "--quiet"], project.environment()
    process = subprocess.Popen(command, cwd=project.root, env=environment, start_new_session=True)
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGSTOP)  # so that it cannot end before the block does
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGCONT)
    process.wait()
    assert checkpoint.exists() == (process.returncode != 0)


def test_edit_during_a_run_is_not_recorded(finished: Project) -> None:
    """DVC reads params.yaml again after the run."""
    before = finished.params()["train"]
    lock = finished.read("dvc.lock")
    with paused_training(finished) as process:
        finished.set(learning_rate=before["learning_rate"] / 2)
    assert process.returncode
    assert finished.read("dvc.lock") == lock
    finished.set(learning_rate=before["learning_rate"])
    assert re.search(r"^resumed after epoch 100,", finished.run("dvc", "repro"), re.MULTILINE)
    resumed = {name: finished.read(name) for name in RESULTS}
    finished.run("dvc", "repro", "--force")
    assert {name: finished.read(name) for name in RESULTS} == resumed


def test_killed_training_resumes(finished: Project) -> None:
    with paused_training(finished) as process:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    checkpoint = finished.read("data/checkpoint.safetensors")
    assert re.search(r"^resumed after epoch \d+,", finished.run("dvc", "repro"), re.MULTILINE)
    resumed = {name: finished.read(name) for name in RESULTS}
    assert "resumed" not in finished.run("dvc", "repro", "--force")
    assert {name: finished.read(name) for name in RESULTS} == resumed
    if sys.platform == "linux" and platform.machine() == "x86_64":
        (finished.root / "data/checkpoint.safetensors").write_bytes(checkpoint)
        other_cpu = Project(finished.root, {**finished.extra, "OPENBLAS_CORETYPE": "Nehalem"})
        assert "resumed" not in other_cpu.run("dvc", "repro", "--force")


def test_second_run_names_the_process_that_holds_the_lock(finished: Project) -> None:
    with paused_training(finished) as process:
        printed = finished.run("dvc", "repro", ok=False)
    assert re.search(rf"is busy, it is being blocked by:\s*\(PID {process.pid}\): ", printed)
    assert process.returncode == 0
    assert finished.repro() == []


def test_two_clones_may_share_a_cache(finished: Project, tmp_path: Path) -> None:
    projects = [finished.clone(tmp_path / name) for name in ("one", "two")]
    for project in projects:
        project.use_cache(finished.root / ".dvc/cache")
        project.set(learning_rate=0.2)
    runs = [
        subprocess.Popen(["dvc", "repro"], cwd=project.root, env=project.environment())
        for project in projects
    ]
    for run in runs:
        run.wait()  # DVC may fail in one, if both write the same file at the same moment
    for project in projects:
        project.repro()
    for name in RESULTS:
        assert projects[0].read(name) == projects[1].read(name) != finished.read(name)
    for path in (finished.root / ".dvc/cache/files").glob("md5/*/*"):
        assert digest(path) == path.parent.name + path.stem


@pytest.mark.parametrize(
    ("file", "location"),
    [
        ("data/model.safetensors", "workspace, times kept"),
        ("data/model.safetensors", "cache only"),
        ("metrics/accuracy.json", "workspace"),
    ],
)
def test_damaged_output_is_repaired(file: str, location: str, finished: Project) -> None:
    damage = Damage(file, "flipped", location)
    assert damage in all_damages(finished)
    check_repair(finished, damage)


def test_the_committed_lock_file_is_true(tmp_path: Path) -> None:
    project = clone(tmp_path)
    commit(project, "Start")
    lines = project.run("dvc", "repro", "--allow-missing", "--dry").splitlines()
    expected = [f"Stage '{stage}' didn't change, skipping" for stage in STAGES]
    assert [line for line in lines if "skipping" not in line or line in expected] == [
        *expected,
        "Data and pipelines are up to date.",
    ]
