"""Where the files come from, and that a source can do no harm: a line, and so many bytes."""

import base64
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stages import fetch
from stages.shared.errors import UserError
from tests.conftest import ROOT
from tests.faults.hostile import damaged, refused
from tests.mnist import (
    FILES,
    Answer,
    Mirror,
    digests,
    drip,
    running_mirror,
    send,
    status,
    write_files,
)

SMALL = FILES["mnist"]
IMAGES, LABELS = list(SMALL)[:2]
NO_SOURCE = (
    f"no source gives {IMAGES} of mnist; check the network, or set DATA_MIRROR to a folder or URL"
    " that has the four files"
)


@dataclass
class Scene:
    """The current folder, in which to fetch from the only mirror that the stage knows."""

    mirror: Mirror
    url: str  # of the small files on it
    patch: pytest.MonkeyPatch

    def answer(self, answer: Answer, name: str = IMAGES) -> None:
        """Let the mirror answer so when it is asked for a file."""
        self.mirror.answers[f"/mnist/{name}.gz"] = answer

    def limit(self, line: str) -> None:
        """Let fetch want less of a source, if `line` says so."""
        self.patch.setattr(fetch, "LIMIT", 50_000)
        if line == UNREACHED:
            self.patch.setattr(fetch, "PATIENCE", 0.2)
        if line == TOO_SLOW:
            self.patch.setattr(fetch, "DEADLINE", 0.3)

    def know(self, *mirrors: str) -> None:
        """Let the data set have these mirrors."""
        real = fetch.DATASETS["mnist"]
        small = fetch.Dataset(real.class_names, digests(SMALL), real.preprocessing, mirrors)
        self.patch.setitem(fetch.DATASETS, "mnist", small)

    def fetched(self) -> dict[str, bytes]:
        """What is in data/raw/ after fetching."""
        fetch.fetch("mnist", fetch.RAW)
        return {path.name: path.read_bytes() for path in fetch.RAW.iterdir()}


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with running_mirror() as mirror:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("DATA_MIRROR", raising=False)
        monkeypatch.setenv("no_proxy", "*")
        scene = Scene(mirror, mirror.serve("mnist", SMALL), monkeypatch)
        scene.know(scene.url)
        yield scene
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


WHOLE = {
    **SMALL,
    "class_names.json": (json.dumps(fetch.DATASETS["mnist"].class_names, indent=2) + "\n").encode(),
    "preprocessing.json": b'"mnist"\n',
}


def test_files_come_decompressed(scene: Scene) -> None:
    assert scene.fetched() == WHOLE


def test_a_mirror_may_hold_plain_files(scene: Scene) -> None:
    scene.mirror.answers = {f"/mnist/{name}": send(data) for name, data in SMALL.items()}
    assert scene.fetched() == WHOLE


def test_a_gzip_file_may_have_several_members(scene: Scene) -> None:
    data = SMALL[IMAGES]
    scene.answer(send(gzip.compress(data[:99]) + gzip.compress(data[99:])))
    assert scene.fetched() == WHOLE


@pytest.mark.parametrize("location", ["a folder", "folder", "file", "url/"])
def test_the_own_mirror_comes_first(location: str, scene: Scene, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "a folder", SMALL)
    own = {"folder": str(folder), "file": folder.as_uri(), "url/": f"{scene.url}/"}
    scene.patch.setenv("DATA_MIRROR", own.get(location, location))
    scene.know()
    assert scene.fetched() == WHOLE


def test_the_next_source_goes_on_where_the_last_one_failed(
    scene: Scene, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path / "own", {f"{IMAGES}.gz": gzip.compress(SMALL[IMAGES]), LABELS: b"wrong"})
    scene.patch.setenv("DATA_MIRROR", "own")
    assert scene.fetched() == WHOLE
    assert f"/mnist/{IMAGES}.gz" not in scene.mirror.asked
    out, err = capfd.readouterr()
    origins = {IMAGES: "own"}
    lines = [f"data/raw/{name} from {origins.get(name, scene.url)}" for name in SMALL]
    assert out.splitlines() == lines
    assert err.splitlines() == [
        "trying own",
        f"own: {LABELS}: other bytes than expected (the SHA-256 differs)",
        f"trying {scene.url}",
    ]


def test_what_was_downloaded_is_kept(scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    scene.fetched()
    shutil.rmtree("data")
    scene.mirror.answers.clear()
    capfd.readouterr()
    assert scene.fetched() == WHOLE
    lines = [f"data/raw/{name} from .downloads/mnist" for name in SMALL]
    assert capfd.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[1:] + b"!"])
def test_damaged_downloads_are_replaced(damage: Callable[[bytes], bytes], scene: Scene) -> None:
    scene.fetched()
    kept = fetch.DOWNLOADS / "mnist" / LABELS
    kept.write_bytes(damage(SMALL[LABELS]))
    assert scene.fetched() == WHOLE
    assert kept.read_bytes() == SMALL[LABELS]


def test_downloads_of_a_run_that_failed_are_kept(scene: Scene) -> None:
    scene.answer(status(404), LABELS)
    with pytest.raises(UserError):
        scene.fetched()
    scene.answer(send(SMALL[LABELS]), LABELS)
    assert scene.fetched() == WHOLE
    assert scene.mirror.asked.count(f"/mnist/{IMAGES}.gz") == 1


def test_git_ignores_the_downloads() -> None:
    command = ["git", "check-ignore", "--no-index", str(fetch.DOWNLOADS / "mnist" / IMAGES)]
    assert not (ROOT / ".git").exists() or not subprocess.run(command, cwd=ROOT).returncode


def gzipped(data: bytes) -> Answer:
    return send(gzip.compress(data))


OK = b"HTTP/1.1 200 OK\r\n"
ENDLESS = OK + b"\r\n"
GZIP = gzip.compress(SMALL[IMAGES])
DAMAGED_GZIP = GZIP[:-8] + bytes(8)
UNREACHED = "too slow, given up after 0.2 s"
TOO_SLOW = "too slow, given up after 0.3 s"
OTHER = "other bytes than expected (the SHA-256 differs)"

# What the mirror answers when it is asked for the first file, and what is said of it.
ANSWERS = {
    "missing": (status(404), "cannot be read (HTTP status 404)"),
    "forbidden": (status(403), "cannot be read (HTTP status 404)"),
    "empty": (send(b""), OTHER),
    "other bytes": (send(SMALL[LABELS]), OTHER),
    "other bytes, gzipped": (gzipped(SMALL[LABELS]), OTHER),
    "too long": (send(bytes(99_999)), "longer than 50,000 bytes"),
    "endless": (drip(ENDLESS, bytes(9999), 0), "longer than 50,000 bytes"),
    "endless gzip": (drip(ENDLESS + GZIP, bytes(9999), 0), "longer than 50,000 bytes"),
    "gzip bomb": (gzipped(bytes(9_999_999)), "longer than 50,000 bytes"),
    "broken off": (send(GZIP[:100], announced=200), "broke off (ProtocolError)"),
    "cut": (send(GZIP[:100]), "broke off (EOFError)"),
    "not gzip": (send(b"\x1f\x8b, but no gzip"), "cannot be read (Unknown compression method)"),
    "damaged gzip": (
        send(DAMAGED_GZIP),
        f"cannot be read (CRC check failed 0x0 != {hex(int.from_bytes(GZIP[-8:-4], 'little'))})",
    ),
    "no HTTP": (drip(b"", b"hello\n", 9), "cannot be reached (ConnectionError)"),
    "silence": (drip(b"", b"", 9), UNREACHED),
    "silence in the headers": (drip(OK, b"", 9), UNREACHED),
    "silence in the body": (drip(ENDLESS, b"", 9), TOO_SLOW),
    "dripping headers": (drip(OK, b"x: y\r\n", 0.05), UNREACHED),
    "dripping bytes": (drip(ENDLESS, b"\0", 0.05), TOO_SLOW),
    "redirect to a file": (
        status(302, Location=f"file://{__file__}"),
        "cannot be reached (InvalidSchema)",
    ),
    "redirect to nonsense": (
        status(302, Location="http://[::bad"),
        "cannot be read (Invalid IPv6 URL)",
    ),
    "redirect to itself": (
        status(302, Location=f"/mnist/{IMAGES}.gz"),
        "cannot be reached (TooManyRedirects)",
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_a_wrong_answer_is_a_line(
    case: str, scene: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    answer, line = ANSWERS[case]
    scene.answer(answer)
    scene.limit(line)
    with refused(UserError):
        scene.fetched()
    assert capfd.readouterr().err.splitlines() == [
        f"trying {scene.url}",
        f"{scene.url}: {IMAGES}: {line}",
    ]
    assert not Path("data").exists()
    attempts = {"broken off": 3, "cut": 3, "redirect to itself": 31}
    assert scene.mirror.asked.count(f"/mnist/{IMAGES}.gz") == attempts.get(case, 1)


def test_a_mirror_that_falls_silent_is_given_up_early(scene: Scene) -> None:
    scene.answer(drip(ENDLESS + GZIP[:99], b"", 9))
    scene.patch.setattr(fetch, "PATIENCE", 1)
    with pytest.raises(fetch.SourceError, match=r"broke off \(ReadTimeoutError\)"):
        fetch.read(scene.url, IMAGES, attempts=1)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_but_its_body_not_read(code: int, scene: Scene) -> None:
    there = f"Location: /mnist/{LABELS}\r\n\r\n"
    scene.mirror.answers[f"/mnist/{LABELS}"] = send(SMALL[LABELS])
    scene.answer(drip(f"HTTP/1.1 {code} There\r\n{there}".encode(), bytes(9999), 0), LABELS)
    with refused():
        assert scene.fetched() == WHOLE


def test_the_own_mirror_may_want_a_password(
    scene: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    """Which no output shows."""
    secret = "Basic " + base64.b64encode(b"user:secret").decode()

    def guarded(answer: Answer) -> Answer:
        return lambda request: (
            answer if request.headers["Authorization"] == secret else status(401)
        )(request)

    answers = scene.mirror.answers
    for path, answer in list(answers.items()):
        answers[path] = answers[path.removesuffix(".gz")] = guarded(answer)
    scene.know()
    scene.patch.setenv("DATA_MIRROR", scene.url.replace("//", "//user:wrong@"))
    with pytest.raises(UserError):
        scene.fetched()
    scene.patch.setenv("DATA_MIRROR", scene.url.replace("//", "//user:secret@"))
    assert scene.fetched() == WHOLE
    out, err = capfd.readouterr()
    assert err.splitlines() == [
        f"trying {scene.url}",
        f"{scene.url}: {IMAGES}: cannot be read (HTTP status 401)",
        f"trying {scene.url}",
    ]
    assert "secret" not in out


# What DATA_MIRROR is, and what is said of it.
NO_FILE = "cannot be read (no such file in this folder)"
LOCATIONS = {
    "nowhere": ("nowhere", NO_FILE),
    "file:///nowhere": ("file:///nowhere", NO_FILE),
    "file://[bad": ("file://[bad", NO_FILE),
    "ftp://user:secret@host/folder": ("ftp://host/folder", NO_FILE),
    "pipe": ("pipe", NO_FILE),
    "folder": ("folder", NO_FILE),
    "http://[::bad": ("http://[::bad", "cannot be reached (InvalidURL)"),
    "http://:secret@[::bad": ("http://[::bad", "cannot be reached (InvalidURL)"),
    "http://user:se/cr@et@[::bad": ("http://[::bad", "cannot be reached (InvalidURL)"),
    "http://secret@127.0.0.1:9/a@b": (
        "http://127.0.0.1:9/a@b",
        "cannot be reached (NewConnectionError)",
    ),
    "https://user:secret@name.invalid": (
        "https://name.invalid",
        "cannot be reached (NameResolutionError)",
    ),
}


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_wrong_mirror_is_passed_over(
    location: str, scene: Scene, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("pipe", "folder"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / IMAGES)
    os.mkfifo(tmp_path / "pipe" / f"{IMAGES}.gz")
    (tmp_path / "folder" / IMAGES).mkdir()
    write_files(tmp_path / "pipe/folder", SMALL)  # which ftp://pipe/folder is not
    scene.patch.setenv("DATA_MIRROR", location)
    assert scene.fetched() == WHOLE
    name, line = LOCATIONS[location]
    assert capfd.readouterr().err.splitlines() == [
        f"trying {name}",
        f"{name}: {IMAGES}: {line}",
        f"trying {scene.url}",
    ]


def test_no_source_is_left(scene: Scene) -> None:
    scene.know()
    with pytest.raises(UserError) as error:
        scene.fetched()
    assert str(error.value) == NO_SOURCE


def test_a_place_that_cannot_be_written(scene: Scene) -> None:
    fetch.DOWNLOADS.write_text("")
    with pytest.raises(UserError) as error:
        scene.fetched()
    line = f".downloads/mnist/{IMAGES}: cannot be written (Not a directory); fix that and rerun"
    assert str(error.value) == line
    assert not fetch.RAW.exists()


# The npm package: what npm does instead, and what is said of it.
PACKAGE = "npm:small-mnist@1.0.0"
NPM = {
    "missing": ("", "cannot be read ([Errno 2] No such file or directory: 'npm')"),
    "offline": ("echo lost >&2; exit 1", "npm view failed (lost)"),
    "broken": ("[ $1 = view ] || { echo lost >&2; exit 1; }", "npm pack failed (lost)"),
    "silent": ("exec sleep 9", UNREACHED),
    "slow": ("[ $1 = view ] || exec sleep 9", TOO_SLOW),
    "junk": ("echo junk > small.tgz", "cannot be read (truncated header)"),
    "bomb": ("head -c 999999 /dev/zero | gzip > small.tgz", "longer than 50,000 bytes"),
    "empty": (
        "tar czf small.tgz --files-from /dev/null",
        "cannot be read (no such file in this package)",
    ),
}


def replace_npm(script: str, scene: Scene, folder: Path) -> None:
    """Let there be only an npm package, and a shell script in the place of npm, or nothing."""
    if script:
        (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "npm").chmod(0o755)
    scene.patch.setenv("PATH", f"{folder}:/usr/bin:/bin" if script else str(folder))
    scene.know(PACKAGE)
    fetch.npm_archive.cache_clear()


@pytest.mark.parametrize("case", NPM)
def test_npm_may_fail(
    case: str, scene: Scene, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script, line = NPM[case]
    replace_npm(script, scene, tmp_path)
    scene.limit(line)
    with refused():
        scene.fetched()
    assert capfd.readouterr().err.splitlines() == [
        f"trying {PACKAGE}",
        f"{PACKAGE}: {IMAGES}: {line}",
    ]


def archive(files: dict[str, bytes], *members: tarfile.TarInfo) -> bytes:
    """A package of npm's."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as package:
        for member in members:
            package.addfile(member)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            package.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def publish(package: bytes, scene: Scene) -> None:
    """Let npm find a package on the mirror, and nowhere else."""
    url = f"{scene.mirror.url}/small-mnist"
    integrity = f"sha512-{base64.b64encode(hashlib.sha512(package).digest()).decode()}"
    dist = {"tarball": f"{url}/-/small-mnist-1.0.0.tgz", "integrity": integrity}
    version = {"name": "small-mnist", "version": "1.0.0", "dist": dist}
    about = {
        "name": "small-mnist",
        "dist-tags": {"latest": "1.0.0"},
        "versions": {"1.0.0": version},
    }
    scene.mirror.answers["/small-mnist"] = send(json.dumps(about).encode())
    scene.mirror.answers["/small-mnist/-/small-mnist-1.0.0.tgz"] = send(package)
    for name in ("cache", "prefix", "userconfig"):
        scene.patch.setenv(f"npm_config_{name}", str(Path.cwd() / f"npm-{name}"))
    scene.patch.setenv("npm_config_registry", scene.mirror.url)
    scene.patch.setenv("npm_config_noproxy", "127.0.0.1")
    scene.patch.setenv("npm_config_update_notifier", "false")
    scene.know(PACKAGE)
    fetch.npm_archive.cache_clear()


needs_npm = pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")


@needs_npm
def test_npm_package(scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    publish(archive({f"package/data/{name}": data for name, data in SMALL.items()}), scene)
    assert scene.fetched() == WHOLE
    lines = [f"data/raw/{name} from {PACKAGE}" for name in SMALL]
    assert capfd.readouterr().out.splitlines() == lines


@needs_npm
def test_npm_that_reaches_nothing_ends_at_once(
    scene: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    publish(b"", scene)
    scene.patch.setenv("npm_config_registry", "http://127.0.0.1:9")
    with pytest.raises(UserError):
        scene.fetched()
    assert f"{IMAGES}: npm view failed (npm error code ECONNREFUSED" in capfd.readouterr().err


@needs_npm
def test_a_package_of_npm_does_no_harm(scene: Scene, tmp_path: Path) -> None:
    """Members with absolute paths and .., and links to elsewhere or to themselves."""
    secret = tmp_path / "secret"
    secret.write_bytes(SMALL[IMAGES])
    links = []
    targets = {f"{IMAGES}.gz": f"{IMAGES}.gz", IMAGES: str(secret)}
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        for name, target in targets.items():
            links.append(tarfile.TarInfo(f"package/data/{name}"))
            links[-1].type, links[-1].linkname = kind, target
    evil = ("../../evil", f"{tmp_path}/evil", "package/data/evil")
    publish(archive(dict.fromkeys(evil, b"evil"), *links), scene)
    with pytest.raises(UserError):
        scene.fetched()
    assert "evil" not in {path.name for path in tmp_path.rglob("*")}
    assert not fetch.RAW.exists()


def tar(*members: tarfile.TarInfo) -> bytes:
    """An archive that ends with these headers."""
    start = gzip.decompress(archive({f"package/data/{IMAGES}": b"image"}))[:1024]
    for member in members:
        start += member.tobuf(tarfile.PAX_FORMAT if member.pax_headers else tarfile.GNU_FORMAT)
    return start


HUGE = tarfile.TarInfo("package/data/huge")
HUGE.size = 1 << 70
SPARSE = tarfile.TarInfo(f"package/data/{IMAGES}.gz")
SPARSE.pax_headers = {"GNU.sparse.map": "9,0", "GNU.sparse.size": "9" * 18}


def test_a_package_that_leads_in_circles(scene: Scene, tmp_path: Path) -> None:
    """From a header back to itself, which not every Python notices."""
    again = tarfile.TarInfo("package/data/again")
    again.size = -tarfile.BLOCKSIZE
    (tmp_path / "circle.tgz").write_bytes(tar(again))
    replace_npm(f"cp {tmp_path}/circle.tgz .", scene, tmp_path)
    scene.patch.setattr(fetch, "DEADLINE", 0.3)
    with pytest.raises(UserError):
        scene.fetched()


@given(data=st.binary() | damaged(tar()))
@example(tar(HUGE))
@example(tar(SPARSE))
@example(tar()[:512])
def test_any_package(data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "LIMIT", 50_000)
        patch.setattr(fetch, "npm_archive", lambda _: tarfile.TarFile(fileobj=io.BytesIO(data)))
        with refused(fetch.SourceError):
            fetch.read(PACKAGE, IMAGES)


@given(data=st.binary() | damaged(GZIP) | damaged(gzip.decompress(GZIP)))
@example(GZIP + GZIP)
@example(GZIP + bytes(99))
@example(b"\x1f\x8b")
def test_any_bytes(folder: Path, data: bytes) -> None:
    (folder / "file").write_bytes(data)
    with refused(fetch.SourceError):
        fetch.read(str(folder), "file")


def test_a_terminal_sees_a_progress_bar_and_a_log_does_not(
    scene: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    scene.fetched()
    assert "%|" not in capfd.readouterr().err
    shutil.rmtree(fetch.DOWNLOADS)
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal:
        scene.patch.setattr(sys, "stderr", terminal)
        scene.fetched()
    shown = b""
    with suppress(OSError):  # which is the end
        while piece := os.read(ours, 1 << 16):
            shown += piece
    os.close(ours)
    assert re.search(rf"{IMAGES}: +\d+%\|", shown.decode())
