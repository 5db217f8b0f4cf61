"""Write files whole or not at all."""

import csv
import io
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from stages.shared.errors import UserError


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
