"""Fill the disk, or make a folder read-only, during a run, and check that nothing is lost."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import Project
from tests.faults.damage import CHECKPOINT, make_repro

MAKE_FAILED = re.compile(r"^make(\[\d+\])?: \*\*\*", re.MULTILINE)  # the number: a nested make
READ_ONLY = (".", "data", "metrics", ".dvc", ".dvc/cache", ".dvc/tmp", ".downloads", ".git")
BLOCK = 4096  # bytes


class CannotMountError(Exception):
    """This machine does not allow to mount a file system."""


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@contextmanager
def mounted(folder: Path, *arguments: str | Path) -> Iterator[None]:
    """Mount a file system at `folder`, which takes root on Linux. Raise `CannotMountError`."""
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


@contextmanager
def on_small_disk(project: Project, folder: Path) -> Iterator[Project]:
    """Yield a copy of `project` on a disk of 30 MB at `folder`. Raise `CannotMountError`."""
    folder.mkdir()
    with mounted(folder, "-t", "tmpfs", "-o", "size=30m", "tmpfs"):
        root = shutil.copytree(project.root, folder / "project", symlinks=True)
        yield Project(root, project.extra)


def check_recovery(project: Project, before: dict[Path, bytes]) -> None:
    """Raise `AssertionError` unless the committed params and `make repro` restore all results."""
    project.run("git", "checkout", "--quiet", "params.yaml")
    make_repro(project)
    (project.root / CHECKPOINT).unlink(missing_ok=True)  # of other params
    assert project.results() == before
    assert project.run("git", "status", "--porcelain") == ""


def check_full(project: Project, free: int) -> bool:
    """Train with `free` bytes on the disk of `project`. Return whether they were enough."""
    before = project.results()
    # With momentum a checkpoint is larger than the old outputs, which DVC removes first.
    project.set(seed=1000 + free, momentum=0.9)
    filler = project.root.parent / "filler"
    disk = os.statvfs(project.root)
    with filler.open("wb") as file:
        space = disk.f_bavail * disk.f_bsize - free
        if sys.platform == "linux":  # macOS has neither tmpfs nor this function
            os.posix_fallocate(file.fileno(), 0, space)
    with_bytecode = Project(project.root, {**project.extra, "PYTHONDONTWRITEBYTECODE": ""})
    printed = make_repro(with_bytecode, ok=None)
    filler.unlink()
    failed = bool(MAKE_FAILED.search(printed))
    if failed:
        assert "Traceback" not in printed, printed
        assert re.search("^(error|note): .*(No space left|MB free).* rerun$", printed, re.MULTILINE)
    check_recovery(project, before)
    return not failed


def check_read_only(project: Project, folder: str) -> None:
    """Train with a read-only folder, and then without."""
    before = project.results()
    project.set(seed=999)
    path = project.root / folder
    with mounted(path, "--bind", path):
        mount("-o", "remount,bind,ro", path)
        printed = make_repro(project, ok=None)
    if MAKE_FAILED.search(printed):
        assert "Traceback" not in printed, printed
        assert re.search("^(error|ERROR): .*Read-only file system", printed, re.MULTILINE), printed
    check_recovery(project, before)


def check_all(project: Project) -> int:
    """Try each read-only folder, and more and more free space. Return the number of runs."""
    for folder in READ_ONLY:
        check_read_only(project, folder)
    for blocks in range(1, 1000):
        if check_full(project, blocks * BLOCK):
            return len(READ_ONLY) + blocks
    raise AssertionError("the disk was never large enough")
