"""How a stage ends."""

import pytest

from stages.shared.command import run
from stages.shared.errors import UserError


def ends_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> object:
    def main() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["stage"])
    with pytest.raises(SystemExit) as stop:
        run(main)
    return stop.value.code


def test_a_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends_with(UserError("file: bad; fix it"), monkeypatch) == "error: file: bad; fix it"


def test_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    error = PermissionError(13, "Permission denied", "data/file")
    line = "error: data/file: permission denied; fix that and rerun"
    assert ends_with(error, monkeypatch) == line


def test_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends_with(KeyboardInterrupt(), monkeypatch) == "interrupted"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise KeyError("bug")

    monkeypatch.setattr("sys.argv", ["stage"])
    with pytest.raises(KeyError):
        run(main)


def test_there_are_no_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["stage", "--fast"])
    with pytest.raises(SystemExit) as stop:
        run(lambda: None)
    assert stop.value.code == 2
    assert "unrecognized arguments: --fast" in capsys.readouterr().err
