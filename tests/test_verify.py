"""That `make repro` finds and repairs what DVC would not; the drill tries it on every file."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import zc.lockfile

from stages.shared.errors import UserError
from tests.conftest import Project
from tests.faults import disk
from tools import verify

WHOLE = "verified: every output in dvc.lock\n"


@pytest.fixture(autouse=True)
def here(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.root)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    verify.main()
    return capsys.readouterr().out


def cut(path: Path) -> None:
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-20])
    path.chmod(mode)


def test_all_is_well(finished: Project, capsys: pytest.CaptureFixture[str]) -> None:
    before = finished.results()
    assert said(capsys) == WHOLE
    assert finished.results() == before
    assert finished.repro() == []


def leave_behind() -> list[str]:
    """What kills and mishaps leave."""
    Path(".dvc/tmp/rwlock").write_text('{"write": {"data')
    cut(Path("dvc.lock"))
    Path("data/.model.safetensors.part").mkdir()
    Path("data/.train.npz.tmp").write_text("half")
    Path("metrics/.accuracy.json.tmp").write_text("")
    Path("data/checkpoint.safetensors").mkdir()
    entry = next(Path(".dvc/cache/runs").glob("*/*/*"))
    cut(entry)
    return [
        ".dvc/tmp/rwlock",
        "dvc.lock",
        "data/.model.safetensors.part",
        "data/.train.npz.tmp",
        "metrics/.accuracy.json.tmp",
        "data/checkpoint.safetensors",
        str(entry),
    ]


def test_what_is_left_behind_is_repaired(
    finished: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    before = finished.results()
    left = leave_behind()
    assert said(capsys) == f"not as dvc.lock has it, and so made anew: {', '.join(left)}\n"
    assert said(capsys) == WHOLE
    assert finished.repro() == []
    assert finished.results() == before


def test_damage_in_the_cache_is_dropped(
    finished: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    before = finished.results()
    model = Path("data/model.safetensors")
    inside = verify.object_path(
        Path(".dvc/cache"),
        next(iter(verify.files_of(Path(".dvc/cache"), lock_entry(model)).values())),
    )
    cut(inside)
    model.unlink()
    line = f"not as dvc.lock has it, and so made anew: {model} in the cache\n"
    assert said(capsys) == line
    assert not inside.exists()
    finished.repro()
    assert finished.results() == before


def lock_entry(path: Path) -> dict[str, str]:
    stages = verify.read_yaml(verify.LOCK)["stages"].values()
    outs = [out for stage in stages for out in stage["outs"]]
    return next(out for out in outs if out["path"] == str(path))


def test_nothing_is_touched_while_another_dvc_runs(capsys: pytest.CaptureFixture[str]) -> None:
    leave_behind()
    Path(".dvc/tmp/rwlock").write_text(
        f'{{"write": {{}}, "read": {{"dvc.yaml": [{{"pid": {os.getpid()}, "cmd": "dvc"}}]}}}}'
    )
    note = "note: another DVC runs here; nothing is verified until it ends\n"
    assert said(capsys) == note
    Path(".dvc/tmp/rwlock").unlink()
    lock = zc.lockfile.LockFile(".dvc/tmp/rwlock.lock")
    assert said(capsys) == note
    lock.close()
    assert said(capsys) != note


def empty(path: str) -> Callable[[], object]:
    return lambda: Path(path).write_text("")


def pipe() -> None:
    Path("params.yaml").unlink()
    os.mkfifo("params.yaml")


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        (
            lambda: shutil.rmtree(".git"),
            ".git: not found, and DVC needs it; run `git init`",
        ),
        (
            empty("dvc.yaml"),
            "dvc.yaml: has no stages; get it back with `git checkout dvc.yaml`",
        ),
        (
            lambda: Path("params.yaml").write_text("train:\n\tseed: 0\n"),
            "params.yaml: line 2: while scanning for the next token,"
            " found character '\\t' that cannot start any token",
        ),
        (
            lambda: Path(".dvc/config").write_text("[core"),
            ".dvc: config file error: Invalid line ('[core') (matched as neither section nor"
            " keyword) at line 1; fix its config or config.local, or `git checkout .dvc/config`",
        ),
        (
            pipe,
            "params.yaml: is not a regular file; `rm -r params.yaml` and `git checkout params.yaml`"
            " bring it back",
        ),
    ],
)
def test_where_dvc_could_not_work(mistake: Callable[[], object], line: str) -> None:
    mistake()
    with pytest.raises(UserError) as error:
        verify.main()
    assert str(error.value) == line


def test_a_cache_elsewhere(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished.run("dvc", "cache", "dir", "--local", str(tmp_path / "cache"))
    assert verify.cache_folder() == tmp_path / "cache"
    finished.run("dvc", "cache", "dir", "--local", "elsewhere")
    assert verify.cache_folder().resolve() == finished.root / "elsewhere"
    Path(".dvc/config.local").unlink()
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path))
    (tmp_path / "config").write_text("[cache]\n    dir = shared\n")
    assert verify.cache_folder() == tmp_path / "shared"


def test_a_full_disk_and_a_read_only_one(finished_once: Project, tmp_path: Path) -> None:
    """The drill tries it at each write."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        with disk.mounted(folder, "-t", "tmpfs", "-o", "size=30m", "tmpfs"):
            root = shutil.copytree(finished_once.root, folder / "project", symlinks=True)
            assert not disk.check_full(Project(root, {}), free=4096)
            disk.check_read_only(Project(root, {}), ".dvc/cache")
    except disk.CannotMountError as error:
        pytest.skip(f"no disk can be mounted here: {error}")
