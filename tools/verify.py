"""Check every output recorded in dvc.lock, and remove what is damaged so that DVC makes it again.

DVC does not read a read-only file in its cache again, nor an output whose times are unchanged, and
it stops at files that a killed run left half-written. `make repro` therefore runs this first.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path

import msgspec
import psutil
from dvc.config import Config, ConfigError
from dvc.utils import dict_sha256
from dvc.utils.serialize import loads_yaml
from voluptuous import Invalid
from zc.lockfile import LockError, LockFile

from stages.shared.cli import argument_parser, run
from stages.shared.dvc_lock import LOCK, Entry, digest, parse_lock, stages_of
from stages.shared.errors import UserError
from stages.shared.params import read_sections

RWLOCK = Path(".dvc/tmp/rwlock")  # DVC's note of the processes that use a path
CHECKPOINT = Path("data/checkpoint.safetensors")


class Process(msgspec.Struct):
    """A process of DVC."""

    pid: int
    cmd: str


class PathsInUse(msgspec.Struct):
    """The content of RWLOCK: which processes read or write a path."""

    read: dict[str, list[Process]] = {}
    write: dict[str, Process] = {}


def check_setup() -> None:
    """Raise `UserError` if DVC cannot work here. DVC's own messages name no remedy."""
    if not Path(".git").exists():
        raise UserError(".git: not found, but DVC needs a Git repository; run `git init`")
    for path in map(Path, ("params.yaml", "dvc.yaml", ".dvc/config", ".dvc/config.local")):
        if os.path.lexists(path) and not path.is_file():
            remedy = f"run `rm -r {path}` and `git checkout {path}`"
            raise UserError(f"{path}: is not a regular file; {remedy}")
    try:
        stages = msgspec.yaml.decode(Path("dvc.yaml").read_bytes(), type=dict).get("stages")
    except (OSError, ValueError):
        stages = None
    if not stages:
        raise UserError("dvc.yaml: has no stages; restore it with `git checkout dvc.yaml`")
    read_sections()  # raises UserError if params.yaml is malformed


def cache_folder() -> Path:
    """Return the folder of DVC's cache. Raise `UserError` if DVC's config is malformed."""
    try:
        return Path(Config(dvc_dir=".dvc")["cache"].get("dir", ".dvc/cache"))
    except ConfigError as error:
        problem = str(error).rstrip(".")
        remedy = "edit .dvc/config or .dvc/config.local, or run `git checkout .dvc/config`"
        raise UserError(f".dvc: {problem}; {remedy}") from None


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file. Raise `OSError` for a pipe, which would block."""
    if not path.is_file():
        raise OSError(f"{path} is not a regular file")
    return path.read_bytes()


def read_rwlock() -> list[Process] | None:
    """Return the processes in DVC's note, including ended ones. Return None if it is malformed."""
    try:
        data = read_regular(RWLOCK) if os.path.lexists(RWLOCK) else b"{}"
        used = msgspec.json.decode(data, type=PathsInUse)
    except (OSError, ValueError):
        return None
    return [*used.write.values(), *chain(*used.read.values())]


def check_idle() -> None:
    """Raise `LockError` if another DVC process works in this project."""
    if any(psutil.pid_exists(process.pid) for process in read_rwlock() or []):
        raise LockError("another DVC works here")


def remove(path: Path) -> None:
    """Remove the file, link or folder at `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def repair_rwlock() -> Iterator[str]:
    """Remove DVC's note of its processes if it is malformed."""
    if read_rwlock() is None:
        remove(RWLOCK)
        yield str(RWLOCK)


def repair_lock() -> Iterator[str]:
    """Restore dvc.lock from Git if it is malformed. Without a version in Git, only remove it."""
    if os.path.lexists(LOCK) and not is_whole(LOCK):
        remove(LOCK)
        subprocess.run(["git", "checkout", "--quiet", "--", LOCK], stderr=subprocess.DEVNULL)
        yield str(LOCK)


def is_whole(lock: Path) -> bool:
    """Return whether a dvc.lock is the version in Git, or one that DVC can read up to its end."""
    in_git = ["git", "diff", "--quiet", "HEAD", "--", str(lock)]
    if subprocess.run(in_git, stderr=subprocess.DEVNULL).returncode == 0:
        return True
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA  # takes 0.1 s

    try:
        data = read_regular(lock)
        COMPILED_LOCKFILE_SCHEMA(msgspec.yaml.decode(data))
        parse_lock(data)
    except (Invalid, OSError, ValueError):
        return False
    return data.endswith(b"\n")


def remove_leftovers() -> Iterator[str]:
    """Remove unfinished files of DVC and the stages, and a checkpoint that is not a file."""
    hidden = [*sorted(Path("data").glob(".*")), *sorted(Path("metrics").glob(".*"))]
    leftovers = [path for path in hidden if path.suffix in (".tmp", ".part")]
    if os.path.lexists(CHECKPOINT) and not CHECKPOINT.is_file():
        leftovers.append(CHECKPOINT)
    for path in leftovers:
        remove(path)
        yield str(path)


def repair_run_cache(cache: Path) -> Iterator[str]:
    """Remove the damaged entries of the run-cache, DVC's record of earlier runs."""
    for entry in cache.glob("runs/??/*/*"):
        if not is_intact_run(entry):
            remove(entry)
            if not any(entry.parent.iterdir()):
                entry.parent.rmdir()  # DVC fails at an empty folder here
            yield str(entry)


def is_intact_run(entry: Path) -> bool:
    """Return whether an entry of the run-cache is a file named after the hash of its content."""
    if not entry.is_file():
        return False
    # PyYAML (in msgspec) is ten times faster than DVC's parser, but it reads 1e-05 as text.
    for parse in (msgspec.yaml.decode, loads_yaml):
        with suppress(Exception):  # damaged text can make a parser raise anything
            content = parse(entry.read_bytes())
            if dict_sha256(content, exclude=["size", "nfiles"]) == entry.name:
                return True
    return False


def recorded_outputs() -> list[Entry]:
    """Return the outputs in dvc.lock that have a digest."""
    stages = stages_of(LOCK.read_bytes()) if LOCK.is_file() else {}
    return [out for stage in stages.values() for out in stage.outs if out.md5]


def object_path(cache: Path, md5: str) -> Path:
    """Return where DVC caches a file, or the list of a folder's files, by its digest."""
    return cache / "files/md5" / md5[:2] / md5[2:]


def recorded_files(cache: Path) -> Iterator[tuple[Path, str]]:
    """Yield path and digest of each output in dvc.lock, and of each file in an output folder.

    The cache lists the files of a folder. Without an intact list DVC itself reads the folder again.
    """
    for out in recorded_outputs():
        yield Path(out.path), out.md5
        listing = object_path(cache, out.md5)
        if out.md5.endswith(".dir") and is_intact(listing, out.md5):
            for file in json.loads(listing.read_bytes()):
                yield Path(out.path, file["relpath"]), file["md5"]


def is_intact(path: Path, md5: str) -> bool:
    """Return whether `path` is a file with this digest; for a folder, the list of its files."""
    return path.is_file() and digest(path) == md5.removesuffix(".dir")


def repair_outputs(cache: Path) -> Iterator[str]:
    """Remove what differs from dvc.lock: objects of the cache, and outputs in the workspace.

    An output that is a regular file stays, because the user may have edited it. Its times change,
    so that DVC reads it again.
    """
    for path, md5 in recorded_files(cache):
        cached = object_path(cache, md5)
        if os.path.lexists(cached) and not is_intact(cached, md5):
            remove(cached)
            yield f"{path} in the cache"
        if md5.endswith(".dir"):
            continue  # its files follow
        if os.path.lexists(path) and not is_intact(path, md5):
            if path.is_file():
                os.utime(path)
            else:
                remove(path)
            yield str(path)


def summary(repaired: list[str]) -> str:
    """Describe in one line what was verified or repaired."""
    outs = recorded_outputs()
    present = sum(os.path.lexists(out.path) for out in outs)
    if repaired:
        return f"repaired (did not match dvc.lock): {', '.join(repaired)}"
    if not present:
        return "nothing to verify: no output of dvc.lock is here yet"
    missing = "" if present == len(outs) else "; the others are not here yet"
    return f"verified {present} of {len(outs)} outputs in dvc.lock{missing}"


def report_disk_space(cache: Path) -> None:
    """Print a note for each disk that has less free space than a run may write."""
    needed = sum(out.size for out in recorded_outputs()) / 1e6
    for folder in {cache if cache.exists() else cache.parent, Path.cwd()}:
        free = shutil.disk_usage(folder).free / 1e6
        if free < needed:
            space = f"{free:,.1f} MB free, but a run may write {needed:,.1f} MB"
            print(f"note: {folder}: its disk has {space}; free some space and rerun")


def main(disk_space: bool = False) -> None:
    check_setup()
    cache = cache_folder()
    if disk_space:
        report_disk_space(cache)
        return
    try:
        RWLOCK.parent.mkdir(exist_ok=True)
        with closing(LockFile(f"{RWLOCK}.lock")):  # keeps other DVC processes from starting a stage
            check_idle()
            repaired = [
                *repair_rwlock(),
                *repair_lock(),
                *remove_leftovers(),
                *repair_run_cache(cache),
                *repair_outputs(cache),
            ]
        print(summary(repaired), flush=True)
    except LockError:
        print("note: another DVC process runs here; nothing is verified until it ends", flush=True)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--disk-space", action="store_true", help="only report a disk that is full")
    run(main, parser)
