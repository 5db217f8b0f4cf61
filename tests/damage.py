"""Damage each file that DVC keeps for the stages, in each way and place, and mend it."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import md5

from stages.model import MLP, Metadata, save_model
from tests.conftest import Project

RAW = "data/raw/train-images-idx3-ubyte"
# Who reads a file, and which other file of its kind may be taken for it.
FILES = {
    RAW: ("preprocess", "data/raw/t10k-images-idx3-ubyte"),
    "data/raw/t10k-labels-idx1-ubyte": ("preprocess", "data/raw/train-labels-idx1-ubyte"),
    "data/train.npz": ("train", "data/test.npz"),
    "data/validation.npz": ("train", "data/train.npz"),
    "data/test.npz": ("evaluate", "data/validation.npz"),
    "data/model.safetensors": ("evaluate", "data/other.safetensors"),
}


@dataclass(frozen=True)
class Damage:
    """A damaged file: `kind` says how, `place` where; "unseen" means that its times are kept."""

    file: str
    kind: str
    place: str

    def __str__(self) -> str:
        return f"{self.file} {self.kind} in {self.place}"


def damages() -> Iterator[Damage]:
    for file in FILES:
        for kind in ("flipped", "cut", "swapped"):
            for place in ("workspace", "workspace, unseen", "cache"):
                yield Damage(file, kind, place)


def inflict(project: Project, damage: Damage) -> None:
    """Damage the file; one in the cache stays read-only, and DVC checks it out."""
    path = project.root / damage.file
    whole = path.read_bytes()
    if damage.kind == "flipped":
        wrong = whole[:-9] + bytes((whole[-9] ^ 1,)) + whole[-8:]
        if damage.file.endswith(".npz"):  # not in the archive's directory
            wrong = whole[:999] + bytes((whole[999] ^ 1,)) + whole[1000:]
    elif damage.kind == "cut":
        wrong = whole[: len(whole) // 2]
    else:
        wrong = project.read(FILES[damage.file][1])
    if damage.place == "cache":
        digest = md5(whole, usedforsecurity=False).hexdigest()
        path.unlink()
        path = project.root / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(wrong)
    path.chmod(before.st_mode)
    if damage.place != "workspace":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    if damage.place == "cache":
        project.run("dvc", "checkout", damage.file)


def check(project: Project, damage: Damage) -> None:
    """Raise `AssertionError` unless the damage is refused by who reads the file, and mended."""
    before = project.results()
    other = project.root / "data/other.safetensors"
    save_model(other, MLP([784, 32, 32, 10]), Metadata([784, 32, 32, 10], "mnist", [*"0123456789"]))
    inflict(project, damage)
    other.unlink()
    stage, _ = FILES[damage.file]
    printed = project.run("dvc", "repro", "--force", "--single-item", stage, ok=False)
    line = rf"^error: {damage.file}: damaged \(.*\); mend it with `make verify`$"
    assert len(re.findall(line, printed, re.MULTILINE)) == 1, printed
    assert "Traceback" not in printed
    if damage.place == "workspace":
        project.run("dvc", "repro")
    else:
        # Not its .venv, which it has not: the one of this environment is on PATH.
        project.run("make", "--old-file=.venv/installed", "verify")
    assert project.results() == before
    assert project.run("git", "status", "--porcelain") == ""
