"""The network is the multi-layer perceptron of MLX's documentation."""

import math
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from stages.model import Model, ModelParams


class PlainMLP(nn.Module):
    """The network as MLX's documentation presents it."""

    def __init__(self, num_layers: int, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        sizes = [input_dim] + [hidden_dim] * num_layers + [output_dim]
        self.layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers[:-1]:
            x = mx.maximum(layer(x), 0)  # MLX compiles `nn.relu`, on a Linux CPU with g++
        return self.layers[-1](x)


@pytest.mark.parametrize("num_layers", [0, 1, 2, 5])
@pytest.mark.parametrize("image_shape", [(28, 28), (4, 6, 3)])
def test_same_seed_gives_the_network_of_the_documentation(
    num_layers: int, image_shape: tuple[int, ...]
) -> None:
    params = ModelParams(num_layers=num_layers, hidden_dim=7, dropout=0.0)
    mx.random.seed(3)
    model = Model(params, image_shape, 10)
    mx.random.seed(3)
    plain = PlainMLP(num_layers, math.prod(image_shape), 7, 10)
    pixels = mx.random.uniform(shape=(5, *image_shape))
    flat = pixels.reshape(5, -1)
    assert mx.allclose(model(pixels), plain(flat), atol=1e-6)
    _, grads = nn.value_and_grad(model, lambda x: (model(x) ** 2).sum())(pixels)
    _, plain_grads = nn.value_and_grad(plain, lambda x: (plain(x) ** 2).sum())(flat)
    expected = dict(tree_flatten(plain_grads))
    for name, grad in dict(tree_flatten(grads)).items():
        assert mx.allclose(grad.T, expected[name], atol=1e-5), name


def test_dropout_is_off_in_evaluation() -> None:
    model = Model(ModelParams(num_layers=2, hidden_dim=32, dropout=0.5), (5, 5), 3)
    pixels = mx.random.uniform(shape=(9, 5, 5))
    assert not mx.array_equal(model(pixels), model(pixels))
    model.eval()
    assert mx.array_equal(model(pixels), model(pixels))
