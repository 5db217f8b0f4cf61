"""Experiments, results and models are shared between clones."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from stages.shared.dvc_lock import parse_lock
from tests.conftest import ROOT, Project, commit
from tests.faults.damage import cached_path

MODEL = "data/model.safetensors"
SSHD_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
PidFile none
Subsystem sftp internal-sftp
"""


def check_push_and_pull(project: Project, other: Path, url: str, **options: str) -> None:
    """Push to a remote with these options, pull in a clone, and check that nothing runs there."""
    clone = project.clone(other)
    for each in (project, clone):
        each.run("dvc", "remote", "add", "--local", "--default", "storage", url)
        for option, value in options.items():
            each.run("dvc", "remote", "modify", "--local", "storage", option, value)
    project.run("dvc", "push")
    clone.run("dvc", "pull")
    assert clone.repro() == []
    assert clone.read(MODEL) == project.read(MODEL)
    assert clone.run("git", "status", "--porcelain") == ""


def test_clone_pulls_from_a_folder(finished: Project, tmp_path: Path) -> None:
    check_push_and_pull(finished, tmp_path / "clone", str(tmp_path / "storage"))


def test_no_output_is_a_folder() -> None:
    """A list in the remote defines where DVC writes a folder's files, even outside of it."""
    stages = parse_lock((ROOT / "dvc.lock").read_bytes()).values()
    assert not [out.path for stage in stages for out in stage.outs if out.md5.endswith(".dir")]


def test_swapped_model_is_not_pulled(finished: Project, tmp_path: Path) -> None:
    remote = tmp_path / "storage"
    clone = finished.clone(tmp_path / "clone")
    for project in (finished, clone):
        project.run("dvc", "remote", "add", "--local", "--default", "storage", str(remote))
        project.run("dvc", "remote", "modify", "--local", "storage", "verify", "true")
    finished.run("dvc", "push")
    swapped = remote / cached_path(finished, MODEL).relative_to(finished.root / ".dvc/cache")
    swapped.chmod(0o644)
    swapped.write_bytes(b"another model")
    clone.run("dvc", "pull", ok=False)
    assert not (clone.root / MODEL).exists()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def server(command: list[str], port: int) -> Iterator[None]:
    """Run a server until the block ends. Enter the block when its port is open."""
    with subprocess.Popen(command) as process:
        try:
            deadline = time.monotonic() + 20
            while not is_open(port):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            yield
        finally:
            process.terminate()


@pytest.mark.remotes
def test_clone_pulls_from_s3(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    moto = str(Path(sys.executable).with_name("moto_server"))
    with server([moto, "--host", "127.0.0.1", "--port", str(port)], port):
        requests.put(f"{url}/bucket", timeout=10).raise_for_status()
        check_push_and_pull(finished, tmp_path / "clone", "s3://bucket/path", endpointurl=url)
        assert "<Key>path/files/md5/" in requests.get(f"{url}/bucket", timeout=10).text


@pytest.mark.remotes
def test_clone_pulls_over_ssh(finished: Project, tmp_path: Path) -> None:
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    assert sshd, "apt install openssh-server"
    for name in ("host", "user"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(keygen, check=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # normally the service creates it
    port = free_port()
    config = tmp_path / "sshd_config"
    config.write_text(SSHD_CONFIG.format(port=port, folder=tmp_path))
    with server([sshd, "-D", "-e", "-f", str(config)], port):
        url = f"ssh://127.0.0.1{tmp_path}/storage"
        options = {"port": str(port), "keyfile": str(tmp_path / "user")}
        check_push_and_pull(finished, tmp_path / "clone", url, **options)
    assert list((tmp_path / "storage/files/md5").iterdir())


def test_registered_model_can_be_downloaded(finished: Project, tmp_path: Path) -> None:
    finished.run("gto", "register", "model")
    assert finished.run("git", "tag").strip() == "model@v0.0.1"
    finished.set(num_epochs=2)
    finished.repro()
    old = finished.run("git", "show", "HEAD:metrics/accuracy.json")
    commit(finished, "Train less")
    out = str(tmp_path / "got.safetensors")
    finished.run("dvc", "artifacts", "get", str(finished.root), "model", "-o", out)
    assert Path(out).read_bytes() != finished.read(MODEL)  # the registered version
    shutil.copy(out, finished.root / MODEL)
    finished.run("python", "-m", "stages.evaluate")
    assert finished.read("metrics/accuracy.json").decode() == old


def test_ci_compare_shows_changed_params_and_metrics(finished: Project, tmp_path: Path) -> None:
    clone = finished.clone(tmp_path / "clone")
    clone.use_cache(finished.root / ".dvc/cache")
    clone.set(num_epochs=2)
    printed = clone.run(".ci/compare", "HEAD", ok=False)
    assert "no change" in printed  # nothing has run
    assert "error: dvc.lock: outdated from train on; run `dvc repro` and commit\n" in printed
    clone.repro()
    clone.run("git", "stash", "--quiet")  # the files in data/ stay, as after `git checkout BRANCH`
    printed = clone.run(".ci/compare", "HEAD", ok=False)
    assert re.search("^error: data/: .*run `dvc checkout`", printed, re.MULTILINE)
    assert "outdated" not in printed
    clone.run("dvc", "checkout")
    clone.run(".ci/compare", "HEAD")
    clone.run("git", "stash", "pop")
    clone.run("dvc", "checkout")
    commit(clone, "Train less")
    printed = clone.run(".ci/compare", "HEAD~1")
    head = clone.run("git", "rev-parse", "--short", "HEAD").strip()
    assert re.search(rf"^\| +\| HEAD~1 +\| {head} +\|$", printed, re.MULTILINE)
    assert re.search(r"^\| train.num_epochs +\| 5 +\| 2 +\|$", printed, re.MULTILINE)
    assert re.search(r"\d+ became right and \d+ became wrong", printed)
    assert re.search(r"metrics/accuracy.json \| loss +\| [\d.]+ +\| [\d.]+ +\| -?[\d.]+ ", printed)
    (clone.root / "params.yaml").write_text("train:\n\tseed: 0\n")
    printed = clone.run(".ci/compare", "HEAD~1", ok=False)
    assert re.search("^error: .*'params.yaml', .* any token", printed, re.MULTILINE), printed
