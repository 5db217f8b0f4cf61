"""Small splits of made-up data, and temporary clones of the project that train on them."""

import json
import os
import platform
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

import mlx.core as mx
import numpy as np
import pytest
import yaml
from dvc.utils.serialize import modify_yaml
from hypothesis import settings

from stages.shared import cli
from stages.shared.data import Split, save_split
from stages.shared.openblas import load_openblas

mx.set_default_device(mx.cpu)  # as the stages do
load_openblas(1)

# Hypothesis tries the same cases in each run, CASES of them, however slow the machine is.
settings.register_profile(
    "project",
    max_examples=int(os.environ.get("CASES", "100")),
    derandomize=True,
    database=None,
    deadline=None,
)
settings.load_profile("project")

ROOT = Path(__file__).parent.parent
# On other platforms the last bits of the weights may differ, and with them the metrics.
SAME_BITS = (platform.system(), platform.machine()) == ("Linux", "x86_64")
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
GIT_IDENTITY = {
    f"GIT_{role}_{key}": value
    for role in ("AUTHOR", "COMMITTER")
    for key, value in (("NAME", "Test"), ("EMAIL", "test@localhost"))
}


def small_split(
    count: int,
    image_shape: tuple[int, ...] = (9, 11),
    class_names: tuple[str, ...] = ("ant", "bee", "cow"),
    seed: int = 0,
) -> Split:
    """Return `count` images of a noisy pattern per class, quickly learned, a few labelled wrongly.

    The patterns do not depend on the seed.
    """
    patterns = np.random.default_rng(0).integers(0, 200, (len(class_names), *image_shape))
    rng = np.random.default_rng((1, seed))
    labels = rng.integers(0, len(class_names), count).astype(np.uint8)
    images = patterns[labels] + rng.integers(0, 56, (count, *image_shape))
    labels[::25] = 0
    return Split(images.astype(np.uint8), labels, class_names)


SMALL = {
    name: small_split(count, seed=seed)
    for seed, (name, count) in enumerate({"train": 500, "validation": 100, "test": 200}.items())
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder that all cases of a property test may write to."""
    return tmp_path_factory.mktemp("folder")


@dataclass
class Project:
    """A clone of this repository, and additional environment variables for its commands."""

    root: Path
    extra: dict[str, str]

    def environment(self) -> dict[str, str]:
        """Return the environment for commands, in which the packages are activated."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # Below `make test`, a make would print the folders that it enters.
        outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        # As `make setup` configures it: no state outside the clone.
        databases = {"DVC_SITE_CACHE_DIR": str(self.root / ".dvc/site_cache")}
        return {**outer, **GIT_IDENTITY, **databases, "PATH": path, **self.extra}

    def with_variables(self, **variables: str) -> "Project":
        """Return the same clone with more environment variables."""
        return Project(self.root, {**self.extra, **variables})

    def run(self, *command: str, ok: bool | None = True) -> str:
        """Run a command in the clone. Return its output.

        Raises `AssertionError` unless it succeeds, or fails if `ok` is False. If `ok` is None, it
        may do either.
        """
        with tempfile.TemporaryFile("w+") as log:  # background processes of DVC hold a pipe open
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
        """Run `dvc repro`. Return the stages that ran, in order."""
        return re.findall("Running stage '(.*)'", self.run("dvc", "repro", ok=ok))

    def params(self) -> dict[str, Any]:
        """Return the content of params.yaml."""
        params: dict[str, Any] = yaml.safe_load((self.root / "params.yaml").read_text())
        return params

    def set(self, section: str = "train", /, **values: Any) -> None:
        """Set params of a section. All other text of params.yaml stays, including comments."""
        path = self.root / "params.yaml"
        before, heading, lines = re.split(rf"^({section}:.*\n)", path.read_text(), flags=re.M)
        for name, value in values.items():
            lines, count = re.subn(
                rf"^( +{name}: *)[^ \n]*", rf"\g<1>{json.dumps(value)}", lines, count=1, flags=re.M
            )
            assert count, f"{section} has no {name}"
        path.write_text(before + heading + lines)

    def read(self, file: str) -> bytes:
        return (self.root / file).read_bytes()

    def append(self, file: str, text: str) -> None:
        with (self.root / file).open("a") as opened:
            opened.write(text)

    def results(self) -> dict[Path, bytes]:
        """Return all files that the stages and DVC write, without DVC's cache."""
        found = [self.root / "dvc.lock", *self.root.glob("data/**/*"), *self.root.glob("metrics/*")]
        return {path.relative_to(self.root): path.read_bytes() for path in found if path.is_file()}

    def clone(self, root: Path) -> "Project":
        """Clone the last commit to `root`."""
        self.run("git", "clone", "--quiet", ".", str(root))
        return Project(root, self.extra)

    def use_cache(self, cache: Path) -> None:
        """Make `cache` DVC's cache, and check out the outputs that it has."""
        self.run("dvc", "cache", "dir", "--local", str(cache))
        self.run("dvc", "checkout", "--allow-missing")

    def wait_for_queue(self) -> None:
        """Wait until the experiments in the queue have run."""
        while re.search("Queued|Running", status := self.run("dvc", "queue", "status")):
            if "Queued" in status and "0 active, 0 idle" in status:
                self.run("dvc", "queue", "start")  # an earlier `stop --kill` ended this worker
            time.sleep(2)  # the command itself takes a second of CPU time
        assert "Failed" not in status
        self.run("dvc", "queue", "stop", "--kill")  # a worker may miss its end


def error_of(main: Callable[[], None], project: Project, patch: pytest.MonkeyPatch) -> str:
    """Run a stage that must end in an error and change no result. Return its one line."""
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
    """Skip a test of documents that state other results than the committed ones.

    Somebody who finds better params need not rewrite the documents before `make test` passes. CI
    fails where the committed bits are promised.
    """
    if "CI" in os.environ and SAME_BITS:
        pytest.fail(reason)
    pytest.skip(reason)


def clone(root: Path, **variables: str) -> Project:
    """Copy this repository with its uncommitted changes, without ignored files, to `root`."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.check_output(listing, cwd=ROOT, text=True).split("\0"):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    return Project(root, variables)


def commit(project: Project, message: str) -> None:
    """Commit all files. Create the repository if there is none."""
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.run("git", "add", ".")
    project.run("git", "commit", "--quiet", f"--message={message}")


def use_small_data(project: Project) -> None:
    """Replace the stages that make the data by small splits that `dvc add` tracks."""
    with modify_yaml(project.root / "dvc.yaml") as pipeline:
        for name in pipeline["stages"].keys() - {"train", "evaluate"}:
            del pipeline["stages"][name]
    (project.root / "dvc.lock").unlink(missing_ok=True)
    for record in (project.root / "data").glob("*.dvc"):  # of a copy with its own data
        record.unlink()
    for name, split in SMALL.items():
        save_split(project.root / f"data/{name}.npz", split)
    project.run("dvc", "add", "--quiet", *(f"data/{name}.npz" for name in SMALL))


def clone_with_small_data(root: Path) -> Project:
    """Clone this repository to `root`, with small splits and params that suit them."""
    project = clone(root)
    project.run("git", "init", "--quiet", "--initial-branch=main")
    use_small_data(project)
    project.set(batch_size=32, num_epochs=5, learning_rate=0.1, threads=1)
    return project


def finish(project: Project) -> None:
    """Run `dvc repro` for the first time and commit the results."""
    commit(project, "Start")
    project.repro()
    commit(project, "Run")


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Clone this repository with small data, run `dvc repro` and commit the results."""
    project = clone_with_small_data(tmp_path_factory.mktemp("finished"))
    finish(project)
    return project


@pytest.fixture
def finished(finished_once: Project, tmp_path: Path) -> Iterator[Project]:
    """Copy `finished_once`. The test can change the copy."""
    root = shutil.copytree(finished_once.root, tmp_path / "project", symlinks=True)
    yield Project(root, {})
    shutil.rmtree(root)
