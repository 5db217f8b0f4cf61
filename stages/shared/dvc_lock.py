"""Read what DVC recorded in dvc.lock, and compare files with it."""

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from stages.shared.errors import DamagedError, UserError

LOCK = Path("dvc.lock")
# File managers write these into every folder. DVC ignores them, too: they are in .dvcignore.
IGNORED_NAMES = (".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX")


class Entry(msgspec.Struct, frozen=True):
    """A dependency or an output, as it was when its stage ended."""

    path: str
    hash: Literal["md5"] = "md5"
    # As `digest` returns it. It is empty for a dependency that is a URL.
    md5: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32}(\.dir)?)?$")] = ""
    size: int = 0  # bytes


class Stage(msgspec.Struct, frozen=True):
    """The last run of a stage, or the content of a `.dvc` file that `dvc add` wrote."""

    deps: list[Entry] = []
    outs: list[Entry] = []
    params: dict[str, dict[str, Any]] = {}  # per file: the values per section or full name

    def named_params(self) -> dict[str, Any]:
        """Return the params by their full names, such as train.seed."""
        named: dict[str, Any] = {}
        for sections in self.params.values():
            for section, value in sections.items():
                if isinstance(value, dict):
                    named |= {f"{section}.{key}": inner for key, inner in value.items()}
                else:
                    named[section] = value
        return named


class Lock(msgspec.Struct, frozen=True):
    """All of dvc.lock."""

    stages: dict[str, Stage] = {}


Record = TypeVar("Record", Lock, Stage)


def parse_lock(text: str | bytes) -> dict[str, Stage]:
    """Return the stages of a dvc.lock by name. Raise `ValueError` if `text` is malformed.

    Keys that are not in the classes above are ignored.
    """
    return msgspec.yaml.decode(text, type=Lock).stages


def stages_of(text: str | bytes) -> dict[str, Stage]:
    """Return the stages of a dvc.lock by name; none if `text` is malformed.

    A merge conflict, for example, leaves a malformed dvc.lock.
    """
    try:
        return parse_lock(text)
    except ValueError:
        return {}


def recorded_digests(paths: Collection[Path]) -> dict[Path, str]:
    """Return the digest of each path that dvc.lock or a `.dvc` file, of `dvc add`, records.

    Raises `UserError` if such a file is malformed.
    """
    recorded = {}
    if LOCK.exists():
        stages = read_record(LOCK, Lock).stages
        recorded = {Path(out.path): out.md5 for stage in stages.values() for out in stage.outs}
    for path in paths:
        if record_of_dvc_add(path).exists():
            for out in read_record(record_of_dvc_add(path), Stage).outs:
                recorded[path] = out.md5
    return {path: recorded[path] for path in paths if recorded.get(path)}


def record_of_dvc_add(path: Path) -> Path:
    """Return the `.dvc` file where `dvc add` records `path`."""
    return path.with_name(f"{path.name}.dvc")


def read_record(path: Path, record_type: type[Record]) -> Record:
    """Read dvc.lock or a `.dvc` file. Raises `UserError` if it is malformed."""
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=record_type)
    except ValueError as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path}: malformed ({line:.200}); run `git checkout {path}`") from None


def check_recorded(*paths: Path) -> None:
    """Raise `UserError` if a path is not a regular file or a folder of regular files.

    Raise it also if DVC runs this stage and recorded other content. DVC itself does not notice:
    it does not read a file in its cache again as long as that file is read-only.
    """
    for path in paths:
        for found in (path, *path.rglob("*")):
            check_regular(found, is_inside=found != path)
    if "DVC_STAGE" not in os.environ:
        return
    for path, expected in recorded_digests(paths).items():
        if path.exists() and digest(path) != expected:
            record = record_of_dvc_add(path)
            if not record.exists():
                raise DamagedError(path, "its MD5 is not the one in dvc.lock")
            remedy = f"run `dvc checkout --force {path}` to restore it, `dvc add {path}` to keep it"
            raise UserError(f"{path}: its MD5 is not the one in {record}; {remedy}")


def check_regular(path: Path, *, is_inside: bool) -> None:
    """Raise `UserError` if `path` exists and is not a regular file or a folder.

    A link to a file is allowed, because DVC can check out links into its cache. A link to a folder
    inside a tracked folder is not: DVC records that folder as empty.
    """
    if is_inside and path.is_symlink() and path.is_dir():
        remedy = "put the folder itself in its place and run `dvc add` again"
        raise UserError(f"{path}: is a link to a folder, which DVC does not follow; {remedy}")
    if os.path.lexists(path) and not (path.is_file() or path.is_dir()):
        raise DamagedError(path, "it is not a regular file")  # a pipe would block the reader


def digest(path: Path) -> str:
    """Return the MD5 of a file, or DVC's MD5 of a folder's list of files.

    A folder's digest ends in `.dir`. `IGNORED_NAMES` in it do not count.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    names = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    names = [name for name in names if not set(name.parts).intersection(IGNORED_NAMES)]
    relpaths = sorted(name.as_posix() for name in names)
    listing = [{"md5": digest(path / relpath), "relpath": relpath} for relpath in relpaths]
    return f"{hashlib.md5(json.dumps(listing).encode()).hexdigest()}.dir"
