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
