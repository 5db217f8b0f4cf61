"""`make repro` finds and repairs damage that DVC would overlook. tests/faults tries every file."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import zc.lockfile

from stages.shared.dvc_lock import LOCK
from stages.shared.errors import UserError
from tests.conftest import Project, commit
from tests.faults import disk
from tests.faults.damage import cached_path, make_repro
from tools import verify
from tools.verify import CHECKPOINT, RWLOCK

MODEL = Path("data/model.safetensors")
ALL_INTACT = re.compile(r"verified (\d+) of \1 outputs in dvc\.lock\n")
OTHER_DVC = re.compile(r"note: another DVC .* nothing is verified .*\n")
Verify = Callable[[], str]


@pytest.fixture(autouse=True)
def in_project(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.root)


@pytest.fixture
def output_of_verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    def run() -> str:
        capsys.readouterr()
        verify.main()
        return capsys.readouterr().out

    return run


def repaired(*names: str | Path) -> str:
    return f"repaired (did not match dvc.lock): {', '.join(map(str, names))}\n"


def cut(path: Path) -> None:
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-20])
    path.chmod(mode)


def leave_behind() -> list[str | Path]:
    """Create the remains of killed runs and mishaps. Return them in the order of the message."""
    RWLOCK.write_text('{"write": {"data')
    hidden = [Path("data/.a.part"), Path("data/.b.tmp"), Path("metrics/.accuracy.json.tmp")]
    for path in (CHECKPOINT, *hidden[:1]):
        path.mkdir()
    for path in hidden[1:]:
        path.write_text("half")
    entry = min(Path(".dvc/cache/runs").glob("*/*/*"))
    cut(LOCK)
    cut(entry)
    return [RWLOCK, LOCK, *hidden, CHECKPOINT, entry]


def test_intact_project_stays_unchanged(finished: Project, output_of_verify: Verify) -> None:
    before = finished.results()
    assert ALL_INTACT.fullmatch(output_of_verify())
    assert finished.results() == before
    assert finished.repro() == []


def test_missing_outputs_are_not_called_verified(output_of_verify: Verify) -> None:
    shutil.rmtree("data")
    assert re.fullmatch(r"verified (\d+) of (?!\1)\d+ outputs in dvc\.lock\n", output_of_verify())
    LOCK.unlink()
    assert output_of_verify() == "verified 0 of 0 outputs in dvc.lock\n"


def test_leftovers_of_a_kill_are_repaired(finished: Project, output_of_verify: Verify) -> None:
    before = finished.results()
    leftovers = leave_behind()
    assert output_of_verify() == repaired(*leftovers)
    assert ALL_INTACT.fullmatch(output_of_verify())
    assert finished.repro() == []
    assert finished.results() == before
    LOCK.unlink()
    assert len(finished.repro()) == 1  # would fail if the run-cache had an empty folder
    assert finished.results() == before


@pytest.mark.parametrize(
    ("old", "new"),
    [("hash: md5", "hash: me5"), ("size:", "sizf:"), ("path:", "qath:"), ("md5: ", "md5: x")],
)
def test_malformed_lock_is_restored(old: str, new: str, output_of_verify: Verify) -> None:
    before = LOCK.read_text()
    LOCK.write_text(before.replace(old, new, 1))
    assert output_of_verify() == repaired(LOCK)
    assert LOCK.read_text() == before


def test_pipes_do_not_block(output_of_verify: Verify) -> None:
    paths = (RWLOCK, LOCK, CHECKPOINT, MODEL)
    for path in paths:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    assert output_of_verify() == repaired(*paths)


def test_damaged_cache_object_is_removed(finished: Project, output_of_verify: Verify) -> None:
    before = finished.results()
    cached = cached_path(finished, str(MODEL))
    cut(cached)
    MODEL.unlink()
    assert output_of_verify() == repaired(f"{MODEL} in the cache")
    assert not cached.exists()
    finished.repro()
    assert finished.results() == before


def test_files_of_an_output_folder_are_verified(
    finished: Project, output_of_verify: Verify
) -> None:
    """dvc.lock has the digest of the list of files, which is in the cache."""
    a, b, c = (Path("data/folder", name) for name in "abc")
    a.parent.mkdir()
    for path in (a, b, c):
        path.write_text(path.name)
    finished.run("dvc", "stage", "add", "--name=folder", "--outs=data/folder", "true")
    finished.run("dvc", "commit", "--force", "folder")
    assert ALL_INTACT.fullmatch(output_of_verify())
    for path in (cached_path(finished, str(a)), b):
        path.unlink()
        path.write_text("other")
    assert output_of_verify() == repaired(f"{a} in the cache", b)
    (listing,) = Path(".dvc/cache/files").glob("md5/*/*.dir")
    cut(listing)
    assert output_of_verify() == repaired("data/folder in the cache")
    assert not listing.exists()


def test_run_cache_keeps_params_in_scientific_notation(
    finished: Project, output_of_verify: Verify
) -> None:
    """1e-05 is a number to DVC (YAML 1.2) and text to PyYAML (YAML 1.1)."""
    finished.set(learning_rate=0.00001)
    finished.repro()
    assert "1e-05" in LOCK.read_text()
    assert ALL_INTACT.fullmatch(output_of_verify())


def test_nothing_is_touched_while_another_dvc_runs(output_of_verify: Verify) -> None:
    leftovers = leave_behind()
    process = {"pid": os.getpid(), "cmd": " ".join(psutil.Process().cmdline()[1:])}
    for used in ({"read": {"dvc.yaml": [process]}}, {"write": {"data": process}}):
        RWLOCK.write_text(json.dumps(used))
        assert OTHER_DVC.fullmatch(output_of_verify())
    # Another program has the number of a process that was killed.
    RWLOCK.write_text(json.dumps({"write": {"data": {**process, "cmd": "/bin/dvc repro"}}}))
    lock = zc.lockfile.LockFile(f"{RWLOCK}.lock")
    assert OTHER_DVC.fullmatch(output_of_verify())
    lock.close()
    assert output_of_verify() == repaired(*leftovers)


def test_lock_file_of_dvc_may_be_a_folder(finished: Project, output_of_verify: Verify) -> None:
    Path(f"{RWLOCK}.lock").unlink(missing_ok=True)
    Path(f"{RWLOCK}.lock").mkdir()
    assert ALL_INTACT.fullmatch(output_of_verify())
    assert finished.repro() == []


@pytest.mark.parametrize(
    "lock",
    ["stages: []", "stages: {train: }", "stages: {train: {outs: [{path: data}]}}", "- 1", "x: ["],
)
def test_malformed_lock_in_git_does_not_stop_the_next_run(
    lock: str, finished: Project, output_of_verify: Verify
) -> None:
    before = finished.results()
    LOCK.write_text(f"{lock}\n")
    commit(finished, "Commit a malformed dvc.lock")
    output_of_verify()
    finished.repro()
    assert finished.results() == before


def test_empty_folders_in_the_run_cache_are_removed(
    finished: Project, output_of_verify: Verify
) -> None:
    """DVC fails at them as soon as a stage must run."""
    before = finished.results()
    for entry in Path(".dvc/cache/runs").glob("*/*/*"):
        entry.unlink()
    LOCK.unlink()
    output_of_verify()
    assert len(finished.repro()) == 2
    assert finished.results() == before


def test_folder_of_the_user_is_named_not_removed() -> None:
    """An output that is a folder now is not a damaged file."""
    for path in (MODEL, CHECKPOINT, Path("data/.own.part")):
        path.unlink(missing_ok=True)
        own = path / "notes.txt"
        path.mkdir()
        own.write_text("mine")
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: .*folder.*move"):
            verify.main()
        assert own.read_text() == "mine"
        shutil.rmtree(path)


@pytest.mark.parametrize("folder", ["report", "data/../report/", "."])
def test_outputs_of_a_stage_in_another_folder(
    folder: str, finished: Project, output_of_verify: Verify, tmp_path: Path
) -> None:
    """Paths in dvc.lock are relative to the working directory of the stage."""
    up = os.path.relpath(".", folder)
    outs = ("--outs=notes", f"--outs-no-cache={up}/../beside")
    Path("report").mkdir()
    command = f"echo 1 > notes; echo 1 > {up}/../beside"
    finished.run("dvc", "stage", "add", "--name=report", f"--wdir={folder}", *outs, command)
    finished.repro()
    beside, written = tmp_path / "beside", Path(folder, "notes")
    own = [Path("notes/todo.txt"), Path("beside/todo.txt"), Path("report/todo.txt")]
    for path in own[folder == "." :]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert ALL_INTACT.fullmatch(output_of_verify())
    beside.unlink()
    beside.mkdir()
    written.unlink()
    written.symlink_to("nowhere")
    unfinished = written.with_name(".UUxMJJcDpBt_UgGvjNj3Lw.tmp")  # by DVC, killed
    hidden = written.with_name(".own.tmp")
    unfinished.touch()
    hidden.touch()
    with pytest.raises(UserError, match=r"notes: .*not a regular file.*move"):
        verify.main()
    assert written.is_symlink()
    assert not unfinished.exists()
    assert hidden.exists()
    written.unlink()
    assert output_of_verify()
    assert beside.is_dir()
    assert all(path.read_text() == "mine" for path in own[folder == "." :])


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("rm -r .git", r"\.git: .*`git init`"),
        ("rm -r .dvc", r"\.dvc: not found; .*hidden.*`git checkout \.dvc`"),
        ("mv data elsewhere; ln -s elsewhere data", r"data: is a link.*`dvc cache dir --local .*`"),
        ("rm -rf .dvc/site_cache; touch .dvc/site_cache", r"\.dvc/site_cache: .*`rm \S+`"),
        ("rm -r .dvc/tmp; touch .dvc/tmp", r"\.dvc/tmp: .*not a folder; run `rm \.dvc/tmp`"),
        ("echo > dvc.yaml", r"dvc\.yaml: .*stages.*`git checkout dvc\.yaml`"),
        (r"printf 'train:\n\tseed: 0\n' > params.yaml", r"params\.yaml: line 2: .+"),
        ("echo [core > .dvc/config", r"\.dvc: .*\[core.*line 1.*`git checkout \.dvc/config`"),
        (
            "rm params.yaml; mkfifo params.yaml",
            r"params\.yaml: .*regular file.*`rm -r params\.yaml`.*`git checkout params\.yaml`",
        ),
    ],
)
def test_mistake_that_stops_dvc_is_one_line(mistake: str, message: str, finished: Project) -> None:
    finished.run("sh", "-c", mistake)
    with pytest.raises(UserError) as error:
        verify.main()
    assert re.fullmatch(message, str(error.value))


def databases(project: Project, folder: str = ".") -> Path:
    """Return where DVC keeps its databases, as it says in a folder of the project."""
    doctor = 'cd "$1" && dvc doctor'
    printed = project.with_variables(DVC_SITE_CACHE_DIR="").run("sh", "-c", doctor, "sh", folder)
    (path,) = re.findall("^Repo.site_cache_dir: (.*)$", printed, re.MULTILINE)
    return Path(path)


def test_databases_of_dvc_stay_in_the_project(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify.main()
    before = databases(finished)
    assert before.is_relative_to(finished.root)
    assert databases(finished, "docs") == before
    moved = Project(tmp_path / "a [b] %c, #é $HOME 'd", {})
    shutil.move(finished.root, moved.root)
    finished.root.mkdir()  # for the fixture to remove
    monkeypatch.chdir(moved.root)
    verify.LOCAL_CONFIG.chmod(0o600)
    verify.main()
    assert verify.LOCAL_CONFIG.stat().st_mode & 0o777 == 0o600
    assert databases(moved).is_relative_to(moved.root)
    moved.run("dvc", "config", "--local", "core.site_cache_dir", str(tmp_path / "own"))
    verify.main()
    assert databases(moved).is_relative_to(tmp_path / "own")


def test_databases_that_others_could_write_are_not_used(finished: Project) -> None:
    """DVC creates their folder with all permissions, and it unpickles what it finds there."""
    planted = finished.root / ".dvc/site_cache/repo/planted"
    planted.mkdir(parents=True, exist_ok=True)
    planted.parent.chmod(0o777)
    verify.main()
    assert not planted.exists()
    databases(finished)
    for folder in (planted.parent, *planted.parent.rglob("*")):
        assert folder.stat().st_mode & 0o022 == 0


@pytest.mark.parametrize("content", [b"", b"not a database", None])
def test_damaged_databases_are_removed(
    content: bytes | None, finished: Project, output_of_verify: Verify
) -> None:
    output_of_verify()  # removes those of other users
    assert finished.repro() == []
    damaged = sorted(Path(".dvc/site_cache").rglob("*.db"))
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    printed = output_of_verify()
    assert printed == repaired(*damaged) if content != b"" else ALL_INTACT.fullmatch(printed)
    assert finished.repro() == []


def test_git_says_why_it_fails(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # as in a clone of another user
    with pytest.raises(UserError, match=rf"^\.git: .*safe\.directory {finished.root}$"):
        verify.main()
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    with pytest.raises(UserError, match=r"^\.git: .*'/nowhere'; unset GIT_DIR$"):
        verify.main()


@pytest.mark.parametrize(
    "variables", [{"SHELL": "/usr/sbin/nologin"}, {"SHELL": "/bin/false"}, {"PYTHONSAFEPATH": "1"}]
)
def test_make_repro_works_in_any_environment(variables: dict[str, str], finished: Project) -> None:
    script = finished.root / ".venv/bin/dvc"  # it names the place where .venv was made
    script.parent.mkdir(parents=True)
    script.write_text("#!/nowhere/.venv/bin/python\n")
    script.chmod(0o755)
    finished.set(seed=1)
    printed = make_repro(finished.with_variables(**variables))
    assert "Running stage 'train'" in printed
    assert finished.repro() == []


def test_cache_may_be_in_another_folder(finished: Project, output_of_verify: Verify) -> None:
    shutil.move(".dvc/cache", "elsewhere")
    finished.run("dvc", "cache", "dir", "--local", "elsewhere")
    cached = (
        finished.root
        / "elsewhere"
        / cached_path(finished, str(MODEL)).relative_to(finished.root / ".dvc/cache")
    )
    cut(cached)
    assert output_of_verify() == repaired(f"{MODEL} in the cache")
    assert not cached.exists()


def test_hardlink_lock_is_released(finished: Project, output_of_verify: Verify) -> None:
    """DVC advises this lock for NFS and Lustre: a lock file that exists is a lock that is held."""
    finished.run("dvc", "config", "--local", "core.hardlink_lock", "true")
    for lock in Path(".dvc/tmp").glob("*lock"):  # of the other kind: as in a new clone
        lock.unlink()
    for _ in range(2):
        assert ALL_INTACT.fullmatch(output_of_verify())
        assert finished.repro() == []


def test_project_in_a_subfolder_of_a_repository(
    finished: Project, output_of_verify: Verify
) -> None:
    """A monorepo: Git's folder is above the project."""
    shutil.move(".git", "../.git")
    finished.run("git", "add", "--all", ".")
    finished.run("git", "commit", "--quiet", "--message=Move")
    assert ALL_INTACT.fullmatch(output_of_verify())
    assert finished.run("python", "-m", "tools.compare", "--last-run").startswith("reproduced: ")
    assert "made by train" in finished.run("python", "-m", "tools.provenance", str(MODEL))


def test_full_disk_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verify.main(disk_space=True)
    assert capsys.readouterr().out == ""
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    verify.main(disk_space=True)
    note = r"note: \S+: .* 0\.0 MB free.* \d+\.\d MB; .* rerun\n"
    assert re.fullmatch(f"({note}){{2}}", capsys.readouterr().out)  # the project and its cache


def test_full_or_read_only_disk_loses_nothing(finished_once: Project, tmp_path: Path) -> None:
    """The drill tries more folders and sizes."""
    try:
        with disk.on_small_disk(finished_once, tmp_path / "disk") as project:
            assert not disk.check_full(project, free=4096)
            disk.check_read_only(project, ".dvc/cache")
    except disk.CannotMountError as error:
        pytest.skip(f"no disk can be mounted here: {error}")
