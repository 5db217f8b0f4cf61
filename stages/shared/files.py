"""Write files atomically, map files into memory, and report files that cannot be read."""

import csv
import io
import json
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EMFILE, ENFILE, ENOMEM
from pathlib import Path
from typing import BinaryIO

from stages.shared.errors import DamagedError, UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block ends without an exception.

    Until then `path` keeps its content. Missing folders are created. Raises `UserError` if the
    file cannot be written, for example because the disk is full.
    """
    # A fixed name: the next run overwrites what a killed run left behind.
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # "x" fails instead of following a symbolic link
            yield file
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); fix that and rerun") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def reading(path: Path, remedy: str = "make it with `dvc repro`") -> Iterator[None]:
    """Raise `UserError` if the block finds that the file at `path` is missing or damaged.

    `remedy` is for a missing file. A `UserError` of the block passes. So does an error that a file
    that is not damaged can have: no permission, too little memory, too many open files.
    """
    try:
        yield
    except (UserError, MemoryError, PermissionError):
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {remedy}") from None
    except Exception as error:  # libraries raise a dozen types for damaged bytes
        if isinstance(error, OSError) and error.errno in (EMFILE, ENFILE, ENOMEM):
            raise
        raise DamagedError(path, error) from None


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory, read-only. Raises `ValueError` if it is empty."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def save_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file: floats have six significant digits, None is an empty cell."""
    with atomic_write(path) as file, io.TextIOWrapper(file, "utf-8", newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row)


def save_json(path: Path, values: object) -> None:
    """Write `values` as JSON, indented by two spaces.

    Raises `ValueError` for a number that is not finite, because JSON has no such numbers.
    """
    text = json.dumps(values, indent=2, allow_nan=False)
    with atomic_write(path) as file:
        file.write(f"{text}\n".encode())
