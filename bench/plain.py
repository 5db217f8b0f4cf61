"""The loop of MLX's documentation on MLX's own package, BLAS included."""

from collections.abc import Callable
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from bench.common import Config, load, run


class MLP(nn.Module):
    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)


def loss_fn(model: MLP, x: mx.array, y: mx.array) -> mx.array:
    return mx.mean(nn.losses.cross_entropy(model(x), y))


def contender(config: Config) -> tuple[Callable[[int], float], Callable[[], float]]:
    mx.set_default_device(mx.cpu)
    train_images, train_labels, test_images, test_labels = (
        mx.array(array.astype(np.float32) / 255 if array.ndim == 2 else array)
        for array in (*load("train"), *load("test"))
    )
    mx.random.seed(0)
    model = MLP([784, config.hidden_dim, config.hidden_dim, 10])
    optimizer = optim.SGD(learning_rate=config.learning_rate, momentum=config.momentum)
    loss_and_grad_fn = nn.value_and_grad(model, loss_fn)
    num_examples = len(train_labels)
    # An epoch of the wide networks takes minutes, of which 20 steps tell as much.
    stop = num_examples if config.hidden_dim < 100 else 20 * config.batch_size

    def epoch(_: int) -> float:
        order = mx.array(np.random.permutation(num_examples))
        for start in range(0, stop, config.batch_size):
            batch = order[start : start + config.batch_size]
            _, grads = loss_and_grad_fn(model, train_images[batch], train_labels[batch])
            optimizer.update(model, grads)
            mx.eval(model.parameters(), optimizer.state)
        return stop / num_examples

    def accuracy() -> float:
        return float(mx.mean(mx.argmax(model(test_images), axis=1) == test_labels))

    return epoch, accuracy


if __name__ == "__main__":
    run(contender)
