"""What the contenders share: the networks, the data, how an epoch is timed."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Config:
    """A network of two hidden layers and how it is trained; `threads` are for our loop's BLAS."""

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


def load(name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The images, uint8 (N, 784), and labels, uint8 (N,), of a split that the pipeline made."""
    with np.load(Path("data") / f"{name}.npz") as arrays:
        images = arrays["images"]
        return images.reshape(len(images), -1), arrays["labels"]


def run(contender: Callable[[Config], tuple[Callable[[int], float], Callable[[], float]]]) -> None:
    """Print the median seconds of an epoch but the first, and the test accuracy, as JSON.

    A contender gives a function that trains for an epoch, or for a part of one, and returns
    which part of it that was, and a function that returns the accuracy.
    """
    config = CONFIGS[sys.argv[1]]
    train_epoch, accuracy = contender(config)
    seconds = []
    for epoch in range(1, config.num_epochs + 1):
        started = time.perf_counter()
        part = train_epoch(epoch)
        seconds.append((time.perf_counter() - started) / part)
    median = statistics.median(seconds[1:])
    print(json.dumps({"seconds": median, "accuracy": accuracy(), "part": part}))


def row(cells: list[str]) -> None:
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)
