"""Small splits of made-up data, and temporary clones of the project that train on them."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import yaml
from dvc.utils.serialize import modify_yaml
from hypothesis import settings

from stages.shared import cli
from stages.shared.data import Split, save_split
from stages.shared.openblas import load_openblas

load_openblas(1)  # as the stages do

# The same cases each time, whatever failed before, on however slow a machine; CASES says how many.
settings.register_profile(
    "project",
    max_examples=int(os.environ.get("CASES", "100")),
    derandomize=True,
    database=None,
    deadline=None,
)
settings.load_profile("project")

ROOT = Path(__file__).parent.parent
STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
GIT_IDENTITY = {
    "GIT_AUTHOR_NAME": "Test",
    "GIT_AUTHOR_EMAIL": "test@localhost",
    "GIT_COMMITTER_NAME": "Test",
    "GIT_COMMITTER_EMAIL": "test@localhost",
}


def small_split(
    count: int,
    image_shape: tuple[int, ...] = (9, 11),
    class_names: tuple[str, ...] = ("ant", "bee", "cow"),
    seed: int = 0,
) -> Split:
    """A noisy pattern for each class, quickly learned, and a few wrong labels."""
    patterns = np.random.default_rng(0).integers(0, 200, (len(class_names), *image_shape))
    random = np.random.default_rng((1, seed))
    labels = random.integers(0, len(class_names), count).astype(np.uint8)
    images = patterns[labels] + random.integers(0, 56, (count, *image_shape))
    labels[::25] = 0
    return Split(images.astype(np.uint8), labels, class_names)


SMALL = {
    name: small_split(count, seed=seed)
    for seed, (name, count) in enumerate({"train": 500, "validation": 100, "test": 200}.items())
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all cases of a property may write to."""
    return tmp_path_factory.mktemp("folder")


@dataclass
class Project:
    """A clone of this repository, and the environment in which its commands run."""

    root: Path
    extra: dict[str, str]

    def environment(self) -> dict[str, str]:
        """What an activated environment is."""
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, **GIT_IDENTITY, "PATH": binaries, **self.extra}

    def run(self, *command: str, ok: bool | None = True) -> str:
        """Run a command in it, which must end well or not, or may do either; return its output."""
        with tempfile.TemporaryFile("w+") as log:  # no pipe, which workers of DVC's would hold open
            status = subprocess.run(
                command,
                cwd=self.root,
                env=self.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
            log.seek(0)
            printed = log.read()
        assert ok is None or (status == 0) == ok, printed
        return printed

    def repro(self, ok: bool = True) -> list[str]:
        """Run `dvc repro`; return the stages that ran, in order."""
        return re.findall("Running stage '(.*)'", self.run("dvc", "repro", ok=ok))

    def params(self) -> dict[str, Any]:
        """What params.yaml holds."""
        params: dict[str, Any] = yaml.safe_load((self.root / "params.yaml").read_text())
        return params

    def set(self, section: str = "train", /, **values: Any) -> None:
        """Set params of a section, as `dvc exp run -S` does: comments stay."""
        with modify_yaml(self.root / "params.yaml") as params:
            params[section].update(values)

    def read(self, file: str) -> bytes:
        return (self.root / file).read_bytes()

    def results(self) -> dict[Path, bytes]:
        """All files that its stages and DVC have made, but for DVC's cache."""
        found = [self.root / "dvc.lock", *self.root.glob("data/**/*"), *self.root.glob("metrics/*")]
        return {path.relative_to(self.root): path.read_bytes() for path in found if path.is_file()}

    def clone(self, root: Path) -> "Project":
        """Clone it, as far as it is committed, to `root`."""
        self.run("git", "clone", "--quiet", ".", str(root))
        return Project(root, self.extra)

    def use_cache(self, cache: Path) -> None:
        """Let DVC keep its data in `cache`, and take from there what it has of them."""
        self.run("dvc", "cache", "dir", "--local", str(cache))
        self.run("dvc", "checkout", "--allow-missing")

    def wait_for_queue(self) -> None:
        """Wait until the experiments in the queue have run."""
        while re.search("Queued|Running", status := self.run("dvc", "queue", "status")):
            time.sleep(2)  # asking takes a second of a core
        assert "Failed" not in status
        self.run("dvc", "queue", "stop", "--kill")  # a worker may miss that there is no more to do


def error_of(main: Callable[[], None], project: Project, patch: pytest.MonkeyPatch) -> str:
    """Run a stage that a mistake must end; return the one line it says. Nothing else changes."""
    patch.chdir(project.root)
    patch.setattr("sys.argv", ["stage"])
    before = project.results()
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert project.results() == before
    line = str(stop.value.code)
    assert re.fullmatch("error: .+", line)
    return line


def stale(reason: str) -> NoReturn:
    """Skip what the documents tell of other results than the committed ones; CI alone insists.

    Somebody whose params are better need not write the documents first.
    """
    if "CI" in os.environ:
        pytest.fail(reason)
    pytest.skip(reason)


def clone(root: Path, **environment: str) -> Project:
    """Copy this repository as it stands, but for what Git ignores, to `root`."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.check_output(listing, cwd=ROOT, text=True).split("\0"):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    return Project(root, environment)


def commit(project: Project, message: str) -> None:
    """Commit all there is, to a new repository if there is none."""
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.run("git", "add", ".")
    project.run("git", "commit", "--quiet", f"--message={message}")


def bring_data(project: Project) -> None:
    """Put small splits, tracked by `dvc add`, in the place of the stages that make the data."""
    path = project.root / "dvc.yaml"
    pipeline = yaml.safe_load(path.read_text())
    stages = pipeline["stages"]
    files = [f"data/{name}.npz" for name in SMALL]
    makers = {name for name, stage in stages.items() if set(stage.get("outs", ())) & set(files)}
    while makers:  # and whatever these need
        needed = {dep for name in makers for dep in stages.pop(name)["deps"]}
        makers = {name for name, stage in stages.items() if set(stage.get("outs", ())) & needed}
    path.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    (project.root / "dvc.lock").unlink(missing_ok=True)
    for tracked in (project.root / "data").glob("*.dvc"):  # data of a copy's own, not cloned
        tracked.unlink()
    for name, split in SMALL.items():
        save_split(project.root / f"data/{name}.npz", split)
    project.run("dvc", "add", "--quiet", *files)


def finish(project: Project) -> None:
    """Run `dvc repro` for the first time and commit the results."""
    commit(project, "Start")
    project.repro()
    commit(project, "Run")


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A clone with small data in which `dvc repro` has run and its results are committed."""
    project = clone(tmp_path_factory.mktemp("finished"))
    project.run("git", "init", "--quiet", "--initial-branch=main")
    bring_data(project)
    project.set(batch_size=32, num_epochs=5, learning_rate=0.1, threads=1)
    finish(project)
    return project


@pytest.fixture
def finished(finished_once: Project, tmp_path: Path) -> Iterator[Project]:
    """A copy of `finished_once` to do anything with."""
    root = shutil.copytree(finished_once.root, tmp_path / "project", symlinks=True)
    yield Project(root, {})
    shutil.rmtree(root)
