"""Run a network on a split, and compute the metrics of its predictions."""

import math
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from stages.shared.data import Split

# Bound the memory. Only the last bits of the logits depend on how many images are a batch.
BATCH_SIZE = 1000
BATCH_BYTES = 4 << 20  # of uint8 images


def normalize(images: mx.array) -> mx.array:
    """Scale images, uint8 or float32 from 0 to 255, to float32 pixels in [0, 1]."""
    return images.astype(mx.float32) / 255


@dataclass(frozen=True)
class Predictions:
    """The `logits`, float32 (N, classes), for N examples with `labels`, uint8 (N,)."""

    logits: NDArray[np.float32]
    labels: NDArray[np.uint8]

    @cached_property
    def loss(self) -> float:
        """The mean cross entropy in nats."""
        losses = nn.losses.cross_entropy(mx.array(self.logits), mx.array(self.labels))
        return float(np.array(losses).mean(dtype=np.float64))

    @cached_property
    def predicted_labels(self) -> NDArray[np.uint8]:
        """The label of the largest logit of each example, uint8 (N,)."""
        return self.logits.argmax(axis=1).astype(np.uint8)

    @cached_property
    def confidences(self) -> NDArray[np.float32]:
        """The softmax probability of each predicted label, float32 (N,)."""
        return np.array(mx.softmax(mx.array(self.logits), axis=1).max(axis=1))

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each predicted label is the true one, bool (N,)."""
        return np.equal(self.predicted_labels, self.labels)

    @property
    def accuracy(self) -> float:
        """The fraction of correct predictions: an integer count over an integer count."""
        return int(self.correct.sum()) / len(self.correct)


def predict(model: nn.Module, split: Split) -> Predictions:
    """Run `model` in evaluation mode on a split of at least one example."""
    model.eval()
    batch_size = min(BATCH_SIZE, max(1, BATCH_BYTES // math.prod(split.image_shape)))
    logits = [
        np.array(model(normalize(mx.array(split.images[start : start + batch_size]))))
        for start in range(0, len(split), batch_size)
    ]
    return Predictions(np.concatenate(logits), split.labels)
