"""Code that all contenders share: the configurations, the data, and the timing of an epoch."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Config:
    """A network of two hidden layers and how it is trained; `threads` is for our loop's BLAS."""

    hidden_dim: int
    batch_size: int
    learning_rate: float
    momentum: float
    threads: int
    num_epochs: int

    def __str__(self) -> str:
        sizes = f"784-{self.hidden_dim}-{self.hidden_dim}-10, batch {self.batch_size}"
        momentum = f", momentum {self.momentum}" if self.momentum else ""
        return f"{sizes}{momentum}, {self.num_epochs} epochs, threads: {self.threads}"


CORES = os.cpu_count() or 1
CONFIGS = {
    "A": Config(32, 256, 0.1, 0.0, threads=1, num_epochs=10),
    "B": Config(512, 256, 0.1, 0.0, threads=CORES, num_epochs=3),
    "C": Config(800, 128, 0.02, 0.9, threads=CORES, num_epochs=3),
}

# Train for the epoch of this number, or for the first part of it. Return the fraction of an epoch.
TrainEpoch = Callable[[int], float]
Contender = tuple[TrainEpoch, Callable[[], float]]  # and a function that returns the accuracy


def load(name: str, label_dtype: Any) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Load a split of the pipeline: pixels, float32 (N, 784) in [0, 1], and labels (N,)."""
    with np.load(Path("data") / f"{name}.npz") as arrays:
        pixels = arrays["images"].astype(np.float32) / 255
        return pixels.reshape(len(pixels), -1), arrays["labels"].astype(label_dtype)


def run(make_contender: Callable[[Config], Contender]) -> None:
    """Train with the configuration named on the command line. Print metrics as JSON.

    `seconds` is the median time of an epoch without the first epoch. `fraction` is less than 1 if
    the epochs were cut short. Then `accuracy` is not the result of a whole training.
    """
    config = CONFIGS[sys.argv[1]]
    train_epoch, accuracy = make_contender(config)
    seconds = []
    for epoch in range(1, config.num_epochs + 1):
        started = time.perf_counter()
        fraction = train_epoch(epoch)
        seconds.append((time.perf_counter() - started) / fraction)
    median = statistics.median(seconds[1:])
    print(json.dumps({"seconds": median, "accuracy": accuracy(), "fraction": fraction}))


def print_row(cells: list[str]) -> None:
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def print_header(titles: list[str]) -> None:
    """Print the first two rows of a Markdown table."""
    print_row(titles)
    print_row(["---"] * len(titles))
