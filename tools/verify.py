"""Check every output recorded in dvc.lock, and remove damaged files, so that DVC restores them.

DVC does not read a read-only file in its cache again, nor an output whose times are unchanged, and
it stops at files that a killed run left half-written. `make repro` therefore runs this first.
"""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil
from configobj import ConfigObj
from dvc.config import Config, ConfigError
from dvc.lock import LockError, make_lock
from dvc.rwlock import SCHEMA as RWLOCK_SCHEMA
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.utils import dict_sha256
from dvc.utils.serialize import loads_yaml
from voluptuous import Invalid, Schema

from stages.shared.cli import argument_parser, run
from stages.shared.dvc_lock import LOCK, digest, parse_lock, stages_of
from stages.shared.errors import UserError, escape
from stages.shared.files import atomic_write
from stages.shared.params import read_sections
from tools.provenance import git

RWLOCK = Path(".dvc/tmp/rwlock")  # DVC's note of the processes that use a path
LOCK_FILE = Path(f"{RWLOCK}.lock")
# DVC (dvc-objects 5) gives a file this name, a random token, until it is completely written.
DVC_TEMPORARY = re.compile(r"\.[0-9A-Za-z_-]{22}\.tmp")
CHECKPOINT = Path("data/checkpoint.safetensors")
LOCAL_CONFIG = Path(".dvc/config.local")  # not in Git
SITE_CACHE = Path(".dvc/site_cache")  # DVC's databases: digests of files, links, an index
DATABASES = SITE_CACHE / "repo"


def check_setup() -> None:
    """Raise `UserError` if DVC cannot work here. DVC's own messages name no remedy."""
    git("rev-parse", "--git-dir")  # raises UserError with Git's message
    if not Path(".dvc").is_dir():
        raise UserError(".dvc: not found; copy the hidden files, too, or run `git checkout .dvc`")
    for path in (Path("params.yaml"), Path("dvc.yaml"), Path(".dvc/config"), LOCAL_CONFIG):
        if os.path.lexists(path) and not path.is_file():
            remedy = f"run `rm -r {path}` and `git checkout {path}`"
            raise UserError(f"{path}: is not a regular file; {remedy}")
    for path in map(Path, ("data", "data/raw", "metrics")):
        if path.is_symlink():
            remedy = "put a folder there; to use another disk, run `dvc cache dir --local FOLDER`"
            raise UserError(f"{path}: is a link, which DVC does not follow; {remedy}")
    for path in (RWLOCK.parent, Path(".dvc/cache"), SITE_CACHE):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"{path}: is not a folder; run `rm {path}`")
    if not defined_stages():
        raise UserError("dvc.yaml: has no stages; restore it with `git checkout dvc.yaml`")
    read_sections()  # raises UserError if params.yaml is malformed


def defined_stages() -> dict[str, Any]:
    """Return the stages in dvc.yaml by name; none if it is malformed."""
    with suppress(OSError, ValueError):
        stages = msgspec.yaml.decode(Path("dvc.yaml").read_bytes(), type=dict).get("stages")
        if isinstance(stages, dict):
            return stages
    return {}


def read_dvc_config() -> Config:
    """Read DVC's config. Raise `UserError` if it is malformed."""
    try:
        return Config(dvc_dir=".dvc")
    except ConfigError as error:
        remedy = "edit .dvc/config or .dvc/config.local, or run `git checkout .dvc/config`"
        raise UserError(f".dvc: {str(error).rstrip('.')}; {remedy}") from None


def remove(path: Path) -> None:
    """Remove the file, link or empty folder at `path`.

    Raises `UserError` for a folder with content, which may be the user's.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink()
    elif any(path.iterdir()):
        raise UserError(f"{path}: is a folder, must be a file; move the folder away and rerun")
    else:
        path.rmdir()


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
    if any(is_running(**process) for process in noted_processes()):
        raise LockError("another DVC works here")


def noted_processes() -> list[dict[str, Any]]:
    """Return `pid` and `cmd` of the processes in DVC's note."""
    used = read_rwlock() or {}
    return [*used.get("write", {}).values(), *chain(*used.get("read", {}).values())]


def is_running(pid: int, cmd: str) -> bool:
    """Return whether the process that DVC noted still runs.

    Another program can have its number by now, for example in a container that was restarted.
    """
    try:
        running = psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
    script, *arguments = cmd.split()  # sys.argv, so without the interpreter
    if Path(script).name == "__main__.py":  # python -m dvc
        script = str(Path(script).parent)
    names = {Path(part).name for part in running}
    return Path(script).name in names and " ".join(running).endswith(" ".join(arguments))


def repair_rwlock() -> Iterator[str]:
    """Remove DVC's note of its processes if it is malformed, or if it would block DVC forever."""
    blocks = any(psutil.pid_exists(process["pid"]) for process in noted_processes())
    if os.path.lexists(RWLOCK) and (read_rwlock() is None or blocks):
        remove(RWLOCK)
        yield str(RWLOCK)


def configure_site_cache(config: Config) -> None:
    """Let DVC keep its databases inside the project, where other users cannot write.

    DVC's default is /var/tmp/dvc, where every user can write, and DVC unpickles what it finds. The
    path in DVC's config must be absolute, so it is renewed after the project has moved. A folder
    that the user has chosen stays.
    """
    path, configured = SITE_CACHE.absolute(), config["core"].get("site_cache_dir")
    if not configured or (
        configured != str(path) and Path(configured).parts[-2:] == SITE_CACHE.parts
    ):
        # DVC's own writer needs ASCII, and its reader uses the encoding of the locale.
        local = ConfigObj(str(LOCAL_CONFIG), encoding=sys.getfilesystemencoding())
        local.setdefault("core", {})["site_cache_dir"] = str(path)
        with atomic_write(LOCAL_CONFIG) as file:
            if LOCAL_CONFIG.exists():  # it may hold passwords
                shutil.copymode(LOCAL_CONFIG, file.name)
            local.write(file)


def create_site_cache() -> None:
    """Create the folders of DVC's databases, which only users that may write here can write.

    DVC itself creates them with all permissions. Such folders are emptied.
    """
    allowed = Path(".dvc").stat().st_mode & 0o777
    for folder in (DATABASES, SITE_CACHE):
        if folder.exists() and folder.stat().st_mode & 0o777 & ~allowed:  # as DVC creates it
            shutil.rmtree(folder)
    for folder in (SITE_CACHE, DATABASES):
        folder.mkdir(allowed, exist_ok=True)


def repair_databases() -> Iterator[str]:
    """Remove the damaged databases of DVC. DVC builds them again."""
    for path in sorted(DATABASES.rglob("*.db")):
        if not is_intact_database(path):
            for file in path.parent.glob(f"{path.name}*"):  # SQLite's -wal and -shm, too
                remove(file)
            yield str(path)


def is_intact_database(path: Path) -> bool:
    """Return whether `path` is a file that SQLite can read."""
    if not path.is_file():  # a pipe would block
        return False
    try:
        with closing(sqlite3.connect(path)) as database:
            return database.execute("PRAGMA quick_check").fetchone() == ("ok",)
    except sqlite3.DatabaseError:
        return False


def decode_lock(data: bytes) -> Any:
    """Decode dvc.lock. Raise `ValueError` if its end is missing or a digest is malformed."""
    if not data.endswith(b"\n"):
        raise ValueError("the last line has no end")
    parse_lock(data)
    return msgspec.yaml.decode(data)


def repair_lock() -> Iterator[str]:
    """Restore dvc.lock from Git if it is malformed. Without a good version there, remove it."""
    if is_malformed_lock():
        remove(LOCK)
        with suppress(FileNotFoundError):  # no Git
            subprocess.run(["git", "checkout", "--quiet", "--", LOCK], stderr=subprocess.DEVNULL)
        if is_malformed_lock():
            remove(LOCK)
        yield str(LOCK)


def is_malformed_lock() -> bool:
    """Return whether dvc.lock exists, but DVC or a stage could not read it."""
    valid = read_valid(LOCK, decode_lock, COMPILED_LOCKFILE_SCHEMA)
    return os.path.lexists(LOCK) and not valid


def hidden_files(folder: Path) -> list[Path]:
    """Return what has a hidden name in a folder, sorted."""
    return sorted(folder.glob(".*"))


def remove_leftovers() -> Iterator[str]:
    """Remove unfinished files of DVC and the stages, and a checkpoint that is not a file.

    DVC writes an output of any stage under a temporary name beside it first.
    """
    ours = (Path("data"), Path("metrics"))
    others = {out.path.parent for out in recorded_outputs()}.difference(ours)
    leftovers = [
        path for folder in ours for path in hidden_files(folder) if path.suffix in (".tmp", ".part")
    ]
    for folder in sorted(others):  # where another hidden file may be the user's
        leftovers += [path for path in hidden_files(folder) if DVC_TEMPORARY.fullmatch(path.name)]
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
            yield str(entry)
    for folder in cache.glob("runs/??/*"):
        if not folder.is_dir() or not any(folder.iterdir()):
            remove(folder)  # DVC fails at an empty folder here


def is_intact_run(entry: Path) -> bool:
    """Return whether a file of the run-cache is named after the hash of its content."""
    # PyYAML (in msgspec) is ten times faster than DVC's parser, but it reads 1e-05 as text.
    for parse in (msgspec.yaml.decode, loads_yaml):
        with suppress(Exception):  # damaged text can make a parser raise anything
            content = parse(entry.read_bytes())
            if dict_sha256(content, exclude=["size", "nfiles"]) == entry.name:
                return True
    return False


class Output(NamedTuple):
    """An output in dvc.lock, or a file of an output that is a folder."""

    path: Path  # relative to the project
    md5: str
    size: int  # bytes
    is_ours: bool  # whether a module in stages/ writes it


def recorded_outputs() -> Iterator[Output]:
    """Yield the outputs in dvc.lock that have a digest and are inside the project.

    Their paths in dvc.lock are relative to the working directory of their stage.
    """
    defined = defined_stages()
    for name, stage in stages_of(LOCK.read_bytes() if LOCK.is_file() else b"").items():
        definition = defined.get(name.partition("@")[0])  # name@key for a foreach stage
        if definition is None:  # its working directory is not known
            continue
        definition = definition.get("do", definition)
        folder = definition.get("wdir", ".")
        is_ours = folder == "." and "-m stages." in str(definition.get("cmd"))
        for out in stage.outs:
            path = Path(os.path.normpath(Path(folder, out.path)))
            is_inside = not path.is_absolute() and os.pardir not in path.parts
            if out.md5 and is_inside and "${" not in folder:  # only DVC can fill in a template
                yield Output(path, out.md5, out.size, is_ours)


def object_path(cache: Path, md5: str) -> Path:
    """Return where DVC caches a file, or the list of a folder's files, by its digest."""
    return cache / "files/md5" / md5[:2] / md5[2:]


def recorded_files(cache: Path) -> Iterator[Output]:
    """Yield each output in dvc.lock, and each file in an output folder.

    The cache lists the files of a folder. Without an intact list DVC itself reads the folder again.
    """
    for out in recorded_outputs():
        yield out
        listing = object_path(cache, out.md5)
        if out.md5.endswith(".dir") and listing.is_file() and not is_damaged(listing, out.md5):
            for file in json.loads(listing.read_bytes()):
                yield out._replace(path=out.path / file["relpath"], md5=file["md5"])


def is_damaged(path: Path, md5: str) -> bool:
    """Return whether `path` exists, but not as a file with this digest.

    The digest of a folder is the digest of the list of its files, which is a file in the cache.
    """
    is_intact = path.is_file() and digest(path) == md5.removesuffix(".dir")
    return os.path.lexists(path) and not is_intact


def repair_outputs(cache: Path) -> Iterator[str]:
    """Remove files that differ from dvc.lock: objects of the cache, and outputs in the workspace.

    An output that is a regular file stays, because the user may have edited it. Its times change,
    so that DVC reads it again. An output that this project's stages do not write also stays.
    """
    for path, md5, _, is_ours in recorded_files(cache):
        cached = object_path(cache, md5)
        if is_damaged(cached, md5):
            remove(cached)
            yield f"{path} in the cache"
        is_folder = md5.endswith(".dir")  # its files follow
        if is_folder or not is_damaged(path, md5):
            continue
        if path.is_file():
            os.utime(path)
        elif is_ours:
            remove(path)
        else:
            raise UserError(f"{path}: is not a regular file; move it away and rerun")
        yield str(path)


def summary(repaired: list[str]) -> str:
    """Describe in one line what was verified or repaired."""
    if repaired:
        return f"repaired (did not match dvc.lock): {', '.join(repaired)}"
    outs = list(recorded_outputs())
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
    config = read_dvc_config()
    cache = Path(config["cache"].get("dir", ".dvc/cache"))
    if disk_space:
        report_disk_space(cache)
        return
    try:
        RWLOCK.parent.mkdir(exist_ok=True)
        if os.path.lexists(LOCK_FILE) and not LOCK_FILE.is_file():
            remove(LOCK_FILE)
        # DVC's own lock, so that no other DVC process starts a stage meanwhile.
        hardlink = config["core"].get("hardlink_lock", False)
        with make_lock(str(LOCK_FILE), tmp_dir=str(RWLOCK.parent), hardlink_lock=hardlink):
            check_idle()
            configure_site_cache(config)
            create_site_cache()
            repaired = [
                *repair_databases(),
                *repair_rwlock(),
                *repair_lock(),
                *remove_leftovers(),
                *repair_run_cache(cache),
                *repair_outputs(cache),
            ]
        print(escape(summary(repaired)), flush=True)
    except LockError:
        print("note: another DVC process runs here; nothing is verified until it ends", flush=True)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--disk-space", action="store_true", help="only report a disk that is full")
    run(main, parser)
