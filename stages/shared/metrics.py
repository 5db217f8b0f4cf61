"""Score a network on a split: its logits, and what follows from them."""

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from stages.shared.data import Split

BATCH = 1000  # examples at a time, to bound memory; only last bits of logits depend on it


def normalize(images: mx.array) -> mx.array:
    """Turn images, uint8 or float32 from 0 to 255, into float32 pixels in [0, 1]."""
    return images.astype(mx.float32) / 255


@dataclass(frozen=True)
class Predictions:
    """How a network does on N examples: `logits` float32 (N, classes), `labels` uint8 (N,)."""

    logits: NDArray[np.float32]
    labels: NDArray[np.uint8]

    @cached_property
    def loss(self) -> float:
        """The mean cross entropy (nats)."""
        losses = nn.losses.cross_entropy(mx.array(self.logits), mx.array(self.labels))
        return float(np.array(losses).mean(dtype=np.float64))

    @cached_property
    def predictions(self) -> NDArray[np.uint8]:
        """The labels of the greatest logits, uint8 (N,)."""
        predictions: NDArray[np.uint8] = self.logits.argmax(axis=1).astype(np.uint8)
        return predictions

    @cached_property
    def confidences(self) -> NDArray[np.float32]:
        """The softmax probabilities of the predictions, float32 (N,)."""
        return np.array(mx.softmax(mx.array(self.logits), axis=1).max(axis=1))

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each prediction is the label, bool (N,)."""
        return np.equal(self.predictions, self.labels)

    @property
    def accuracy(self) -> float:
        """The correct predictions, counted, over all."""
        return int(self.correct.sum()) / len(self.correct)


def score(model: nn.Module, split: Split) -> Predictions:
    """Score a network on a split that is not empty, without dropout."""
    model.eval()
    logits = [
        np.array(model(normalize(mx.array(split.images[start : start + BATCH]))))
        for start in range(0, len(split), BATCH)
    ]
    return Predictions(np.concatenate(logits), split.labels)
