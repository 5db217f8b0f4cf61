"""The network and its params: change this file for a network of your own.

Everything else takes any `ModelParams` and any `Model` that is built and called as this one.
"""

import math
from itertools import pairwise
from typing import Annotated

import mlx.core as mx
import mlx.nn as nn
from msgspec import Meta, Struct


class ModelParams(Struct, frozen=True):
    """The section `model` of params.yaml."""

    num_layers: Annotated[int, Meta(ge=0, le=100)]
    hidden_dim: Annotated[int, Meta(ge=1, le=8192)]
    dropout: Annotated[float, Meta(ge=0.0, le=0.9)]


class Linear(nn.Linear):
    """MLX's linear layer with its weight transposed, to float32 (inputs, outputs).

    The gradient of the weight then comes in the layout of the weight and need not be copied.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = mx.contiguous(self.weight.T)

    def __call__(self, x: mx.array) -> mx.array:
        """Map `x`, float32 (N, inputs), to float32 (N, outputs)."""
        return mx.addmm(self.bias, x, self.weight)


class Model(nn.Module):
    """The multi-layer perceptron of MLX's documentation: linear layers with ReLU in between."""

    def __init__(self, params: ModelParams, image_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        hidden = [params.hidden_dim] * params.num_layers
        sizes = [math.prod(image_shape), *hidden, num_classes]
        self.dropout = nn.Dropout(params.dropout)
        self.layers = [Linear(inputs, outputs) for inputs, outputs in pairwise(sizes)]

    def __call__(self, pixels: mx.array) -> mx.array:
        """The logits, float32 (N, classes), of `pixels`, float32 (N, *image_shape) in [0, 1]."""
        activations = pixels.reshape(len(pixels), -1)
        for layer in self.layers[:-1]:
            activations = self.dropout(mx.maximum(layer(activations), 0))
        logits: mx.array = self.layers[-1](activations)
        return logits
