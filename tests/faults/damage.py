"""Damage each file that the pipeline or DVC reads, in several ways, and check the repair."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path

import yaml
from tqdm import tqdm

from tests.conftest import STAGES, Project

CHECKPOINT = "data/checkpoint.safetensors"
DOWNLOADS = ".downloads"
RUN_CACHE = ".dvc/cache/runs"  # as a damaged file: the first entry in it
EDITABLE = (".dvc/config", "params.yaml", "dvc.yaml")
KINDS = ("flipped", "cut", "emptied", "folder", "dangling link", "pipe")


@dataclass(frozen=True)
class Damage:
    """A damaged file: its path, one of KINDS, and where its content is damaged.

    The location is "workspace", "workspace, times kept", "cache" or "cache only". With its times
    kept, and in the cache because it is read-only, DVC does not read the file again. "cache only"
    means that the file is removed from the workspace.
    """

    file: str
    kind: str
    location: str

    def __str__(self) -> str:
        return f"{self.file} {self.kind} in {self.location}"


def output_files(project: Project) -> list[str]:
    """Return the output files of this project's stages in dvc.lock, including files in folders."""
    stages = yaml.safe_load(project.read("dvc.lock"))["stages"]
    paths = [
        project.root / out["path"]
        for name in stages
        if name in STAGES
        for out in stages[name]["outs"]
    ]
    folders = [path for path in paths if path.is_dir()]
    files = [path for path in paths if path not in folders]
    files += [file for folder in folders for file in sorted(folder.iterdir())]
    return [str(file.relative_to(project.root)) for file in files]


def cached_path(project: Project, file: str) -> Path:
    digest = md5(project.read(file), usedforsecurity=False).hexdigest()
    return project.root / ".dvc/cache/files/md5" / digest[:2] / digest[2:]


def all_damages(project: Project) -> Iterator[Damage]:
    for file in output_files(project):
        for kind in KINDS:
            yield Damage(file, kind, "workspace")
            if kind in ("flipped", "cut"):
                yield Damage(file, kind, "workspace, times kept")
            if cached_path(project, file).exists():
                yield Damage(file, kind, "cache")
                yield Damage(file, kind, "cache only")
    downloads = sorted((project.root / DOWNLOADS).glob("*/*"))
    others = [*EDITABLE, "dvc.lock", CHECKPOINT, RUN_CACHE]
    databases = sorted((project.root / ".dvc/site_cache").rglob("*.db"))
    others += [str(path.relative_to(project.root)) for path in (*downloads, *databases)]
    for file in others:
        for kind in KINDS:
            yield Damage(file, kind, "workspace")


def apply_damage(project: Project, damage: Damage) -> None:
    path = project.root / damage.file
    if damage.file == RUN_CACHE:
        path = min(path.glob("*/*/*"))
    if damage.location.startswith("cache"):
        path = cached_path(project, damage.file)
    if damage.location == "cache only":
        (project.root / damage.file).unlink()
    before = path.stat() if path.exists() else None
    content = path.read_bytes() if path.exists() else b"checkpoint"
    path.unlink(missing_ok=True)
    if damage.kind == "folder":
        path.mkdir()
    elif damage.kind == "dangling link":
        path.symlink_to("nowhere")
    elif damage.kind == "pipe":
        os.mkfifo(path)
    else:
        # The first byte of a YAML file belongs to a key, so its change cannot be an edit.
        index = 0 if path.suffix == ".yaml" else min(999, len(content) // 2)
        flipped = content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]
        contents = {"flipped": flipped, "cut": content[: len(content) // 2], "emptied": b""}
        path.write_bytes(contents[damage.kind])
        if before:
            path.chmod(before.st_mode)
            if damage.location != "workspace":
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def make_repro(project: Project, ok: bool | None = True) -> str:
    """Run `make repro` in a clone, with the packages of the environment that runs the tests."""
    return project.run("make", "--old-file=.venv/installed", "repro", ok=ok)


def check_repair(project: Project, damage: Damage) -> None:
    """Raise `AssertionError` unless `make repro` repairs the damage, or names file and remedy.

    Damage to a file that users edit may also be an edit, so Git restores it here.
    """
    before = project.results()
    apply_damage(project, damage)
    printed = make_repro(project, ok=None)
    assert "Traceback" not in printed, printed
    if damage.file == CHECKPOINT:
        project.run("python", "-m", "stages.train")
    if damage.file == RUN_CACHE:
        project.run("dvc", "repro", "--force")  # writes a new entry
    if damage.file.startswith(DOWNLOADS):
        fetched = project.run("python", "-m", "stages.fetch", ok=None)
        for line in re.findall("^error: .*$", fetched, re.MULTILINE):
            assert damage.file in line
            project.run("rm", "-rf", damage.file)
        project.run("python", "-m", "stages.fetch")
    if damage.file in EDITABLE or project.results() != before:
        remedy = f"rm -rf {damage.file}; git checkout {damage.file}"
        if "error: " in printed or damage.file not in EDITABLE:
            (line,) = re.findall("^error: .*$", printed, re.MULTILINE)
            assert damage.file in line
            remedy = "; ".join(re.findall("`((?:git|rm) .*?)`", line)) or remedy
        project.run("bash", "-c", remedy)
        make_repro(project)
    assert project.results() == before
    assert project.run("git", "status", "--porcelain") == ""


def check_repairs(project: Project, damages: list[Damage]) -> None:
    """Raise `AssertionError` that names the first damage that is not repaired."""
    for damage in tqdm(damages, mininterval=30, miniters=1):
        try:
            check_repair(project, damage)
        except AssertionError as error:
            raise AssertionError(f"{damage}: {error}") from None
