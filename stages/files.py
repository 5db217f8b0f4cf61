"""Write files whole or not at all; keep splits of the data."""

import csv
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from stages.errors import UserError


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
    try:
        with np.load(path, allow_pickle=False) as arrays:
            split = Split(arrays["images"], arrays["labels"])
    except FileNotFoundError:
        raise UserError(f"{path}: not found; make it with `dvc repro preprocess`") from None
    except Exception as error:  # zipfile and NumPy know a dozen kinds for damaged bytes
        raise _damaged(path, " ".join(str(error).split())) from None
    if split.images.dtype != np.uint8 or split.labels.dtype != np.uint8:
        raise _damaged(path, "images and labels are not both uint8")
    if split.images.ndim != 2 or split.labels.shape != (len(split.images),):
        raise _damaged(path, f"shapes {split.images.shape} and {split.labels.shape}")
    return split


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: damaged ({problem}); remake it with `dvc repro --force preprocess`")
