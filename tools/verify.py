"""Check every output recorded in dvc.lock, and remove what is damaged so that DVC makes it again.

DVC does not read a read-only file in its cache again, nor an output whose times are unchanged, and
it stops at files that a killed run left half-written. `make repro` therefore runs this first.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import psutil
from dvc.config import Config, ConfigError
from dvc.rwlock import SCHEMA as RWLOCK_SCHEMA
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.utils import dict_sha256
from dvc.utils.serialize import loads_yaml
from voluptuous import Invalid, Schema
from zc.lockfile import LockError, LockFile

from stages.shared.cli import argument_parser, run
from stages.shared.dvc_lock import LOCK, Entry, digest, parse_lock, stages_of
from stages.shared.errors import UserError
from stages.shared.params import read_sections

RWLOCK = Path(".dvc/tmp/rwlock")  # DVC's note of the processes that use a path
CHECKPOINT = Path("data/checkpoint.safetensors")


def check_setup() -> None:
    """Raise `UserError` if DVC cannot work here. DVC's own messages name no remedy."""
    if not Path(".git").exists():
        raise UserError(".git: not found, but DVC needs a Git repository; run `git init`")
    for path in map(Path, ("params.yaml", "dvc.yaml", ".dvc/config", ".dvc/config.local")):
        if os.path.lexists(path) and not path.is_file():
            remedy = f"run `rm -r {path}` and `git checkout {path}`"
            raise UserError(f"{path}: is not a regular file; {remedy}")
    stages = None
    with suppress(OSError, ValueError):
        stages = msgspec.yaml.decode(Path("dvc.yaml").read_bytes(), type=dict).get("stages")
    if not stages:
        raise UserError("dvc.yaml: has no stages; restore it with `git checkout dvc.yaml`")
    read_sections()  # raises UserError if params.yaml is malformed


def cache_folder() -> Path:
    """Return the folder of DVC's cache. Raise `UserError` if DVC's config is malformed."""
    try:
        return Path(Config(dvc_dir=".dvc")["cache"].get("dir", ".dvc/cache"))
    except ConfigError as error:
        remedy = "edit .dvc/config or .dvc/config.local, or run `git checkout .dvc/config`"
        raise UserError(f".dvc: {str(error).rstrip('.')}; {remedy}") from None


def remove(path: Path) -> None:
    """Remove the file, link or folder at `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def read_valid(path: Path, decode: Callable[[bytes], Any], schema: Schema) -> Any:
    """Return the content of a file, or None if it is not a regular file that DVC can read."""
    with suppress(Invalid, OSError, ValueError):
        if path.is_file():  # a pipe would block
            return schema(decode(path.read_bytes()))
    return None


def read_rwlock() -> Any:
    """Return DVC's note of its processes, including ended ones, or None if it is malformed."""
    return read_valid(RWLOCK, msgspec.json.decode, RWLOCK_SCHEMA)


def check_idle() -> None:
    """Raise `LockError` if another DVC process works in this project."""
    used = read_rwlock() or {"read": {}, "write": {}}
    processes = [*used["write"].values(), *chain(*used["read"].values())]
    if any(psutil.pid_exists(process["pid"]) for process in processes):
        raise LockError("another DVC works here")


def repair_rwlock() -> Iterator[str]:
    """Remove DVC's note of its processes if it is malformed."""
    if os.path.lexists(RWLOCK) and read_rwlock() is None:
        remove(RWLOCK)
        yield str(RWLOCK)


def decode_lock(data: bytes) -> Any:
    """Decode dvc.lock. Raise `ValueError` if its end is missing or a digest is malformed."""
    if not data.endswith(b"\n"):
        raise ValueError("the last line has no end")
    parse_lock(data)
    return msgspec.yaml.decode(data)


def repair_lock() -> Iterator[str]:
    """Restore dvc.lock from Git if it is malformed. Without a version in Git, only remove it."""
    if os.path.lexists(LOCK) and not read_valid(LOCK, decode_lock, COMPILED_LOCKFILE_SCHEMA):
        remove(LOCK)
        subprocess.run(["git", "checkout", "--quiet", "--", LOCK], stderr=subprocess.DEVNULL)
        yield str(LOCK)


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
        if not (entry.is_file() and is_intact_run(entry)):
            remove(entry)
            if not any(entry.parent.iterdir()):
                entry.parent.rmdir()  # DVC fails at an empty folder here
            yield str(entry)


def is_intact_run(entry: Path) -> bool:
    """Return whether a file of the run-cache is named after the hash of its content."""
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
        if out.md5.endswith(".dir") and listing.is_file() and not is_damaged(listing, out.md5):
            for file in json.loads(listing.read_bytes()):
                yield Path(out.path, file["relpath"]), file["md5"]


def is_damaged(path: Path, md5: str) -> bool:
    """Return whether `path` exists, but not as a file with this digest.

    The digest of a folder is the one of the list of its files, which is a file in the cache.
    """
    is_intact = path.is_file() and digest(path) == md5.removesuffix(".dir")
    return os.path.lexists(path) and not is_intact


def repair_outputs(cache: Path) -> Iterator[str]:
    """Remove what differs from dvc.lock: objects of the cache, and outputs in the workspace.

    An output that is a regular file stays, because the user may have edited it. Its times change,
    so that DVC reads it again.
    """
    for path, md5 in recorded_files(cache):
        cached = object_path(cache, md5)
        if is_damaged(cached, md5):
            remove(cached)
            yield f"{path} in the cache"
        is_folder = md5.endswith(".dir")  # its files follow
        if not is_folder and is_damaged(path, md5):
            if path.is_file():
                os.utime(path)
            else:
                remove(path)
            yield str(path)


def summary(repaired: list[str]) -> str:
    """Describe in one line what was verified or repaired."""
    if repaired:
        return f"repaired (did not match dvc.lock): {', '.join(repaired)}"
    outs = recorded_outputs()
    present = sum(os.path.lexists(out.path) for out in outs)
    return f"verified {present} of {len(outs)} outputs in dvc.lock"


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
