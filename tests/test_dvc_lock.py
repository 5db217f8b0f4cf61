"""That DVC's record of a file is what the stages read."""

import json
import os
from hashlib import md5
from pathlib import Path

import pytest

from stages.shared.data import load_split
from stages.shared.dvc_lock import check_recorded
from stages.shared.errors import DamagedError, UserError
from stages.shared.model_file import load_model
from tests.conftest import Project


@pytest.fixture
def run_by_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in a folder, as DVC's stage."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "train")


@pytest.mark.usefixtures("run_by_dvc")
def test_dvc_knows_what_a_stage_reads(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of a stage, and what `dvc add` tracks; each swapped for a file that is whole."""
    monkeypatch.chdir(finished.root)
    model, train = Path("data/model.safetensors"), Path("data/train.npz")
    lines = {
        model: f"{model}: damaged (it is not what dvc.lock names); repair it with `make repro`",
        train: "data/train.npz: is not what data/train.npz.dvc names; get that with `dvc checkout"
        " --force data/train.npz`, or keep this with `dvc add data/train.npz`",
    }
    for path, line in lines.items():
        check_recorded(path)
        path.unlink()
        path.write_bytes(Path("data/test.npz").read_bytes())
        with pytest.raises(UserError) as error:
            check_recorded(path)
        assert str(error.value) == line
    monkeypatch.delenv("DVC_STAGE")
    check_recorded(model)  # a stage that somebody runs by hand may read anything


@pytest.mark.usefixtures("run_by_dvc")
def test_a_folder_is_known_by_the_list_of_its_files(
    finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against DVC's own digest of a folder with names that sort in odd ways."""
    monkeypatch.chdir(finished.root)
    folder = Path("data/folder")
    for name in ("b", "a b", "é", "a/b", "a.b", "a/c/d", "B"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    finished.run("dvc", "add", "data/folder")
    check_recorded(folder)
    (folder / "b").unlink()
    with pytest.raises(UserError, match=r"is not what data/folder\.dvc names"):
        check_recorded(folder)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    for place in ("pipe", "folder/pipe"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        os.mkfifo(path)
        for read in (load_split, load_model, check_recorded):
            with pytest.raises(DamagedError, match="it is not a regular file"):
                read(path if place == "pipe" or read != check_recorded else path.parent)


@pytest.mark.usefixtures("run_by_dvc")
def test_without_a_record_there_is_nothing_to_compare_with() -> None:
    Path("file").write_text("")
    check_recorded(Path("file"))
    Path("dvc.lock").write_text(json.dumps({"stages": {"one": {}}}))
    check_recorded(Path("file"))
    check_recorded(Path("missing"))
    digest = md5(b"", usedforsecurity=False).hexdigest()
    outs = [{"path": "file", "md5": digest}]
    Path("dvc.lock").write_text(json.dumps({"stages": {"one": {"outs": outs}}}))
    check_recorded(Path("file"))
