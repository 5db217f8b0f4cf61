"""Train the multi-layer perceptron by SGD: data/model.safetensors and metrics/history.csv.

The model, the loss and the loop are those of MLX's documentation.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Annotated

from stages.blas import use_threads

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from stages.checkpoint import load_checkpoint, run_key, save_checkpoint
from stages.datasets import DATASETS, FetchParams
from stages.errors import UserError, run
from stages.files import Split, load_split, save_csv
from stages.model import MLP, Metadata, save_model, score, to_pixels
from stages.params import Choice, Range, read_params

# No output of the stage, for DVC removes those before it runs; Git ignores it.
CHECKPOINT = Path("data/checkpoint.safetensors")


@dataclass(frozen=True)
class TrainParams:
    """The section `train` of params.yaml."""

    num_layers: Annotated[int, Range(0, 100)]
    hidden_dim: Annotated[int, Range(1, 8192)]
    batch_size: Annotated[int, Range(1, 60_000)]
    num_epochs: Annotated[int, Range(1, 10_000)]
    learning_rate: Annotated[float, Range(1e-6, 100.0)]
    seed: Annotated[int, Range(0, 2**32 - 1)]
    device: Annotated[str, Choice(("cpu", "gpu"))]
    threads: Annotated[int, Range(1, 256)]


@dataclass(frozen=True)
class Epoch:
    """A row of the history; the training loss is the mean over the epoch, learning meanwhile."""

    epoch: int
    train_loss: float
    validation_loss: float | None  # None without a validation split
    validation_accuracy: float | None


def loss_fn(model: MLP, pixels: mx.array, labels: mx.array) -> mx.array:
    """Mean cross entropy (nats) of a minibatch."""
    return nn.losses.cross_entropy(model(pixels), labels, reduction="mean")


def minibatches(
    images: mx.array, labels: mx.array, order: NDArray[np.int64], batch_size: int, stream: mx.Stream
) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield the pixels and labels of each minibatch of the examples in `order`.

    `stream` makes a minibatch ready while the default stream takes the step before.
    """
    ready = None
    for start in range(0, len(order), batch_size):
        batch = mx.array(order[start : start + batch_size])
        with mx.stream(stream):
            upcoming = to_pixels(images[batch]), labels[batch]
        mx.async_eval(upcoming)
        if ready:
            yield ready
        ready = upcoming
    if ready:
        yield ready


def train_epoch(
    model: MLP, optimizer: optim.SGD, batches: Iterable[tuple[mx.array, mx.array]]
) -> float:
    """Take one step of SGD for each minibatch; return the mean loss of their examples."""
    loss_and_grad_fn = nn.value_and_grad(model, loss_fn)
    losses, sizes = [], []
    for pixels, labels in batches:
        loss, grads = loss_and_grad_fn(model, pixels, labels)
        optimizer.update(model, grads)
        mx.async_eval(loss, model.parameters(), optimizer.state)  # do not wait for it
        losses.append(loss)
        sizes.append(len(labels))
    return float(np.average(np.array(losses), weights=sizes))


def train(
    model: MLP,
    optimizer: optim.SGD,
    train_split: Split,
    validation_split: Split,
    params: TrainParams,
    first_epoch: int = 1,
) -> Iterator[Epoch]:
    """Train `model` in place, pausing after each epoch to tell how it went.

    The order of the examples in an epoch depends on `params.seed` and the epoch alone. Raises
    `UserError` when the loss or a weight is no longer a finite number.
    """
    images, labels = mx.array(train_split.images), mx.array(train_split.labels)
    stream = mx.new_stream(mx.default_device())
    for epoch in range(first_epoch, params.num_epochs + 1):
        order = np.random.default_rng((params.seed, epoch)).permutation(len(train_split))
        batches = minibatches(images, labels, order, params.batch_size, stream)
        train_loss = train_epoch(model, optimizer, batches)
        parameters = dict(tree_flatten(model.parameters())).values()
        if not (math.isfinite(train_loss) and all(mx.isfinite(p).all() for p in parameters)):
            raise UserError(
                f"params.yaml: train.learning_rate is {params.learning_rate}, with which training"
                f" diverges in epoch {epoch} (loss {train_loss:.4g}); try a lower one"
            )
        validation_loss = validation_accuracy = None
        if len(validation_split):
            validation_loss, predictions = score(model, validation_split)
            correct = int((predictions == validation_split.labels).sum())
            validation_accuracy = correct / len(validation_split)
        yield Epoch(epoch, train_loss, validation_loss, validation_accuracy)


def summary(epoch: Epoch, num_epochs: int) -> str:
    """The figures of an epoch in a line."""
    line = f"epoch {epoch.epoch:{len(str(num_epochs))}}/{num_epochs}"
    line += f"  train loss {epoch.train_loss:.4f}"
    if epoch.validation_loss is not None:
        line += f"  validation loss {epoch.validation_loss:.4f}"
        line += f"  accuracy {epoch.validation_accuracy:.4f}"
    return line


def select_device(name: str) -> None:
    """Make `name`, "cpu" or "gpu", MLX's default. Raises `UserError` if the machine has it not."""
    device = mx.Device(getattr(mx, name))
    if not mx.is_available(device):
        raise UserError(f"params.yaml: train.device is {name}, which this MLX has not; write cpu")
    mx.set_default_device(device)


def main() -> None:
    dataset_name = read_params("fetch", FetchParams).dataset
    params = read_params("train", TrainParams)
    select_device(params.device)
    use_threads(params.threads)
    train_split = load_split(Path("data/train.npz"))
    validation_split = load_split(Path("data/validation.npz"))
    class_names = list(DATASETS[dataset_name].class_names)
    hidden = [params.hidden_dim] * params.num_layers
    metadata = Metadata(
        [train_split.images.shape[1], *hidden, len(class_names)], dataset_name, class_names
    )
    mx.random.seed(params.seed)
    model = MLP(metadata.layer_sizes)
    optimizer = optim.SGD(learning_rate=params.learning_rate)
    splits = (train_split, validation_split)
    key = run_key(params, splits)
    history = [Epoch(*row) for row in load_checkpoint(CHECKPOINT, key, model, optimizer)]
    if history:
        print(f"resumed after epoch {len(history)}, where an earlier run stopped", flush=True)
    started = time.perf_counter()
    for epoch in train(model, optimizer, *splits, params, first_epoch=len(history) + 1):
        history.append(epoch)
        save_checkpoint(CHECKPOINT, key, model, optimizer, [astuple(row) for row in history])
        seconds, started = time.perf_counter() - started, time.perf_counter()
        rate = f"{len(train_split) / seconds:,.0f} examples/s"
        print(f"{summary(epoch, params.num_epochs)}  {rate}", flush=True)
    save_model(Path("data/model.safetensors"), model, metadata)
    columns = [field.name for field in fields(Epoch)]
    save_csv(Path("metrics/history.csv"), columns, map(astuple, history))
    CHECKPOINT.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
