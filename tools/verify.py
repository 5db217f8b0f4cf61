"""Check every output in dvc.lock, and drop what is damaged, so that DVC makes it anew.

DVC takes a read-only object of its cache, and a file with its old times, on trust, and it stops at
what a kill has left half written. `make repro` and `make verify` therefore run this before it.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import zc.lockfile
from dvc.config import Config, ConfigError
from dvc.utils import dict_sha256

from stages.shared.cli import run
from stages.shared.dvc_lock import digest
from stages.shared.errors import UserError
from stages.shared.params import read_sections
from tools.provenance import mapping

LOCK = Path("dvc.lock")
TMP = Path(".dvc/tmp")
LEFT = (".tmp", ".part")  # of a hidden file that DVC, or a stage, had not finished


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty one if it is missing or holds anything else."""
    try:
        return mapping(path.read_bytes()) if path.is_file() else {}
    except OSError:
        return {}


def intact(path: Path, md5: str) -> bool:
    """Whether there is a regular file at `path` with this digest."""
    return path.is_file() and digest(path) == md5


def remove(path: Path) -> None:
    """Remove whatever is at `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def cache_folder() -> Path:
    """Where DVC keeps its data. Raises `UserError` where DVC could not work at all."""
    if not Path(".git").exists():
        raise UserError(".git: not found, and DVC needs it; run `git init`")
    for path in map(Path, ("params.yaml", "dvc.yaml", ".dvc/config", ".dvc/config.local")):
        if os.path.lexists(path) and not path.is_file():
            remedy = f"`rm -r {path}` and `git checkout {path}` bring it back"
            raise UserError(f"{path}: is not a regular file; {remedy}")
    if not read_yaml(Path("dvc.yaml")).get("stages"):
        raise UserError("dvc.yaml: has no stages; get it back with `git checkout dvc.yaml`")
    read_sections()  # for DVC says of a mistake in several lines what it is
    try:
        config = Config(dvc_dir=".dvc")
    except ConfigError as error:
        problem = str(error).rstrip(".")
        raise UserError(
            f".dvc: {problem}; fix its config or config.local, or `git checkout .dvc/config`"
        ) from None
    return Path(config["cache"].get("dir", ".dvc/cache"))


@contextmanager
def no_other_dvc() -> Iterator[bool]:
    """Whether no other DVC works here; none begins to as long as the block runs."""
    TMP.mkdir(exist_ok=True)
    try:
        lock = zc.lockfile.LockFile(str(TMP / "rwlock.lock"))
    except zc.lockfile.LockError:
        yield False
        return
    try:
        held = read_yaml(TMP / "rwlock")
        holders = [*held.get("write", {}).values(), *chain(*held.get("read", {}).values())]
        yield not any(psutil.pid_exists(holder["pid"]) for holder in holders if holder)
    finally:
        lock.close()


def whole_lock() -> bool:
    """Whether dvc.lock is as in Git, missing, or what DVC could have written."""
    in_git = ["git", "diff", "--quiet", "HEAD", "--", str(LOCK)]
    if (
        not os.path.lexists(LOCK)
        or subprocess.run(in_git, stderr=subprocess.DEVNULL).returncode == 0
    ):
        return True
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA  # takes longer than all the rest
    from voluptuous import Invalid

    try:
        stages = COMPILED_LOCKFILE_SCHEMA(read_yaml(LOCK)).get("stages", {})
    except Invalid:
        return False
    parts = [
        part
        for stage in stages.values()
        for part in (*stage.get("deps", ()), *stage.get("outs", ()))
    ]
    ended = LOCK.is_file() and LOCK.read_bytes().endswith(b"\n")
    return ended and all(part.get(part.get("hash", "md5")) for part in parts)


def repair(cache: Path) -> Iterator[str]:
    """Repair what DVC was writing when it was killed; yield what that was."""
    try:
        json.loads((TMP / "rwlock").read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        remove(TMP / "rwlock")
        yield str(TMP / "rwlock")
    if not whole_lock():
        remove(LOCK)
        subprocess.run(["git", "checkout", "--quiet", "--", LOCK], stderr=subprocess.DEVNULL)
        yield str(LOCK)
    folders = (Path("data"), Path("metrics"))
    left = [path for folder in folders for path in sorted(folder.glob(".*")) if path.suffix in LEFT]
    checkpoint = Path("data/checkpoint.safetensors")
    if os.path.lexists(checkpoint) and not checkpoint.is_file():
        left.append(checkpoint)
    for path in left:
        remove(path)
        yield str(path)
    for path in cache.glob("runs/??/*/*"):
        if path.name != dict_sha256(read_yaml(path), exclude=["size", "nfiles"]):
            remove(path)
            yield str(path)


def object_path(cache: Path, md5: str) -> Path:
    """Where DVC keeps what has this digest."""
    return cache / "files/md5" / md5[:2] / md5[2:]


def files_of(cache: Path, out: dict[str, Any]) -> dict[Path, str]:
    """The files of an output, or of a folder as far as the cache knows it, with their digests."""
    root, md5 = Path(out["path"]), out["md5"]
    if not md5.endswith(".dir"):
        return {root: md5}
    listing = object_path(cache, md5)
    files = json.loads(listing.read_bytes()) if listing.exists() else []
    return {root / file["relpath"]: file["md5"] for file in files}


def outputs() -> list[dict[str, Any]]:
    """What dvc.lock says of each output."""
    stages = read_yaml(LOCK).get("stages", {})
    return [out for stage in stages.values() for out in stage.get("outs") or ()]


def drop_damaged(cache: Path) -> Iterator[str]:
    """Drop what differs from dvc.lock: objects of the cache, and outputs in the workspace.

    An output that is a regular file stays, for somebody may have edited it; DVC is led to read it
    again. A folder that the cache does not know DVC reads again by itself.
    """
    for out in outputs():
        if out["md5"].endswith(".dir"):
            path = object_path(cache, out["md5"])
            if os.path.lexists(path) and not intact(path, out["md5"].removesuffix(".dir")):
                remove(path)
                yield f"{out['path']} in the cache"
        for file, md5 in files_of(cache, out).items():
            path = object_path(cache, md5)
            if os.path.lexists(path) and not intact(path, md5):
                remove(path)
                yield f"{file} in the cache"
            if os.path.lexists(file) and not intact(file, md5):
                if file.is_file():
                    os.utime(file)
                else:
                    remove(file)
                yield str(file)


def main() -> None:
    cache = cache_folder()
    with no_other_dvc() as alone:
        if not alone:
            print("note: another DVC runs here; nothing is verified until it ends", flush=True)
            return
        found = [*repair(cache), *drop_damaged(cache)]
    if found:
        print(f"not as dvc.lock has it, and so made anew: {', '.join(found)}", flush=True)
    elif not any(os.path.lexists(out["path"]) for out in outputs()):
        print("nothing to verify yet", flush=True)
    else:
        print("verified: every output in dvc.lock", flush=True)


if __name__ == "__main__":
    run(main)
