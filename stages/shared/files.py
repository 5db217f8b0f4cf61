"""Write files whole or not at all, and refuse to read those that DVC does not know."""

import csv
import hashlib
import io
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import yaml

from stages.shared.errors import DamagedError, UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it appears, or changes, only when the block ends well.

    Raises `UserError` when the disk is full or the folder may not be written.
    """
    part = path.with_name(f".{path.name}.part")  # one fixed name: a killed run leaves no litter
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        with part.open("xb") as file:  # never through a link
            yield file
        part.replace(path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"{path}: cannot be written ({reason}); fix that and rerun") from None
    finally:
        with suppress(OSError):
            part.unlink()


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a file, read when they are used. Raises `ValueError` if it is empty."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def save_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write `rows` under `header`, floats with six digits; None becomes an empty cell."""
    with atomic_write(path) as file, io.TextIOWrapper(file, newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row)


def save_json(path: Path, values: object) -> None:
    """Write `values` as JSON, a line each."""
    with atomic_write(path) as file:
        file.write(f"{json.dumps(values, indent=2)}\n".encode())


def verify(path: Path) -> None:
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
