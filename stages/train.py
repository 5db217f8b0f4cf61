"""Train the network by SGD. Write data/model.safetensors, and its training history to metrics/.

The loop follows MLX's example of a multi-layer perceptron; comments explain where it differs:
https://ml-explore.github.io/mlx/build/html/examples/mlp.html

MLX is lazy: an operation only adds to a graph. `mx.eval` computes what the graph leads to and
waits for the result, `mx.async_eval` does not wait, and `float()` or `np.array()` evaluate, too:
https://ml-explore.github.io/mlx/build/html/usage/lazy_evaluation.html
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from msgspec import UNSET, Meta, Struct
from tqdm import tqdm

from stages.model import ModelParams
from stages.shared.augment import AugmentParams, augment
from stages.shared.checkpoint import (
    backend,
    code_hash,
    config_hash,
    data_hash,
    load_checkpoint,
    save_checkpoint,
)
from stages.shared.contention import ContentionMonitor
from stages.shared.data import Split, load_split, shuffled_indices
from stages.shared.distributed import Ranks, Shards, run_on_ranks
from stages.shared.dvc_lock import digest
from stages.shared.errors import UserError
from stages.shared.files import save_csv, save_json
from stages.shared.inputs import Inputs
from stages.shared.metrics import normalize, predict
from stages.shared.model_file import Metadata, flat_parameters, save_model
from stages.shared.openblas import load_openblas
from stages.shared.params import read_params

TRAIN, VALIDATION = Path("data/train.npz"), Path("data/validation.npz")
MODEL = Path("data/model.safetensors")
HISTORY, METRICS = Path("metrics/history.csv"), Path("metrics/training.json")
# Not a DVC output: DVC deletes outputs before a run. Git ignores it.
CHECKPOINT = Path("data/checkpoint.safetensors")

Batch = tuple[mx.array, mx.array]  # pixels, float32 (N, *image_shape), and labels, uint8 (N,)
Step = Callable[[mx.array, mx.array], mx.array]  # updates the weights, returns the mean loss


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
    """The training split and the validation split, which may be empty."""

    train: Split
    validation: Split


class Training(NamedTuple):
    """A network, its optimizer, and the config and shards of its training."""

    config: Config
    model: nn.Module
    optimizer: optim.SGD
    shards: Shards


class EpochMetrics(NamedTuple):
    """A row of the history. Losses are mean cross entropies in nats."""

    epoch: int
    train_loss: float  # mean over the epoch, while the network changes
    validation_loss: float | None = None  # None without a validation split
    validation_accuracy: float | None = None


def loss_fn(model: nn.Module, pixels: mx.array, labels: mx.array) -> mx.array:
    """Return the mean cross entropy in nats."""
    return nn.losses.cross_entropy(model(pixels), labels, reduction="mean")


def make_optimizer(params: TrainParams, num_steps: int) -> optim.SGD:
    """Return SGD with the learning rate schedule of `params` over `num_steps` steps."""
    learning_rate: float | Callable[[mx.array], mx.array] = params.learning_rate
    if params.learning_rate_schedule == "linear":
        learning_rate = optim.linear_schedule(params.learning_rate, 0.0, num_steps)
    elif params.learning_rate_schedule == "cosine":
        learning_rate = optim.cosine_decay(params.learning_rate, num_steps)
    return optim.SGD(learning_rate, params.momentum)


def batch_iterate(
    split: Split, batch_size: int, augment_params: AugmentParams, rng: np.random.Generator
) -> Iterator[Batch]:
    """Yield minibatches of all examples in random order, each image with its own distortion."""
    indices = shuffled_indices(split, rng)
    for start in range(0, len(indices), batch_size):
        batch_indices = indices[start : start + batch_size]
        images = augment(mx.array(split.images[batch_indices]), augment_params, rng)
        yield normalize(images), mx.array(split.labels[batch_indices])


def prefetch(batches: Iterator[Batch], stream: mx.Stream) -> Iterator[Batch]:
    """Yield `batches`, computing each one while the previous one is in use.

    An MLX stream is a queue of operations, on a CPU a thread of its own. An operation belongs to
    the stream that is current when the operation is called, so the graph of the next minibatch is
    built for `stream`. The training step runs on the default stream at the same time. MLX itself
    lets an operation wait for its inputs from another stream.
    """

    def start_next() -> Batch | None:
        with mx.stream(stream):
            batch = next(batches, None)
            if batch is not None:
                mx.async_eval(batch)
        return batch

    batch = start_next()
    while batch is not None:
        next_batch = start_next()
        yield batch
        batch = next_batch


def make_step(model: nn.Module, optimizer: optim.SGD, shards: Shards, compiled: bool) -> Step:
    """Return a function that takes one step of SGD on a minibatch and returns its mean loss.

    MLX has no `backward` and no `zero_grad`: `nn.value_and_grad` turns `loss_fn` into a function
    that returns the loss and new arrays, its gradients with respect to the model's parameters.
    """
    if shards.count == 1:
        loss_and_grad_fn = nn.value_and_grad(model, loss_fn)
    else:
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
    """Train for a single epoch. Return the mean loss of its examples.

    `step` only builds a graph. `mx.async_eval(loss)` starts to compute this loss and all that it
    depends on: also the gradients and the update of the step before. MLX's example calls
    `mx.eval(model.parameters(), ...)` here instead, which waits in each step and is slower.
    """
    model.train()  # `predict` switches to evaluation mode
    losses, sizes = [], []
    for pixels, labels in batches:
        loss = step(pixels, labels)
        mx.async_eval(loss)
        losses.append(loss)
        sizes.append(len(labels))
    mx.eval(model.parameters(), optimizer.state)  # no loss depends on the last update
    return float(np.average(np.array(losses), weights=sizes))


def train(training: Training, splits: Splits, first_epoch: int = 1) -> Iterator[EpochMetrics]:
    """Train the network in place. Yield the metrics after each epoch.

    The random numbers of an epoch depend only on train.seed and on the epoch's number, so a resumed
    run continues with the same ones. Raises `UserError` if training diverges.
    """
    config, model, optimizer, shards = training
    params = config.train
    num_batches = math.ceil(len(splits.train) / params.batch_size)
    stream = mx.new_stream(mx.default_device())
    # On a CPU, compiling takes longer than it saves (docs/speed.md). With several shards, a
    # compiled step would reuse the seeds of its first call.
    compiled = mx.default_device() == mx.Device(mx.gpu) and shards.count == 1
    step = make_step(model, optimizer, shards, compiled)
    for epoch in range(first_epoch, params.num_epochs + 1):
        rng = np.random.default_rng((params.seed, epoch))
        shards.seed(params.seed << 32 | epoch)  # a single number, as MLX needs for dropout
        batches = batch_iterate(splits.train, params.batch_size, config.augment, rng)
        # In a terminal, show progress after two seconds.
        progress_bar = tqdm(
            prefetch(batches, stream),
            desc=f"epoch {epoch}/{params.num_epochs}",
            total=num_batches,
            leave=False,
            delay=2,
            disable=None,
        )
        train_loss = train_epoch(model, optimizer, step, progress_bar)
        metrics = EpochMetrics(epoch, train_loss)
        if len(splits.validation):
            predictions = predict(model, splits.validation)
            metrics = EpochMetrics(epoch, train_loss, predictions.loss, predictions.accuracy)
        check_finite(model, metrics, params)
        yield metrics


def check_finite(model: nn.Module, metrics: EpochMetrics, params: TrainParams) -> None:
    """Raise `UserError` if a weight or a loss is not a finite number.

    Finite weights can be so large that a loss is not finite.
    """
    weights = flat_parameters(model).values()
    values = known_values(metrics)
    is_finite = all(map(math.isfinite, values.values()))
    if not (is_finite and all(mx.isfinite(array).all() for array in weights)):
        losses = [f"{name} {value:.4g}" for name, value in values.items() if "loss" in name]
        raise UserError(
            f"params.yaml: training diverged in epoch {metrics.epoch} ({', '.join(losses)}); lower"
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
            f"params.yaml: train.device is {name}, which this MLX does not have; write cpu, or"
            " install MLX for NVIDIA GPUs with `make setup GPU=cuda13`"
        )
    mx.set_default_device(device)


def load_splits() -> Splits:
    """Load the training and the validation split. The test split is for evaluation alone."""
    return Splits(load_split(TRAIN, random_access=True), load_split(VALIDATION, may_be_empty=True))


def make_metadata(model_params: ModelParams, splits: Splits) -> Metadata:
    """Return what the network is built from. Raises `UserError` if the splits do not match."""
    split = splits.train
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    metadata = Metadata(
        model_params,
        split.image_shape,
        split.class_names,
        split.preprocessing,
        UNSET if on_cpu else backend(),
    )
    metadata.check_compatible(VALIDATION, splits.validation)
    return metadata


def make_training(config: Config, metadata: Metadata, num_examples: int, ranks: Ranks) -> Training:
    """Build the network with its first weights, and its optimizer.

    Seeds MLX's random numbers. Raises `UserError` for params that are impossible here.
    """
    params = config.train
    mx.random.seed(params.seed)
    model = metadata.build()
    check_feasible(params, model, num_examples)
    num_steps = params.num_epochs * math.ceil(num_examples / params.batch_size)
    optimizer = make_optimizer(params, num_steps)
    return Training(config, model, optimizer, Shards(params.shards, ranks))


def check_feasible(params: TrainParams, model: nn.Module, num_examples: int) -> None:
    """Raise `UserError` if a minibatch exceeds the data, or the weights exceed the memory."""
    if params.batch_size > num_examples:
        raise UserError(
            f"params.yaml: train.batch_size is {params.batch_size}, must be at most {num_examples},"
            " the number of training examples"
        )
    # The first weights are lazy, too: their size is known, but they take no memory yet.
    num_bytes = sum(array.nbytes for array in flat_parameters(model).values())
    needed = 4 * num_bytes  # weights, gradients, new weights, and momenta even if momentum is 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"params.yaml: the network of the section model takes {needed / 1e9:,.0f} GB to train,"
            f" but this machine has {memory / 1e9:,.0f} GB; make it smaller"
        )


def identify(config: Config, splits: Splits, kernels: str) -> dict[str, str]:
    """Return hashes and versions of what a checkpoint and all ranks must have in common."""
    return {
        "code or packages": code_hash(),
        "params.yaml": config_hash(config),
        "the data": data_hash(*splits),
        "OpenBLAS": kernels,
    }


def check_ranks(ranks: Ranks, training: Training, splits: Splits, identity: dict[str, str]) -> None:
    """Raise `UserError` unless all ranks have the same inputs and compute the same logits."""
    if ranks.size == 1:
        return
    logits = predict(training.model, splits.train[: training.config.train.batch_size]).logits
    ranks.check_same_on_all_ranks(
        {
            **identity,
            "the checkpoint": digest(CHECKPOINT) if CHECKPOINT.is_file() else "",
            "the result of a matrix product": sha256(logits.data).hexdigest(),
        }
    )


def resume(training: Training, identity: dict[str, str]) -> list[EpochMetrics]:
    """Continue where an earlier run stopped: restore weights and optimizer, return its history."""
    rows = load_checkpoint(CHECKPOINT, identity, training.model, training.optimizer)
    return [EpochMetrics(*row) for row in rows]


def save_progress(
    training: Training, identity: dict[str, str], history: list[EpochMetrics]
) -> None:
    """Write the checkpoint, and the history for `dvc plots show` to follow the training."""
    save_csv(HISTORY, EpochMetrics._fields, history)
    save_checkpoint(CHECKPOINT, identity, training.model, training.optimizer, history)


def known_values(metrics: EpochMetrics) -> dict[str, float]:
    """Return the epoch and the metrics that are not None, by name."""
    return {name: value for name, value in metrics._asdict().items() if value is not None}


def print_epoch(metrics: EpochMetrics, num_epochs: int, examples_per_second: float) -> None:
    """Print one line about an epoch."""
    values = known_values(metrics)
    epoch = f"epoch {values.pop('epoch'):{len(str(num_epochs))}}/{num_epochs}"
    columns = [f"{name} {value:.4f}" for name, value in values.items()]
    print(epoch, *columns, f"{examples_per_second:,.0f} examples/s", sep="  ", flush=True)


def save_results(training: Training, metadata: Metadata, metrics: EpochMetrics) -> None:
    """Write the model, and the metrics of the last epoch."""
    save_model(MODEL, training.model, metadata)
    values = known_values(metrics)
    save_json(METRICS, {name: round(value, 6) for name, value in values.items()})


def main(ranks: Ranks) -> None:
    inputs = Inputs(resumes=True)
    config = read_config()
    select_device(config.train.device)
    kernels = load_openblas(config.train.threads)  # before the first matrix product
    splits = load_splits()
    metadata = make_metadata(config.model, splits)
    training = make_training(config, metadata, len(splits.train), ranks)
    identity = identify(config, splits, kernels)
    inputs.check_unchanged()  # otherwise `identity` could be of other code or data
    history = resume(training, identity)
    check_ranks(ranks, training, splits, identity)
    is_first = ranks.rank == 0  # the rank that prints and writes
    if history and is_first:
        print(f"resumed after epoch {len(history)}, where an earlier run stopped", flush=True)
        save_progress(training, identity, history)  # DVC deleted the history
    monitor = ContentionMonitor(config.train.threads)
    started = time.perf_counter()
    for metrics in train(training, splits, first_epoch=len(history) + 1):
        history.append(metrics)
        if is_first:
            inputs.note_change()
            monitor.check()
            save_progress(training, identity, history)
            seconds, started = time.perf_counter() - started, time.perf_counter()
            print_epoch(metrics, config.train.num_epochs, len(splits.train) / seconds)
    if is_first:
        inputs.check_unchanged()
        save_results(training, metadata, history[-1])
        inputs.check_unchanged()
        CHECKPOINT.unlink(missing_ok=True)


if __name__ == "__main__":
    run_on_ranks(main)
