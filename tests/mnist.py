"""Small replacements for MNIST and Fashion-MNIST, and an HTTP server that provides them."""

import gzip
import http.server
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.fetch import DATASETS
from tests.conftest import Project, clone, small_split


def idx(array: NDArray[np.uint8]) -> bytes:
    """Return an array as an IDX file."""
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def small_files(class_names: tuple[str, ...], seed: int) -> dict[str, bytes]:
    """Return the four IDX files of a data set with 8 x 8 images, by name."""
    files = {}
    for prefix, count in (("train", 600), ("t10k", 200)):
        split = small_split(count, (8, 8), class_names, seed + count)
        files[f"{prefix}-images-idx3-ubyte"] = idx(split.images)
        files[f"{prefix}-labels-idx1-ubyte"] = idx(split.labels)
    return files


FILES = {
    name: small_files(dataset.class_names, seed)
    for seed, (name, dataset) in enumerate(DATASETS.items())
}


def digests(files: dict[str, bytes]) -> dict[str, str]:
    """Return the SHA-256 of each file."""
    return {name: sha256(data).hexdigest() for name, data in files.items()}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write `files` into a new `folder`; return it."""
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# Writes the response to a request.
Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


def send(data: bytes, announced: int | None = None) -> Answer:
    """Respond with `data`, after announcing its length or a wrong length."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data) if announced is None else announced))
        request.end_headers()
        request.wfile.write(data)

    return answer


def status(code: int, **headers: str) -> Answer:
    """Respond with an HTTP status and an empty body."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in {**headers, "Content-Length": "0"}.items():
            request.send_header(name, value)
        request.end_headers()

    return answer


def drip(start: bytes, drop: bytes, pause: float) -> Answer:
    """Respond with `start`, then repeat `drop` forever, with a pause in seconds after each."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.wfile.write(start)
        while True:
            request.wfile.write(drop)
            time.sleep(pause)

    return answer


@dataclass
class Mirror:
    """An HTTP server on this machine: its answer per path, and the paths requested so far."""

    url: str
    answers: dict[str, Answer] = field(default_factory=dict)
    requested: list[str] = field(default_factory=list)

    def serve(self, folder: str, files: dict[str, bytes]) -> str:
        """Serve `files` gzipped, as the public mirrors do; return the URL of their folder."""
        for name, data in files.items():
            self.answers[f"/{folder}/{name}.gz"] = send(gzip.compress(data))
        return f"{self.url}/{folder}"


@contextmanager
def running_mirror() -> Iterator[Mirror]:
    """Run a mirror that answers 404 until it gets files or other answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mirror.requested.append(self.path)
            with suppress(OSError):  # the client may disconnect early, EPROTOTYPE on macOS
                mirror.answers.get(self.path, status(404))(self)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        mirror = Mirror(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield mirror
        finally:
            server.shutdown()


def small_project(root: Path, mirror: Mirror) -> Project:
    """Clone this repository to `root`, with the small data sets and the mirror as their source."""
    project = clone(root, DATA_MIRROR="", no_proxy="*")
    script = root / "stages/fetch.py"
    code = script.read_text()
    for name, dataset in DATASETS.items():
        url = mirror.serve(name, FILES[name])
        real = [*dataset.digests.values(), *dataset.mirrors]
        small = [*digests(FILES[name]).values(), *[url] * len(dataset.mirrors)]
        for old, new in zip(real, small, strict=True):
            assert code.count(f'"{old}"') == 1
            code = code.replace(f'"{old}"', f'"{new}"')
    script.write_text(code)
    project.set("fetch", dataset="mnist")
    project.set("preprocess", validation_size=100)
    project.set(batch_size=32, num_epochs=5, learning_rate=0.1, threads=1)
    return project
