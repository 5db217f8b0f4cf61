"""How a command line ends: one line for a mistake, a traceback for a bug."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from errno import EACCES, EBADF, ENOMEM, ENOSPC
from pathlib import Path

import pytest
from PIL import Image

from stages.shared.cli import run
from stages.shared.data import save_split
from stages.shared.errors import UserError
from tests.conftest import ROOT, SMALL, Project


def run_main_that_raises(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["stage"])
    run(main)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("file: bad; fix it"), "error: file: bad; fix it"),
        (
            OSError(EACCES, "Permission denied", "data/file"),
            "error: data/file: Permission denied; fix that and rerun",
        ),
        (OSError(ENOSPC, "No space left"), "error: disk: No space left; fix that and rerun"),
        (OSError(ENOMEM, "No memory"), "error: memory: No memory; fix that and rerun"),
        (UserError("\x1b[2Jfile\n\udcff: bad"), r"error: \x1b[2Jfile\n\udcff: bad"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_error_that_the_user_can_fix_is_one_line(
    error: BaseException, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main_that_raises(error, monkeypatch)
    assert stop.value.code == line


@pytest.mark.parametrize("bug", [KeyError("bug"), OSError(EBADF, "Bad file descriptor")])
def test_bug_keeps_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(bug)):
        run_main_that_raises(bug, monkeypatch)


TOOL = """
from stages.shared.cli import run

def main():
    for _ in range({}):
        print("a line")

run(main)
"""


# One line is flushed at the end, 100,000 lines are more than the buffer holds.
@pytest.mark.parametrize("lines", [1, 100_000])
def test_closed_standard_output_ends_quietly(lines: int, tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text(TOOL.format(lines))
    reader, writer = os.pipe()
    os.close(reader)
    tool = subprocess.run(
        [sys.executable, tmp_path / "tool.py"],
        env={"PYTHONPATH": str(ROOT)},
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (tool.returncode, tool.stderr) == (1, b"")


@pytest.mark.parametrize(
    "problem",
    [
        "libcuda.so.1: cannot open shared object file: No such file or directory",  # no driver
        "cudaMallocManaged(&data, size) failed: no CUDA-capable device is detected",
    ],
)
@pytest.mark.parametrize("module", ["stages.train", "stages.evaluate", "tools.predict"])
def test_missing_gpu_of_the_cuda_build_is_one_line(
    module: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx/core.py").write_text(f"raise ImportError({problem!r})")
    project = Project(ROOT, {"PYTHONPATH": str(tmp_path)})
    line = project.run("python", "-m", module, ok=False)
    assert re.fullmatch(rf"error: MLX: {re.escape(problem)}; .*`make setup GPU=`\n", line)


@pytest.mark.parametrize("module", ["stages.train", "tools.compare", "tools.predict"])
def test_python_without_the_packages_is_one_line(module: str, tmp_path: Path) -> None:
    """As `python3` of the system is, if the environment is not activated."""
    (tmp_path / ".venv").mkdir()
    for folder in ("stages", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    python = [sys._base_executable, "-I", "-S", "-c"]  # type: ignore[attr-defined]
    start = (
        "import sys, runpy; sys.path.insert(0, '.'); runpy.run_module(sys.argv[1], {}, '__main__')"
    )
    line = Project(tmp_path, {}).run(*python, start, module, ok=False)
    assert re.fullmatch("error: .*not installed.*`source .venv/bin/activate`\n", line)


@pytest.mark.parametrize("code", ["import no_such_module", "from os import cuda"])
def test_other_import_error_keeps_its_traceback(code: str, tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx/core.py").write_text(code)
    project = Project(ROOT, {"PYTHONPATH": str(tmp_path)})
    assert "Traceback" in project.run("python", "-m", "stages.train", ok=False)


def test_missing_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main_that_raises(MemoryError(), monkeypatch)
    assert re.fullmatch("error: memory: .*rerun", str(stop.value.code))


def test_standard_streams_may_be_closed(finished: Project) -> None:
    command = "python -m stages.evaluate <&- >&- 2>&-"
    before = finished.results()
    finished.run("sh", "-c", command)
    assert finished.results() == before
    line = finished.run("sh", "-c", "python -m tools.predict - <&-", ok=False)
    assert re.fullmatch("error: -: .*\n", line)


# LC_ALL=C alone would make Python 3.7 and newer use UTF-8.
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_every_locale_gives_the_same_files(finished: Project) -> None:
    for name, split in SMALL.items():
        classes = ("\u00e9", "\u732b", "c")
        save_split(finished.root / f"data/{name}.npz", replace(split, class_names=classes))
        finished.run("dvc", "add", "--quiet", f"data/{name}.npz")
    with_utf8, with_ascii = (
        finished.with_variables(PYTHONUTF8="1"),
        finished.with_variables(**ASCII),
    )
    with_utf8.repro()
    finished.run("git", "commit", "--quiet", "--all", "--message=Gr\u00fc\u00dfe")
    results = finished.results()
    assert "\u732b".encode() in finished.read("metrics/confusion.csv")
    with_ascii.run("dvc", "repro", "--force")
    assert finished.results() == results
    Image.fromarray(SMALL["test"].images[0]).save(finished.root / "\u732b.png")
    for line in (
        "dvc plots diff --targets metrics/confusion.csv",
        "python -m tools.compare",
        "python -m tools.verify",
        "python -m tools.provenance data/model.safetensors",
    ):
        with_ascii.run(*line.split())
    assert r"\u732b" in with_ascii.run("python", "-m", "tools.predict", "\u732b.png")
