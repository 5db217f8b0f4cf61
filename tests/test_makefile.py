"""The Makefile, with the packages of the environment that runs the tests."""

import os
from pathlib import Path

from tests.conftest import ROOT, Project


def test_time_in_the_future_does_not_install_at_each_call(tmp_path: Path) -> None:
    """The clock of another machine, or of an archive, can be ahead."""
    prerequisite = tmp_path / "requirements.txt"
    prerequisite.touch()
    os.utime(prerequisite, (2**32, 2**32))
    rule = "stamp: requirements.txt\n\t@echo install\n\t$(TOUCH)\n"
    (tmp_path / "rules.mk").write_text(f"include {ROOT}/Makefile\n{rule}")
    project = Project(tmp_path, {})
    assert "install\n" in project.run("make", "-f", "rules.mk", "stamp")
    assert "install" not in project.run("make", "-f", "rules.mk", "stamp")
    os.utime(prerequisite, (2**32 + 9, 2**32 + 9))
    assert "install\n" in project.run("make", "-f", "rules.mk", "stamp")


def test_folder_name_is_not_executed(tmp_path: Path) -> None:
    """A shell would run what is in $(...) or backquotes."""
    folder = tmp_path / 'a $(touch one) `touch two`; "b'
    folder.mkdir()
    (folder / "rules.mk").write_text(f"include {ROOT}/Makefile\nshow:\n\t@$(IN_VENV) env\n")
    printed = Project(folder, {}).run("make", "-f", "rules.mk", "show")
    assert f"PATH={folder}/.venv/bin:" in printed
    assert sorted(path.name for path in folder.iterdir()) == ["rules.mk"]


def test_clone_of_git_for_windows_has_the_same_bytes(finished: Project, tmp_path: Path) -> None:
    options = ("-c", "core.autocrlf=true")
    finished.run("git", *options, "clone", "--quiet", ".", str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone", {})
    clone.run("git", "config", "core.autocrlf", "true")
    for name in ("dvc.lock", ".ci/run", "params.yaml"):
        assert clone.read(name) == finished.read(name)
    assert clone.run("git", "status", "--porcelain") == ""
