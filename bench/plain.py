"""The loop of MLX's documentation on MLX's own package, including its BLAS."""

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from bench.common import Config, Contender, load, run


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


def make_contender(config: Config) -> Contender:
    mx.set_default_device(mx.cpu)
    train_images, train_labels = (mx.array(array) for array in load("train", np.uint8))
    test_images, test_labels = (mx.array(array) for array in load("test", np.uint8))
    mx.random.seed(0)
    model = MLP([784, config.hidden_dim, config.hidden_dim, 10])
    optimizer = optim.SGD(learning_rate=config.learning_rate, momentum=config.momentum)
    loss_and_grad_fn = nn.value_and_grad(model, loss_fn)
    num_examples = len(train_labels)
    # An epoch of the wide networks takes minutes, so time 20 steps of it.
    stop = num_examples if config.hidden_dim < 100 else 20 * config.batch_size

    def train_epoch(_: int) -> float:
        permutation = mx.array(np.random.permutation(num_examples))
        for start in range(0, stop, config.batch_size):
            indices = permutation[start : start + config.batch_size]
            _, grads = loss_and_grad_fn(model, train_images[indices], train_labels[indices])
            optimizer.update(model, grads)
            mx.eval(model.parameters(), optimizer.state)
        return stop / num_examples

    def accuracy() -> float:
        return float(mx.mean(mx.argmax(model(test_images), axis=1) == test_labels))

    return train_epoch, accuracy


if __name__ == "__main__":
    run(make_contender)
