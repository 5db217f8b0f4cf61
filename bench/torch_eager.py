"""PyTorch, eager, with a thread for each core."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from bench.common import CORES, Config, load, run


def contender(config: Config) -> tuple[Callable[[int], float], Callable[[], float]]:
    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    train_images, test_images = (
        torch.tensor(load(name)[0].astype(np.float32) / 255) for name in ("train", "test")
    )
    train_labels, test_labels = (
        torch.tensor(load(name)[1].astype(np.int64)) for name in ("train", "test")
    )
    model = nn.Sequential(
        nn.Linear(784, config.hidden_dim),
        nn.ReLU(),
        nn.Linear(config.hidden_dim, config.hidden_dim),
        nn.ReLU(),
        nn.Linear(config.hidden_dim, 10),
    )
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=config.momentum
    )

    def epoch(_: int) -> float:
        order = torch.randperm(len(train_labels))
        for batch in order.split(config.batch_size):
            optimizer.zero_grad()
            loss_fn(model(train_images[batch]), train_labels[batch]).backward()
            optimizer.step()
        return 1.0

    def accuracy() -> float:
        with torch.no_grad():
            return float((model(test_images).argmax(1) == test_labels).float().mean())

    return epoch, accuracy


if __name__ == "__main__":
    run(contender)
