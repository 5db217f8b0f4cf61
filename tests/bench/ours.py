"""Our train loop, over OpenBLAS on Linux."""

from collections.abc import Callable

from stages.blas import use_threads

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from stages.files import Split
from stages.model import MLP, score
from stages.train import minibatches, train_epoch
from tests.bench.common import Config, load, run


def contender(config: Config) -> tuple[Callable[[int], float], Callable[[], float]]:
    mx.set_default_device(mx.cpu)
    use_threads(config.threads)
    images, labels = (mx.array(array) for array in load("train"))
    mx.random.seed(0)
    model = MLP([784, config.hidden_dim, config.hidden_dim, 10])
    optimizer = optim.SGD(learning_rate=config.learning_rate, momentum=config.momentum)
    stream = mx.new_stream(mx.cpu)

    def epoch(number: int) -> float:
        random = np.random.default_rng((0, number))
        batches = minibatches(images, labels, config.batch_size, 0, random, stream)
        train_epoch(model, optimizer, batches)
        return 1.0

    def accuracy() -> float:
        test = Split(*load("test"))
        return float(score(model, test).correct.mean())

    return epoch, accuracy


if __name__ == "__main__":
    run(contender)
