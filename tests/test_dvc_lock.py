"""Reading dvc.lock, and checking that a stage reads the recorded data."""

import json
import os
from pathlib import Path

import pytest

from stages.shared.data import load_split
from stages.shared.dvc_lock import Entry, check_recorded, digest, parse_lock, stages_of
from stages.shared.errors import DamagedError, UserError
from stages.shared.model_file import load_model
from tests.conftest import ROOT, Project

MD5 = "d41d8cd98f00b204e9800998ecf8427e"  # of an empty file


@pytest.fixture
def run_by_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, with the environment of a stage that DVC runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "train")


def lock_with(**stage: object) -> str:
    return json.dumps({"schema": "2.0", "stages": {"train": stage}})


def test_params_have_their_full_names() -> None:
    params = {"params.yaml": {"train": {"seed": 0}, "flat.key": 3}, "other.yaml": {"key": [1]}}
    (stage,) = parse_lock(lock_with(params=params)).values()
    assert stage.named_params() == {"train.seed": 0, "flat.key": 3, "key": [1]}
    committed = parse_lock((ROOT / "dvc.lock").read_bytes())
    assert all("." in name for stage in committed.values() for name in stage.named_params())


def test_unknown_keys_are_ignored() -> None:
    url = {"path": "https://localhost/file", "hash": "md5", "checksum": "etag", "size": 9}
    out = {"path": "data/raw", "md5": f"{MD5}.dir", "nfiles": 1, "isexec": True}
    (stage,) = parse_lock(lock_with(cmd="python", deps=[url], outs=[out])).values()
    assert stage.deps == [Entry("https://localhost/file", size=9)]
    assert stage.outs == [Entry("data/raw", md5=f"{MD5}.dir")]


def test_malformed_lock_has_no_stages() -> None:
    conflict = "<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> other\n"
    outs = [{"md5": MD5}, {"path": "a", "md5": MD5[:30]}, {"path": "a", "md5": "../../file"}]
    texts = [lock_with(outs=[out]) for out in outs]
    for text in (*texts, conflict, "", "- 3", "stages:\n  train:\n", "stages: 2001-99-99"):
        assert stages_of(text) == {}
        with pytest.raises(ValueError, match=r"."):
            parse_lock(text)


@pytest.mark.usefixtures("run_by_dvc")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data/model.safetensors", r"damaged .*dvc\.lock.*`make repro`"),
        ("data/train.npz", r"data/train.npz\.dvc.*`dvc checkout --force data.*`dvc add data.*`"),
    ],
)
def test_stage_rejects_swapped_file(
    path: str, message: str, finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file is the output of a stage, the second is tracked by `dvc add`."""
    monkeypatch.chdir(finished.root)
    check_recorded(Path(path))
    Path(path).unlink()
    Path(path).write_bytes(Path("data/test.npz").read_bytes())
    with pytest.raises(UserError, match=rf"^{path}: .*{message}"):
        check_recorded(Path(path))
    monkeypatch.delenv("DVC_STAGE")
    check_recorded(Path(path))  # a stage that the user runs may read any file


@pytest.mark.usefixtures("run_by_dvc")
def test_folder_digest_is_that_of_dvc(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the names depends on how they are compared."""
    monkeypatch.chdir(finished.root)
    folder = Path("data/folder")
    for name in ("b", "a b", "é", "a/b", "a.b", "a/c/d", "B", "a/.DS_Store"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    finished.run("dvc", "add", "data/folder")
    assert digest(folder) in Path("data/folder.dvc").read_text()
    check_recorded(folder)
    (folder / "b").unlink()
    with pytest.raises(UserError, match=r"^data/folder: .*data/folder\.dvc; .*`dvc add"):
        check_recorded(folder)


def test_link_to_a_folder_is_rejected(tmp_path: Path) -> None:
    """DVC records such a folder as empty, and would not notice new files in it."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "data/letters"
    elsewhere.mkdir()
    (folder / "a").mkdir(parents=True)
    (elsewhere / "1.png").touch()
    (folder / "a/1.png").symlink_to(elsewhere / "1.png")  # as DVC can check out a file
    check_recorded(folder)
    for link in (folder / "b", folder / "a/b"):
        link.symlink_to(elsewhere)
        with pytest.raises(UserError, match=f"^{link}: is a link to a folder.*`dvc add`"):
            check_recorded(folder)
        link.unlink()


def test_pipe_is_not_read(tmp_path: Path) -> None:
    pipe = tmp_path / "folder/pipe"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    for read in (load_split, load_model, check_recorded, lambda _: check_recorded(pipe.parent)):
        with pytest.raises(DamagedError, match=r"pipe: damaged .*not a regular file.*`make repro`"):
            read(pipe)


@pytest.mark.usefixtures("run_by_dvc")
def test_file_without_record_is_accepted() -> None:
    Path("file").touch()
    check_recorded(Path("file"))
    for stage in ({}, {"outs": [{"path": "other", "md5": "0" * 32}]}):
        Path("dvc.lock").write_text(lock_with(**stage))
        check_recorded(Path("file"))
    check_recorded(Path("missing"))
    Path("dvc.lock").write_text(lock_with(outs=[{"path": "file", "md5": MD5}]))
    check_recorded(Path("file"))
