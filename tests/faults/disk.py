"""Let the disk be full, or a folder read-only, at each write of a run: nothing may be lost."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import Project
from tests.faults import damage

FAILED = re.compile(r"^make(\[\d+\])?: \*\*\*", re.MULTILINE)  # with a number below another make
READ_ONLY = (".", "data", "metrics", ".dvc", ".dvc/cache", ".dvc/tmp", ".downloads", ".git")


class CannotMountError(Exception):
    """Why nothing can be mounted here."""


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@contextmanager
def mounted(folder: Path, *arguments: str | Path) -> Iterator[None]:
    """Mount something at `folder`, as root can on Linux; raises `CannotMountError` elsewhere."""
    try:
        mount(*arguments, folder)
    except subprocess.CalledProcessError as error:
        raise CannotMountError(error.stderr.decode()) from None
    except FileNotFoundError as error:
        raise CannotMountError(error) from None
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def recover(project: Project, before: dict[Path, bytes]) -> None:
    """Back to the params in Git, one `make repro` gives the results of before."""
    project.run("git", "checkout", "--quiet", "params.yaml")
    damage.make(project)
    (project.root / damage.CHECKPOINT).unlink(missing_ok=True)  # of other params
    assert project.results() == before
    assert project.run("git", "status", "--porcelain") == ""


def check_full(project: Project, free: int) -> bool:
    """Train with `free` bytes left on the disk of `project`; return whether these were enough."""
    before = project.results()
    # With momentum a checkpoint takes more than DVC frees when it removes the old outputs.
    project.set(seed=1000 + free, momentum=0.9)
    filler = project.root.parent / "filler"
    disk = os.statvfs(project.root)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_bsize - free)
    with_bytecode = Project(project.root, {**project.extra, "PYTHONDONTWRITEBYTECODE": ""})
    printed = damage.make(with_bytecode, ok=None)
    filler.unlink()
    enough = not FAILED.search(printed)
    if not enough:
        assert "Traceback" not in printed, printed
        assert re.search("^(error|note): .*(No space left|MB free).* rerun$", printed, re.MULTILINE)
    recover(project, before)
    return enough


def check_read_only(project: Project, folder: str) -> None:
    """Train with a folder read-only, and then without."""
    before = project.results()
    project.set(seed=999)
    path = project.root / folder
    with mounted(path, "--bind", path):
        mount("-o", "remount,bind,ro", path)
        printed = damage.make(project, ok=None)
    if FAILED.search(printed):
        assert "Traceback" not in printed, printed
        assert re.search("^(error|ERROR): .*Read-only file system", printed, re.MULTILINE), printed
    recover(project, before)


def main(project: Project) -> int:
    """Try all of it on a project on a small disk; return in how many cases a run failed."""
    for folder in READ_ONLY:
        check_read_only(project, folder)
    for cases in range(1, 1000):
        if check_full(project, cases * 4096):
            return len(READ_ONLY) + cases
    raise AssertionError("the disk was never large enough")
