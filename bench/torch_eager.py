"""PyTorch, eager, with one thread per core."""

import numpy as np
import torch
from torch import nn

from bench.common import CORES, Config, Contender, load, run


def make_contender(config: Config) -> Contender:
    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    train_images, train_labels = map(torch.tensor, load("train", np.int64))
    test_images, test_labels = map(torch.tensor, load("test", np.int64))
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

    def train_epoch(_: int) -> float:
        permutation = torch.randperm(len(train_labels))
        for indices in permutation.split(config.batch_size):
            optimizer.zero_grad()
            loss_fn(model(train_images[indices]), train_labels[indices]).backward()
            optimizer.step()
        return 1.0

    def accuracy() -> float:
        with torch.no_grad():
            return float((model(test_images).argmax(1) == test_labels).float().mean())

    return train_epoch, accuracy


if __name__ == "__main__":
    run(make_contender)
