"""Train the network by SGD. Write data/model.safetensors, and to metrics/ how training went.

Network, loss and loop are those of MLX's example, a multi-layer perceptron:
https://ml-explore.github.io/mlx/build/html/examples/mlp.html

MLX is lazy: an operation only adds to a graph, and `mx.eval` or `mx.async_eval` computes it:
https://ml-explore.github.io/mlx/build/html/usage/lazy_evaluation.html
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from msgspec import Meta, Struct
from tqdm import tqdm

from stages.model import ModelParams
from stages.shared.augment import AugmentParams, augment
from stages.shared.checkpoint import (
    code_hash,
    config_hash,
    data_hash,
    load_checkpoint,
    save_checkpoint,
)
from stages.shared.data import Split, load_split, shuffled_indices
from stages.shared.distributed import Ranks, Shards, run_on_ranks
from stages.shared.dvc_lock import digest
from stages.shared.errors import UserError
from stages.shared.files import save_csv, save_json
from stages.shared.metrics import normalize, predict
from stages.shared.model_file import Metadata, save_model
from stages.shared.openblas import load_openblas
from stages.shared.params import read_params

TRAIN, VALIDATION = Path("data/train.npz"), Path("data/validation.npz")
MODEL = Path("data/model.safetensors")
HISTORY, METRICS = Path("metrics/history.csv"), Path("metrics/training.json")
# Not a DVC output: DVC deletes outputs before a run. Git ignores it.
CHECKPOINT = Path("data/checkpoint.safetensors")


class TrainParams(Struct, frozen=True):
    """The section `train` of params.yaml."""

    batch_size: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    shards: Literal[1, 2, 4, 8, 16, 32, 64]
    num_epochs: Annotated[int, Meta(ge=1, le=10_000)]
    learning_rate: Annotated[float, Meta(ge=1e-6, le=100.0)]
    learning_rate_schedule: Literal["constant", "linear", "cosine"]
    momentum: Annotated[float, Meta(ge=0.0, le=0.999)]
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)]
    device: Literal["cpu", "gpu"]
    threads: Annotated[int, Meta(ge=1, le=256)]


class Config(NamedTuple):
    """The sections of params.yaml that training depends on."""

    model: ModelParams
    augment: AugmentParams
    train: TrainParams


class Splits(NamedTuple):
    """The examples to learn from, and those to validate on, of which there may be none."""

    train: Split
    validation: Split


class EpochMetrics(NamedTuple):
    """A row of the history. Losses are mean cross entropies in nats."""

    epoch: int
    train_loss: float  # mean over the epoch, during which the network changes
    validation_loss: float | None = None  # None without a validation split
    validation_accuracy: float | None = None

    def known(self) -> dict[str, float]:
        """Return the number of the epoch and the metrics that are not None, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


Step = Callable[[mx.array, mx.array], mx.array]  # from pixels and labels to their mean loss
Batch = tuple[mx.array, mx.array]  # pixels, float32 (N, *image_shape), and labels, uint8 (N,)


def loss_fn(model: nn.Module, pixels: mx.array, labels: mx.array) -> mx.array:
    """Return the mean cross entropy in nats."""
    return nn.losses.cross_entropy(model(pixels), labels, reduction="mean")


def make_optimizer(params: TrainParams, num_steps: int) -> optim.SGD:
    """Return SGD with the learning rate schedule of `params` over `num_steps` steps."""
    learning_rate: Any = params.learning_rate  # or a function of the step
    if params.learning_rate_schedule == "linear":
        learning_rate = optim.linear_schedule(params.learning_rate, 0.0, num_steps)
    elif params.learning_rate_schedule == "cosine":
        learning_rate = optim.cosine_decay(params.learning_rate, num_steps)
    return optim.SGD(learning_rate, params.momentum)


def batch_iterate(
    split: Split, batch_size: int, augment_params: AugmentParams, rng: np.random.Generator
) -> Iterator[Batch]:
    """Yield minibatches of all examples in random order. Each image is distorted differently."""
    indices = shuffled_indices(split, rng)
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        images = augment(mx.array(split.images[batch]), augment_params, rng)
        yield normalize(images), mx.array(split.labels[batch])


def prefetch(batches: Iterator[Batch], stream: mx.Stream) -> Iterator[Batch]:
    """Yield `batches`, computing each one while the previous one is in use.

    An MLX stream is a queue of operations, on a CPU a thread of its own. The training step runs on
    the default stream, and at the same time `stream` normalizes and distorts the next minibatch.
    """

    def start_next() -> Batch | None:
        with mx.stream(stream):
            batch = next(batches, None)
            if batch:
                mx.async_eval(batch)
        return batch

    batch = start_next()
    while batch:
        next_batch = start_next()
        yield batch
        batch = next_batch


def make_step(model: nn.Module, optimizer: optim.SGD, shards: Shards, compiled: bool) -> Step:
    """Return a function that takes one step of SGD on a minibatch and returns its loss.

    MLX has no `backward`: `nn.value_and_grad` makes of `loss_fn` a function that returns the loss
    and its gradients by the model's parameters, and `optimizer.update` puts new parameters into
    the model.
    """
    loss_and_grad_fn = nn.value_and_grad(model, loss_fn)
    if shards.count > 1:
        loss_and_grad_fn = shards.value_and_grad(model, loss_fn)

    def step(pixels: mx.array, labels: mx.array) -> mx.array:
        loss, grads = loss_and_grad_fn(model, pixels, labels)
        optimizer.update(model, grads)
        return loss

    # A compiled function must name the state that it uses; dropout draws from `mx.random.state`.
    state = [model.state, optimizer.state, mx.random.state]
    return mx.compile(step, inputs=state, outputs=state) if compiled else step


def train_epoch(
    model: nn.Module, optimizer: optim.SGD, step: Step, batches: Iterable[Batch]
) -> float:
    """Train for a single epoch. Return the mean loss of its examples."""
    model.train()
    losses, sizes = [], []
    for pixels, labels in batches:
        loss = step(pixels, labels)
        # Start to compute the loss and do not wait for it. MLX computes the new parameters with the
        # next loss, which depends on them. Waiting in each step would be slower.
        mx.async_eval(loss)
        losses.append(loss)
        sizes.append(len(labels))
    # No loss depends on the last update, so compute it now.
    mx.eval(model.parameters(), optimizer.state)
    return float(np.average(np.array(losses), weights=sizes))


class Run(NamedTuple):
    """What a training run works with."""

    config: Config
    model: nn.Module
    optimizer: optim.SGD
    shards: Shards


def train(run: Run, splits: Splits, first_epoch: int = 1) -> Iterator[EpochMetrics]:
    """Train `run.model` in place. Yield the metrics after each epoch.

    The random numbers of an epoch depend on `params.seed` and its number alone, so a resumed run
    continues with the same ones. Raises `UserError` if training diverges.
    """
    params = run.config.train
    stream = mx.new_stream(mx.default_device())
    # On a CPU the compiler takes longer than it saves (docs/speed.md). It would not see that each
    # shard gets a seed of its own.
    compiled = mx.default_device() == mx.Device(mx.gpu) and run.shards.count == 1
    step = make_step(run.model, run.optimizer, run.shards, compiled)
    for epoch in range(first_epoch, params.num_epochs + 1):
        rng = np.random.default_rng((params.seed, epoch))
        # One number for MLX, which dropout draws from. Both parts have at most 32 bits.
        run.shards.seed(params.seed << 32 | epoch)
        batches = batch_iterate(splits.train, params.batch_size, run.config.augment, rng)
        bar = progress_bar(prefetch(batches, stream), epoch, params, len(splits.train))
        train_loss = train_epoch(run.model, run.optimizer, step, bar)
        check_finite(run.model, train_loss, epoch, params)
        if len(splits.validation):
            predictions = predict(run.model, splits.validation)
            yield EpochMetrics(epoch, train_loss, predictions.loss, predictions.accuracy)
        else:
            yield EpochMetrics(epoch, train_loss)


def progress_bar(
    batches: Iterator[Batch], epoch: int, params: TrainParams, num_examples: int
) -> Iterable[Batch]:
    """Show the progress of an epoch that takes longer than two seconds, in a terminal."""
    name, num_batches = f"epoch {epoch}/{params.num_epochs}", num_examples / params.batch_size
    return tqdm(batches, name, math.ceil(num_batches), leave=False, delay=2, disable=None)


def check_finite(model: nn.Module, train_loss: float, epoch: int, params: TrainParams) -> None:
    """Raise `UserError` if the loss or a weight is not a finite number."""
    arrays = dict(tree_flatten(model.parameters())).values()
    if not (math.isfinite(train_loss) and all(mx.isfinite(array).all() for array in arrays)):
        raise UserError(
            f"params.yaml: training diverged in epoch {epoch} (loss {train_loss:.4g}); lower"
            f" train.learning_rate (now {params.learning_rate})"
        )


def read_config() -> Config:
    """Read the sections of params.yaml."""
    return Config(
        read_params("model", ModelParams),
        read_params("augment", AugmentParams),
        read_params("train", TrainParams),
    )


def select_device(name: str) -> None:
    """Make `name`, "cpu" or "gpu", MLX's default device. Raises `UserError` if there is none."""
    device = mx.Device(getattr(mx, name))
    if not mx.is_available(device):
        raise UserError(
            f"params.yaml: train.device is {name}, which this MLX does not have; write cpu"
        )
    mx.set_default_device(device)


def load_splits() -> Splits:
    """Read the training and the validation split. The test split is for evaluation alone."""
    return Splits(load_split(TRAIN, random_access=True), load_split(VALIDATION, may_be_empty=True))


def describe(model_params: ModelParams, splits: Splits) -> Metadata:
    """Return what a network for `splits` is built from. Raises `UserError` if these differ."""
    split = splits.train
    metadata = Metadata(model_params, split.image_shape, split.class_names, split.preprocessing)
    metadata.check_compatible(VALIDATION, splits.validation)
    return metadata


def build(config: Config, metadata: Metadata, num_examples: int, ranks: Ranks) -> Run:
    """Build the network with its first weights, and its optimizer.

    Raises `UserError` if the network, its minibatches or its shards are impossible here.
    """
    params = config.train
    mx.random.seed(params.seed)
    model = metadata.build()
    check_feasible(params, model, num_examples)
    shards = Shards(params.shards, ranks)
    num_steps = params.num_epochs * math.ceil(num_examples / params.batch_size)
    return Run(config, model, make_optimizer(params, num_steps), shards)


def check_feasible(params: TrainParams, model: nn.Module, num_examples: int) -> None:
    """Raise `UserError` if a minibatch exceeds the data, or the network exceeds the memory."""
    if params.batch_size > num_examples:
        raise UserError(
            f"params.yaml: train.batch_size is {params.batch_size}, must be at most {num_examples},"
            " the number of training examples"
        )
    arrays = dict(tree_flatten(model.parameters())).values()
    num_bytes = sum(array.nbytes for array in arrays)
    needed = 4 * num_bytes  # weights, gradients, new weights, and momenta, which MLX always keeps
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"params.yaml: the network of the section model takes {needed / 1e9:,.0f} GB to train,"
            f" but this machine has {memory / 1e9:,.0f} GB; make it smaller"
        )


def identify(config: Config, splits: Splits, kernels: str) -> dict[str, str]:
    """Return everything that the result of a run depends on, as versions and hashes."""
    return {
        "code or packages": code_hash(),
        "params.yaml": config_hash(config),
        "the data": data_hash(*splits),
        "OpenBLAS": kernels,
    }


def check_ranks(ranks: Ranks, run: Run, splits: Splits, identity: dict[str, str]) -> None:
    """Raise `UserError` unless all ranks have the same inputs and compute the same bits."""
    if ranks.size == 1:
        return
    logits = predict(run.model, splits.train[: run.config.train.batch_size]).logits
    ranks.check_same_on_all_ranks(
        {
            **identity,
            "the checkpoint": digest(CHECKPOINT) if CHECKPOINT.is_file() else "",
            "the result of a matrix product": sha256(logits.data).hexdigest(),
        }
    )


class Progress:
    """The history of a run, which resumes from its checkpoint if an earlier run stopped."""

    def __init__(self, run: Run, identity: dict[str, str]) -> None:
        self.run, self.identity = run, identity
        rows = load_checkpoint(CHECKPOINT, identity, run.model, run.optimizer)
        self.history = [EpochMetrics(*row) for row in rows]
        self.epoch_started = time.perf_counter()

    def start(self) -> None:
        """Print that the run is resumed, if it is, and restore the history that DVC deleted."""
        if self.history:
            epochs = len(self.history)
            print(f"resumed after epoch {epochs}, where an earlier run stopped", flush=True)
            self.save_history()

    def report(self, metrics: EpochMetrics, num_examples: int) -> None:
        """Save and print the metrics of an epoch of `num_examples`."""
        self.history.append(metrics)
        self.save_history()
        run = self.run
        save_checkpoint(CHECKPOINT, self.identity, run.model, run.optimizer, self.history)
        now = time.perf_counter()
        rate = num_examples / (now - self.epoch_started)
        self.epoch_started = now
        num_epochs = str(run.config.train.num_epochs)
        number = f"epoch {metrics.epoch:{len(num_epochs)}}/{num_epochs}"
        values = [f"{name} {value:.4f}" for name, value in metrics.known().items()][1:]
        print(number, *values, f"{rate:,.0f} examples/s", sep="  ", flush=True)

    def save_history(self) -> None:
        """Write the metrics of the epochs so far, for `dvc plots show` to follow the training."""
        save_csv(HISTORY, EpochMetrics._fields, self.history)


def main(ranks: Ranks) -> None:
    config = read_config()
    select_device(config.train.device)
    kernels = load_openblas(config.train.threads)
    splits = load_splits()
    metadata = describe(config.model, splits)
    run = build(config, metadata, len(splits.train), ranks)
    identity = identify(config, splits, kernels)
    progress = Progress(run, identity)
    check_ranks(ranks, run, splits, identity)
    if ranks.rank == 0:  # which alone prints and writes
        progress.start()
    for metrics in train(run, splits, first_epoch=len(progress.history) + 1):
        if ranks.rank == 0:
            progress.report(metrics, len(splits.train))
    if ranks.rank == 0:
        save_model(MODEL, run.model, metadata)
        last = progress.history[-1].known()
        save_json(METRICS, {name: round(value, 6) for name, value in last.items()})
        CHECKPOINT.unlink(missing_ok=True)


if __name__ == "__main__":
    run_on_ranks(main)
