"""The loop of stages/train.py, with OpenBLAS on Linux."""

from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from bench.common import Config, Contender, run
from stages.model import Model, ModelParams
from stages.shared.augment import AugmentParams
from stages.shared.data import load_split
from stages.shared.distributed import Ranks, Shards
from stages.shared.metrics import predict
from stages.shared.openblas import load_openblas
from stages.train import batch_iterate, make_step, prefetch, train_epoch


def make_contender(config: Config) -> Contender:
    mx.set_default_device(mx.cpu)
    load_openblas(config.threads)
    train_split, test_split = (load_split(Path(f"data/{name}.npz")) for name in ("train", "test"))
    mx.random.seed(0)
    params = ModelParams(num_layers=2, hidden_dim=config.hidden_dim, dropout=0.0)
    model = Model(params, train_split.image_shape, len(train_split.class_names))
    optimizer = optim.SGD(learning_rate=config.learning_rate, momentum=config.momentum)
    stream = mx.new_stream(mx.cpu)
    undistorted = AugmentParams(shift=0, rotation=0, scale=0, elastic=0)
    step = make_step(model, optimizer, Shards(1, Ranks()), compiled=False)

    def train_one_epoch(epoch: int) -> float:
        rng = np.random.default_rng((0, epoch))
        batches = batch_iterate(train_split, config.batch_size, undistorted, rng)
        train_epoch(model, optimizer, step, prefetch(batches, stream))
        return 1.0

    def accuracy() -> float:
        return predict(model, test_split).accuracy

    return train_one_epoch, accuracy


if __name__ == "__main__":
    run(make_contender)
