"""Read what DVC recorded in dvc.lock, and compare files with it."""

import hashlib
import json
import os
from pathlib import Path

import yaml

from stages.shared.errors import DamagedError, UserError


def check_recorded(path: Path) -> None:
    """Raise `UserError` if `path` cannot be read to its end, or is not what DVC has recorded.

    The latter where DVC runs this stage: it hands out an object of its cache unread as long as that
    is read-only, so one that was damaged or swapped would go unnoticed.
    """
    for found in (path, *path.rglob("*")):
        if os.path.lexists(found) and not (found.is_file() or found.is_dir()):
            raise DamagedError(found, "it is not a regular file")  # a pipe would never end
    record = Path(f"{path}.dvc")  # where `dvc add` tracks it
    if not record.exists():
        record = Path("dvc.lock")
    if "DVC_STAGE" not in os.environ or not record.exists() or not path.exists():
        return
    recorded = yaml.load(record.read_bytes(), yaml.CSafeLoader)
    stages = recorded["stages"].values() if record.name == "dvc.lock" else [recorded]
    outs = [out for stage in stages for out in stage.get("outs", ())]
    digests = [out["md5"] for out in outs if Path(record.parent, out["path"]) == path]
    if digests and digest(path) not in digests:
        if record.name == "dvc.lock":
            raise DamagedError(path, "it is not what dvc.lock names")
        raise UserError(
            f"{path}: is not what {record} names; get that with `dvc checkout --force {path}`, or"
            f" keep this with `dvc add {path}`"
        )


def digest(path: Path) -> str:
    """The MD5 of a file or, as DVC defines it, of the list of all files in a folder."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    files = {found.relative_to(path).as_posix(): found for found in path.rglob("*")}
    listing = [
        {"md5": digest(found), "relpath": name}
        for name, found in sorted(files.items())
        if found.is_file()
    ]
    return f"{hashlib.md5(json.dumps(listing).encode()).hexdigest()}.dir"
