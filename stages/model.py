"""The network and its hyperparameters. Change this file to train your own network.

The other modules accept any `ModelParams` and any `Model` that is built and called like this one.
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


class TransposedLinear(nn.Linear):
    """A linear layer whose weight, float32 (inputs, outputs), is the transpose of `nn.Linear`'s.

    The product that gives its gradient has the same memory layout, so MLX need not copy it for the
    update. With `nn.Linear`, an epoch took 1.02, 1.27 and 1.24 times as long (networks of 2 x 32,
    2 x 512 and 2 x 800 units; 2 CPU cores, 5 alternating runs). The model file has the transposed
    weights.
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
        self.layers = [TransposedLinear(inputs, outputs) for inputs, outputs in pairwise(sizes)]

    def __call__(self, pixels: mx.array) -> mx.array:
        """Map `pixels`, float32 (N, *image_shape) in [0, 1], to logits, float32 (N, classes)."""
        activations = pixels.reshape(len(pixels), -1)
        for layer in self.layers[:-1]:
            # Not `nn.relu`, because MLX compiles that function: on a Linux CPU it would run g++.
            activations = self.dropout(mx.maximum(layer(activations), 0))
        return self.layers[-1](activations)
