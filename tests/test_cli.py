"""How a stage ends."""

import os
import subprocess
import sys
from errno import EACCES, EBADF, ENOSPC
from pathlib import Path

import pytest

from stages.shared.cli import argument_parser, run
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


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(EACCES, "Permission denied", "data/file"),
            "error: data/file: Permission denied; fix that and rerun",
        ),
        (OSError(ENOSPC, "No space left"), "error: disk: No space left; fix that and rerun"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    error: OSError, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ends_with(error, monkeypatch) == line


def test_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends_with(KeyboardInterrupt(), monkeypatch) == "interrupted"


@pytest.mark.parametrize("bug", [KeyError("bug"), OSError(EBADF, "Bad file descriptor")])
def test_a_bug_keeps_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise bug

    monkeypatch.setattr("sys.argv", ["stage"])
    with pytest.raises(type(bug)):
        run(main)


@pytest.mark.parametrize("lines", [1, 100_000])  # left in the buffer at the end, or too many for it
def test_nobody_reads_on(lines: int, tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text(
        f"""
from stages.shared.cli import run

def main():
    for _ in range({lines}):
        print("a line")

run(main)
"""
    )
    reader, writer = os.pipe()
    os.close(reader)
    tool = subprocess.run(
        [sys.executable, tmp_path / "tool.py"],
        env={"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (tool.returncode, tool.stderr) == (1, b"")


def test_arguments_reach_main(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def main(files: list[str], fast: bool) -> None:
        found.append((files, fast))

    parser = argument_parser("")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--fast", action="store_true")
    monkeypatch.setattr("sys.argv", ["tool", "a", "b", "--fast"])
    run(main, parser)
    assert found == [(["a", "b"], True)]


def test_a_stage_has_no_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["stage", "--fast"])
    with pytest.raises(SystemExit) as stop:
        run(lambda: None)
    assert stop.value.code == 2
    assert "unrecognized arguments: --fast" in capsys.readouterr().err
