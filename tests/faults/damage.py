"""Damage each file that the pipeline or DVC reads, in each way and place, and see it made good."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path

import yaml
from tqdm import tqdm

from tests.conftest import Project

CHECKPOINT = "data/checkpoint.safetensors"
DOWNLOADS = ".downloads"
RUNS = ".dvc/cache/runs"  # stands for one file in it
TEXTS = (".dvc/config", "params.yaml", "dvc.yaml")
KINDS = ("flipped", "cut", "emptied", "folder", "dangling link", "pipe")


@dataclass(frozen=True)
class Damage:
    """A damaged file: `kind` says how. `place` is where: in the "workspace", as it is or "unseen"
    (with its times as before), or in the "cache" (read-only, so that DVC does not look).
    """

    file: str
    kind: str
    place: str

    def __str__(self) -> str:
        return f"{self.file} {self.kind} in {self.place}"


def outputs(project: Project) -> list[str]:
    """The files that dvc.lock names, those in folders too."""
    stages = yaml.safe_load(project.read("dvc.lock"))["stages"]
    paths = [project.root / out["path"] for stage in stages.values() for out in stage["outs"]]
    files = [
        file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])
    ]
    return [str(file.relative_to(project.root)) for file in files]


def cached(project: Project, file: str) -> Path:
    digest = md5(project.read(file), usedforsecurity=False).hexdigest()
    return project.root / ".dvc/cache/files/md5" / digest[:2] / digest[2:]


def damages(project: Project) -> Iterator[Damage]:
    for file in outputs(project):
        for kind in KINDS:
            yield Damage(file, kind, "workspace")
            if kind in KINDS[:2]:
                yield Damage(file, kind, "workspace, unseen")
            if cached(project, file).exists():
                yield Damage(file, kind, "cache")
                yield Damage(file, kind, "cache, and gone from the workspace")
    others = [*TEXTS, "dvc.lock", CHECKPOINT, RUNS]
    kept = sorted((project.root / DOWNLOADS).glob("*/*"))
    others += [str(path.relative_to(project.root)) for path in kept]
    for file in others:
        for kind in KINDS:
            yield Damage(file, kind, "workspace")


def inflict(project: Project, damage: Damage) -> None:
    path = project.root / damage.file
    if damage.file == RUNS:
        path = min(path.glob("*/*/*"))
    if damage.place.startswith("cache"):
        path = cached(project, damage.file)
        if "gone" in damage.place:
            (project.root / damage.file).unlink()
    whole = path.read_bytes() if path.exists() else b"checkpoint"
    before = path.stat() if path.exists() else None
    path.unlink(missing_ok=True)
    if damage.kind == "folder":
        path.mkdir()
        return
    if damage.kind == "dangling link":
        path.symlink_to("nowhere")
        return
    if damage.kind == "pipe":
        os.mkfifo(path)
        return
    # In a text that somebody may edit, the first byte of a key.
    place = 0 if path.suffix == ".yaml" else min(999, len(whole) // 2)
    path.write_bytes(
        {
            "flipped": whole[:place] + bytes((whole[place] ^ 1,)) + whole[place + 1 :],
            "cut": whole[: len(whole) // 2],
            "emptied": b"",
        }[damage.kind]
    )
    if before:
        path.chmod(before.st_mode)
        if damage.place != "workspace":
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def make(project: Project, ok: bool | None = True) -> str:
    """Run `make repro` in a clone, with the environment of these tests for its .venv."""
    return project.run("make", "--old-file=.venv/installed", "--eval=DVC := dvc", "repro", ok=ok)


def check(project: Project, damage: Damage) -> None:
    """Raise `AssertionError` unless `make repro` makes good of it, or names the file and a remedy.

    What is wrong in params.yaml or dvc.yaml may also be what somebody wanted.
    """
    before = project.results()
    inflict(project, damage)
    printed = make(project, ok=None)
    assert "Traceback" not in printed, printed
    if damage.file == CHECKPOINT:
        project.run("python", "-m", "stages.train")
    if damage.file == RUNS:
        project.run("dvc", "repro", "--force")  # which makes another one
    if damage.file.startswith(DOWNLOADS):
        told = project.run("python", "-m", "stages.fetch", ok=None)
        for line in re.findall("^error: .*$", told, re.MULTILINE):
            assert damage.file in line
            project.run("rm", "-rf", damage.file)
        project.run("python", "-m", "stages.fetch")
    if damage.file in TEXTS or project.results() != before:
        remedy = f"rm -rf {damage.file}; git checkout {damage.file}"
        if "error: " in printed or damage.file not in TEXTS:
            (line,) = re.findall("^error: .*$", printed, re.MULTILINE)
            assert damage.file in line
            remedy = "; ".join(re.findall("`((?:git|rm) .*?)`", line)) or remedy
        project.run("bash", "-c", remedy)
        make(project)
    assert project.results() == before
    assert project.run("git", "status", "--porcelain") == ""


def check_all(project: Project, tried: list[Damage]) -> None:
    """Raise `AssertionError` for the first of them that is not made good."""
    for damage in tqdm(tried, mininterval=30, miniters=1):
        try:
            check(project, damage)
        except AssertionError as error:
            raise AssertionError(f"{damage}: {error}") from None
