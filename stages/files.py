"""Write files whole or not at all, refuse those that DVC does not know, keep splits of the data."""

import csv
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from numpy.typing import NDArray

from stages.errors import UserError


class DamagedError(UserError):
    """A file that has other bytes than it should."""

    def __init__(self, path: Path, problem: str | Exception) -> None:
        line = " ".join(str(problem).split())
        super().__init__(f"{path}: damaged ({line:.200}); mend it with `make verify`")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it appears, or changes, only when the block ends well.

    Raises `UserError` when the disk is full or the folder may not be written.
    """
    part = path.with_name(f".{path.name}.part")  # one fixed name: a killed run leaves no litter
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"{path}: cannot be written ({reason}); mend that and rerun") from None
    finally:
        with suppress(OSError):
            part.unlink()


def save_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write `rows` under `header`, floats with six digits; None becomes an empty cell."""
    with atomic_write(path) as file, io.TextIOWrapper(file, newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row)


def save_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as JSON, a line each."""
    with atomic_write(path) as file:
        file.write(f"{json.dumps(values, indent=2)}\n".encode())


def verify(path: Path) -> None:
    """Raise `DamagedError` if DVC runs this stage and dvc.lock knows `path` with another digest.

    DVC hands out an object of its cache unread as long as that is read-only, so one that was
    damaged or swapped would go unnoticed.
    """
    lock_path = Path("dvc.lock")
    if "DVC_STAGE" not in os.environ or not lock_path.exists() or not path.exists():
        return
    lock = yaml.load(lock_path.read_bytes(), yaml.CSafeLoader)
    outs = [out for stage in lock["stages"].values() for out in stage.get("outs", ())]
    recorded = [out["md5"] for out in outs if out["path"] == path.as_posix()]
    with path.open("rb") as file:
        if recorded and hashlib.file_digest(file, "md5").hexdigest() not in recorded:
            raise DamagedError(path, "it is not the file that dvc.lock names")


@dataclass(frozen=True)
class Split:
    """N examples: `images` uint8 (N, pixels), `labels` uint8 (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.labels)


def save_split(path: Path, split: Split) -> None:
    """Write `split` to `path` as an uncompressed .npz: the same split gives the same bytes."""
    with atomic_write(path) as file:
        np.savez(file, images=split.images, labels=split.labels)


def load_split(path: Path) -> Split:
    """Read what `save_split` wrote. Raises `UserError` for a file that is missing or damaged."""
    verify(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type for member in archive.infolist()):
                raise ValueError("it is compressed")  # a little file could become a huge one
            images, labels = _read_array(archive, "images"), _read_array(archive, "labels")
        if images.ndim != 2 or labels.shape != (len(images),):
            raise ValueError(f"shapes {images.shape} and {labels.shape}")
    except FileNotFoundError:
        raise UserError(f"{path}: not found; make it with `dvc repro preprocess`") from None
    except PermissionError:
        raise
    except Exception as error:  # zipfile and NumPy know a dozen kinds for damaged bytes
        raise DamagedError(path, error) from None
    return Split(images, labels)


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[np.uint8]:
    """As `np.load` does, but without its words on pickles and with no more memory than bytes."""
    with archive.open(f"{name}.npy") as member:
        np.lib.format.read_magic(member)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(member)
        data = member.read()
    if dtype != np.uint8 or by_columns or math.prod(shape) != len(data):
        raise ValueError(f"{name}: {len(data)} bytes are no array of {dtype} {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape)
