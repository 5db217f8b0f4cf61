"""Train the network by SGD: data/model.safetensors, and how that went in metrics/.

The loss and the loop are those of MLX's documentation, and so is the network as it comes.
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
from stages.shared.checkpoint import load_checkpoint, run_key, save_checkpoint
from stages.shared.cli import run
from stages.shared.data import Split, load_split, shuffled_indices
from stages.shared.distributed import Ranks, Shards, in_ranks
from stages.shared.dvc_lock import digest
from stages.shared.errors import UserError
from stages.shared.files import save_csv, save_json
from stages.shared.metrics import normalize, predict
from stages.shared.model_file import Metadata, save_model
from stages.shared.openblas import load_openblas
from stages.shared.params import read_params

TRAIN, VALIDATION = Path("data/train.npz"), Path("data/validation.npz")
FIGURES = Path("metrics/training.json")
# No output of the stage, for DVC removes those before it runs; Git ignores it.
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


Step = Callable[[mx.array, mx.array], mx.array]  # from pixels and labels to their mean loss


class EpochMetrics(NamedTuple):
    """A row of the history; the training loss is the mean over the epoch's minibatches."""

    epoch: int
    train_loss: float
    validation_loss: float | None = None  # without a validation split
    validation_accuracy: float | None = None

    def figures(self) -> dict[str, float]:
        """Those that there are."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def loss_fn(model: nn.Module, pixels: mx.array, labels: mx.array, count: int) -> mx.array:
    """The share of some examples in the mean cross entropy (nats) of a minibatch of `count`."""
    return nn.losses.cross_entropy(model(pixels), labels, reduction="sum") * (1 / count)


def sgd(params: TrainParams, num_steps: int) -> optim.SGD:
    """The optimizer; its learning rate falls to zero in `num_steps` unless it is constant."""
    learning_rate: Any = {
        "constant": params.learning_rate,
        "linear": optim.linear_schedule(params.learning_rate, 0.0, num_steps),
        "cosine": optim.cosine_decay(params.learning_rate, num_steps),
    }[params.learning_rate_schedule]
    return optim.SGD(learning_rate, params.momentum)


def minibatches(
    split: Split,
    batch_size: int,
    augment_params: AugmentParams,
    random: np.random.Generator,
    stream: mx.Stream,
) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield the pixels and labels of each minibatch, all examples once in random order.

    Each image is distorted anew, by what `random` gives after the order. `stream` makes a minibatch
    ready while the default stream takes the step before.
    """
    order = shuffled_indices(split, random)
    ready = None
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        with mx.stream(stream):
            images = augment(mx.array(split.images[batch]), augment_params, random)
            upcoming = normalize(images), mx.array(split.labels[batch])
        mx.async_eval(upcoming)
        if ready:
            yield ready
        ready = upcoming
    if ready:
        yield ready


def step_fn(model: nn.Module, optimizer: optim.SGD, shards: Shards, compiled: bool) -> Step:
    """A function that takes one step of SGD on a minibatch."""
    loss_and_grad_fn = shards.sum(nn.value_and_grad(model, loss_fn), model)

    def step(pixels: mx.array, labels: mx.array) -> mx.array:
        loss: mx.array
        loss, grads = loss_and_grad_fn(pixels, labels)
        optimizer.update(model, grads)
        return loss

    state = [model.state, optimizer.state, mx.random.state]
    return mx.compile(step, inputs=state, outputs=state) if compiled else step


def train_epoch(
    model: nn.Module,
    optimizer: optim.SGD,
    step: Step,
    batches: Iterable[tuple[mx.array, mx.array]],
) -> float:
    """Take one `step` for each minibatch; return the mean loss of their examples."""
    model.train()
    losses, sizes = [], []
    for pixels, labels in batches:
        loss = step(pixels, labels)
        mx.async_eval(loss)  # not waited for, and the update left to the next step: faster
        losses.append(loss)
        sizes.append(len(labels))
    mx.eval(model.parameters(), optimizer.state)
    return float(np.average(np.array(losses), weights=sizes))


def train(
    model: nn.Module,
    optimizer: optim.SGD,
    train_split: Split,
    validation_split: Split,
    params: TrainParams,
    augment_params: AugmentParams,
    shards: Shards,
    first_epoch: int = 1,
) -> Iterator[EpochMetrics]:
    """Train `model` in place, pausing after each epoch to tell how it went.

    What is random in an epoch depends on `params.seed` and the epoch alone. Raises `UserError` when
    the loss or a weight is no longer a finite number.
    """
    stream = mx.new_stream(mx.default_device())
    # On a CPU the compiler takes longer than it saves (docs/speed.md); it cannot see shards' seeds.
    compiled = mx.default_device() == mx.Device(mx.gpu) and shards.count == 1
    step = step_fn(model, optimizer, shards, compiled)
    for epoch in range(first_epoch, params.num_epochs + 1):
        random = np.random.default_rng((params.seed, epoch))
        shards.seed(params.seed << 32 | epoch)  # for dropout
        batches = minibatches(train_split, params.batch_size, augment_params, random, stream)
        name, steps = f"epoch {epoch}/{params.num_epochs}", len(train_split) / params.batch_size
        # From its third second on, and in a terminal only.
        bar = tqdm(batches, name, math.ceil(steps), leave=False, delay=2, disable=None)
        train_loss = train_epoch(model, optimizer, step, bar)
        parameters = dict(tree_flatten(model.parameters())).values()
        if not (math.isfinite(train_loss) and all(mx.isfinite(p).all() for p in parameters)):
            raise UserError(
                f"params.yaml: train.learning_rate is {params.learning_rate}, with which training"
                f" diverges in epoch {epoch} (loss {train_loss:.4g}); try a lower one"
            )
        if len(validation_split):
            scores = predict(model, validation_split)
            yield EpochMetrics(epoch, train_loss, scores.loss, scores.accuracy)
        else:
            yield EpochMetrics(epoch, train_loss)


def save_history(history: list[EpochMetrics]) -> None:
    """Write what is known of the epochs so far to metrics/history.csv."""
    save_csv(Path("metrics/history.csv"), EpochMetrics._fields, history)


def select_device(name: str) -> None:
    """Make `name`, "cpu" or "gpu", MLX's default. Raises `UserError` if there is none."""
    device = mx.Device(getattr(mx, name))
    if not mx.is_available(device):
        raise UserError(
            f"params.yaml: train.device is {name}, which this MLX does not have; write cpu"
        )
    mx.set_default_device(device)


def check_feasible(params: TrainParams, model: nn.Module, num_examples: int) -> None:
    """Raise `UserError` for a minibatch larger than the data, a network larger than the memory."""
    if params.batch_size > num_examples:
        raise UserError(
            f"params.yaml: train.batch_size is {params.batch_size}, must be at most {num_examples},"
            " the number of training examples"
        )
    size = sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
    needed = 4 * size  # weights, gradients, new weights, and momenta, which MLX always has
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"params.yaml: the network of the section model takes {needed / 1e9:,.0f} GB to train,"
            f" this machine has {memory / 1e9:,.0f}; make it smaller"
        )


@in_ranks(last=FIGURES)
def main(ranks: Ranks) -> None:
    model_params = read_params("model", ModelParams)
    augment_params = read_params("augment", AugmentParams)
    params = read_params("train", TrainParams)
    select_device(params.device)
    kernels = load_openblas(params.threads)
    train_split = load_split(TRAIN, random_access=True)
    validation_split = load_split(VALIDATION, may_be_empty=True)
    names, form = train_split.class_names, train_split.preprocessing
    metadata = Metadata(model_params, train_split.image_shape, names, form)
    metadata.check_compatible(VALIDATION, validation_split)
    mx.random.seed(params.seed)
    model = metadata.build()
    check_feasible(params, model, len(train_split))
    shards = Shards(params.shards, ranks)
    num_steps = params.num_epochs * math.ceil(len(train_split) / params.batch_size)
    optimizer = sgd(params, num_steps)
    splits = (train_split, validation_split)
    data = run_key((), splits)
    key = run_key((model_params, augment_params, params, kernels, data), ())
    history = [EpochMetrics(*row) for row in load_checkpoint(CHECKPOINT, key, model, optimizer)]
    if ranks.size > 1:
        logits = predict(model, train_split[: params.batch_size]).logits
        ranks.agree(
            {
                "code or packages": run_key((), ()),
                "params": run_key((model_params, augment_params, params), ()),
                "data": data,
                "checkpoint": digest(CHECKPOINT) if CHECKPOINT.is_file() else "",
                "last bits of a matrix product": kernels + sha256(logits.data).hexdigest(),
            }
        )
    if history and not ranks.rank:
        print(f"resumed after epoch {len(history)}, where an earlier run stopped", flush=True)
        save_history(history)  # which DVC has removed
    started = time.perf_counter()
    epochs = train(model, optimizer, *splits, params, augment_params, shards, len(history) + 1)
    for epoch in epochs:
        history.append(epoch)
        if ranks.rank:
            continue  # the first one writes
        save_history(history)  # for `dvc plots show` to follow
        save_checkpoint(CHECKPOINT, key, model, optimizer, history)
        seconds, started = time.perf_counter() - started, time.perf_counter()
        _, *figures = (f"{name} {value:.4f}" for name, value in epoch.figures().items())
        number = f"epoch {epoch.epoch:{len(str(params.num_epochs))}}/{params.num_epochs}"
        rate = f"{len(train_split) / seconds:,.0f} examples/s"
        print(number, *figures, rate, sep="  ", flush=True)
    if ranks.rank:
        return
    save_model(Path("data/model.safetensors"), model, metadata)
    last = history[-1].figures().items()
    save_json(FIGURES, {name: round(value, 6) for name, value in last})
    CHECKPOINT.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
