"""Read what DVC recorded in dvc.lock, and compare files with it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from stages.shared.errors import DamagedError, UserError

LOCK = Path("dvc.lock")


class Entry(msgspec.Struct, frozen=True):
    """A dependency or an output, as it was when its stage ended."""

    path: str
    hash: Literal["md5"] = "md5"
    # As `digest` returns it. It is empty for a dependency that is a URL.
    md5: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32}(\.dir)?)?$")] = ""
    size: int = 0  # bytes


class Stage(msgspec.Struct, frozen=True):
    """The last run of a stage, or what `dvc add` wrote to a `.dvc` file."""

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


def check_recorded(path: Path) -> None:
    """Raise `UserError` if `path` is not a regular file or a folder of regular files.

    Raise it also if DVC runs this stage and recorded other content. DVC itself does not notice:
    it does not read a file in its cache again as long as that file is read-only.
    """
    for found in (path, *path.rglob("*")):
        if os.path.lexists(found) and not (found.is_file() or found.is_dir()):
            raise DamagedError(found, "it is not a regular file")  # a pipe would block the reader
    if "DVC_STAGE" not in os.environ or not path.exists():
        return
    tracked = Path(f"{path}.dvc")  # written by `dvc add`
    if tracked.exists():
        outs = msgspec.yaml.decode(tracked.read_bytes(), type=Stage).outs
        if digest(path) not in [out.md5 for out in outs]:
            remedy = f"run `dvc checkout --force {path}` to restore it, `dvc add {path}` to keep it"
            raise UserError(f"{path}: its MD5 is not the one in {tracked}; {remedy}")
    elif LOCK.exists():
        outs = [out for stage in parse_lock(LOCK.read_bytes()).values() for out in stage.outs]
        expected = [out.md5 for out in outs if Path(out.path) == path]
        if expected and digest(path) not in expected:
            raise DamagedError(path, "its MD5 is not the one in dvc.lock")


def digest(path: Path) -> str:
    """Return the MD5 of a file or, for a folder, the MD5 that DVC computes of its list of files.

    A folder's digest ends in `.dir`.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    listing = [{"md5": digest(file), "relpath": name} for name, file in sorted(files.items())]
    return f"{hashlib.md5(json.dumps(listing).encode()).hexdigest()}.dir"
