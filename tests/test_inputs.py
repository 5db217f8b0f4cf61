"""A stage fails if its params, code or data change while it runs, so that DVC records nothing."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from stages import CODE_STATS, evaluate, file_stats, train
from stages.shared import inputs
from stages.shared.distributed import Ranks
from stages.shared.errors import UserError
from stages.shared.inputs import Inputs
from tests.conftest import STAGES, Project, error_of

TRAIN_DATA = Path("data/train.npz")
Edit = Callable[[Project], None]


@pytest.fixture(autouse=True)
def train_stage(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a clone, with the environment of the stage train."""
    monkeypatch.chdir(finished.root)
    monkeypatch.setenv("DVC_STAGE", "train")


def replace_data(project: Project) -> None:
    (project.root / TRAIN_DATA).unlink()
    (project.root / TRAIN_DATA).write_bytes(project.read("data/test.npz"))


def write_data_again(project: Project) -> None:
    content = project.read(str(TRAIN_DATA))
    (project.root / TRAIN_DATA).unlink()
    (project.root / TRAIN_DATA).write_bytes(content)


def delete_section(project: Project) -> None:
    text = (project.root / "params.yaml").read_text()
    (project.root / "params.yaml").write_text(re.sub("^model:", "network:", text, flags=re.M))


CHANGES: dict[str, tuple[Edit, str]] = {
    "param": (
        lambda project: project.set(learning_rate=0.001),
        r"params\.yaml: train\.learning_rate changed from 0\.1 to 0\.001",
    ),
    "section": (delete_section, r"params\.yaml: model\.\w+ changed from .* to missing"),
    "half an edit": (
        lambda project: project.append("params.yaml", "trai: [0"),
        r"params\.yaml: line \d+: .*",
    ),
    "code": (
        lambda project: project.append("stages/model.py", "# edited\n"),
        r"stages/model\.py: its MD5 changed from \w+ to \w+",
    ),
    "deleted code": (
        lambda project: (project.root / "stages/model.py").unlink(),
        r"stages/model\.py: its MD5 changed from \w+ to missing",
    ),
    "data": (replace_data, r"data/train\.npz: its MD5 changed from \w+ to \w+"),
}
NO_CHANGES: dict[str, Edit] = {
    "comment": lambda project: project.append("params.yaml", "\n# a comment\n"),
    "section of another stage": lambda project: project.append("params.yaml", "other: 1\n"),
    "data": write_data_again,
    "code of another stage": lambda project: project.append("stages/evaluate.py", "# edited\n"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_an_error_with_both_values(name: str, finished: Project) -> None:
    edit, message = CHANGES[name]
    state = Inputs(resumes=True)
    state.check_unchanged()
    edit(finished)
    with pytest.raises(UserError, match=f"^{message} .*nothing is recorded; set it back.*rerun"):
        state.check_unchanged()


@pytest.mark.parametrize("name", NO_CHANGES)
def test_same_values_and_content_are_no_change(name: str, finished: Project) -> None:
    state = Inputs()
    NO_CHANGES[name](finished)
    state.check_unchanged()


def test_file_of_a_folder_that_dvc_tracks(finished: Project) -> None:
    folder = finished.root / "data/letters"
    folder.mkdir()
    (folder / "a").touch()
    finished.run("dvc", "add", "data/letters")
    path = finished.root / "dvc.yaml"
    path.write_text(path.read_text().replace("- data/train.npz", "- data/letters", 1))
    state = Inputs()
    (folder / "a").touch()
    state.check_unchanged()
    (folder / "b").touch()
    with pytest.raises(UserError, match=r"^data/letters: .*changed"):
        state.check_unchanged()


@pytest.mark.parametrize("params", ["- other.yaml:", "- other.yaml:\n      - a.b"])
def test_params_of_another_file(params: str, finished: Project) -> None:
    path, other = finished.root / "dvc.yaml", finished.root / "other.yaml"
    path.write_text(path.read_text().replace("- model\n", f"{params}\n", 1))
    other.write_text("a:\n  b: 1\n")
    state = Inputs()
    other.write_text("a:\n  b: 2\n")
    with pytest.raises(UserError, match=r"^other\.yaml: a\.b changed from 1 to 2"):
        state.check_unchanged()


def test_params_in_another_format(finished: Project) -> None:
    path, other = finished.root / "dvc.yaml", finished.root / "other.json"
    path.write_text(path.read_text().replace("- model\n", "- other.json:\n      - a\n", 1))
    other.write_text('{"a": 1}')
    state = Inputs()
    other.write_text('{"a": 2}')
    with pytest.raises(UserError, match=r"^other\.json: its MD5 changed"):
        state.check_unchanged()


def test_code_edited_while_python_imports_it(
    finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = (finished.root / "stages/model.py").resolve()
    monkeypatch.setitem(CODE_STATS, path, file_stats(path))
    Inputs()
    finished.append("stages/model.py", "# edited\n")
    with pytest.raises(UserError, match=r"^stages/model\.py: changed.*rerun"):
        Inputs()


@pytest.mark.parametrize("address", ["train", "dvc.yaml:train", "sub/dvc.yaml:train@0.1"])
def test_name_of_the_stage(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", address)
    assert inputs.stage_name() == "train"


MAINS: dict[str, Callable[[], None]] = {
    "train": partial(train.main, Ranks()),
    "evaluate": evaluate.main,
}


@pytest.mark.parametrize("stage", MAINS)
def test_stage_writes_no_output_after_a_change(
    stage: str, finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change comes right after the state was taken. Every dep of the stage is tried."""
    monkeypatch.setenv("DVC_STAGE", stage)
    take_state = Inputs.__init__
    for dep in STAGES[stage]["deps"]:
        whole = finished.read(dep)

        def take_state_and_edit(self: Inputs, *, resumes: bool = False, dep: str = dep) -> None:
            take_state(self, resumes=resumes)
            if dep.startswith("stages/"):
                finished.append(dep, "\n")
            else:
                (finished.root / dep).touch()
                monkeypatch.setattr(inputs, "digest", lambda _: "0" * 32)

        monkeypatch.setattr(Inputs, "__init__", take_state_and_edit)
        assert re.match(f"error: {dep}: .*changed", error_of(MAINS[stage], finished, monkeypatch))
        monkeypatch.undo()
        monkeypatch.setenv("DVC_STAGE", stage)
        monkeypatch.chdir(finished.root)
        (finished.root / dep).unlink()
        (finished.root / dep).write_bytes(whole)


def test_training_prints_one_note_and_ends_in_an_error(
    finished: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_progress = train.save_progress

    def save_and_edit(*arguments: object) -> None:
        save_progress(*arguments)  # type: ignore[arg-type]
        finished.set(momentum=0.9)

    monkeypatch.setattr(train, "save_progress", save_and_edit)
    before = finished.params()["train"]["momentum"]
    with pytest.raises(UserError, match=r"train\.momentum changed from .* to 0\.9"):
        train.main(Ranks())
    printed = capsys.readouterr().out
    assert len(re.findall(r"^note: params\.yaml: train\.momentum ", printed, re.MULTILINE)) == 1
    assert train.CHECKPOINT.exists()

    monkeypatch.undo()
    monkeypatch.chdir(finished.root)
    monkeypatch.setenv("DVC_STAGE", "train")
    finished.set(momentum=before)
    num_epochs = finished.params()["train"]["num_epochs"]
    train.main(Ranks())
    printed = capsys.readouterr().out
    assert printed.startswith(f"resumed after epoch {num_epochs}, ")
    assert not train.CHECKPOINT.exists()


def test_changed_data_ends_the_training_at_once(
    finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is of an epoch that saw only the old data."""
    save_progress = train.save_progress
    epochs: list[int] = []

    def save_and_replace(*arguments: object) -> None:
        save_progress(*arguments)  # type: ignore[arg-type]
        epochs.append(1)
        replace_data(finished)

    monkeypatch.setattr(train, "save_progress", save_and_replace)
    with pytest.raises(UserError, match=r"^data/train\.npz: .*changed"):
        train.main(Ranks())
    assert len(epochs) == 1
