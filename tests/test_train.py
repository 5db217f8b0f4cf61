"""The train loop, on the tests' own network and data, and the errors of the stage."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from msgspec import UNSET
from msgspec.structs import replace

from stages import train as stage
from stages.model import ModelParams
from stages.shared.augment import AugmentParams
from stages.shared.checkpoint import load_checkpoint, save_checkpoint
from stages.shared.data import Split, save_split
from stages.shared.distributed import Ranks, Shards
from stages.shared.errors import UserError
from stages.shared.metrics import predict
from stages.shared.params import read_params
from stages.train import (
    Config,
    EpochMetrics,
    Splits,
    Training,
    TrainParams,
    batch_iterate,
    loss_fn,
    make_metadata,
    make_optimizer,
    make_step,
    prefetch,
    train,
)
from tests.conftest import ROOT, SMALL, Project, error_of, small_split

TRAIN, VALIDATION = SMALL["train"], SMALL["validation"]
EMPTY = TRAIN[:0]
PARAMS = replace(
    read_params("train", TrainParams, ROOT / "params.yaml"),
    batch_size=64,
    shards=1,
    num_epochs=3,
    learning_rate=0.1,
    learning_rate_schedule="constant",
    momentum=0.0,
    seed=7,
    device="cpu",
    threads=1,
)
ALL_ON = replace(PARAMS, learning_rate_schedule="cosine", momentum=0.9)
UNDISTORTED = AugmentParams(shift=0, rotation=0, scale=0, elastic=0)
DISTORTED = AugmentParams(shift=1, rotation=10, scale=0.1, elastic=0.5)


class Network(nn.Module):
    """Two linear layers with dropout, which differs in each epoch."""

    def __init__(self, hidden_dim: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = [
            nn.Linear(math.prod(TRAIN.image_shape), hidden_dim),
            nn.Linear(hidden_dim, len(TRAIN.class_names)),
        ]
        self.dropout = nn.Dropout(dropout)

    def __call__(self, pixels: mx.array) -> mx.array:
        hidden = mx.maximum(self.layers[0](pixels.reshape(len(pixels), -1)), 0)
        return self.layers[1](self.dropout(hidden))


def new_training(
    params: TrainParams, dropout: float = 0.0, augment_params: AugmentParams = UNDISTORTED
) -> Training:
    """Return a network with its first weights, and its optimizer."""
    mx.random.seed(params.seed)
    num_steps = params.num_epochs * math.ceil(len(TRAIN) / params.batch_size)
    unused: Any = None  # the network's own params
    config = Config(unused, augment_params, params)
    optimizer = make_optimizer(params, num_steps)
    return Training(config, Network(dropout=dropout), optimizer, Shards(params.shards, Ranks()))


def weights(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def train_all(
    params: TrainParams,
    validation: Split = VALIDATION,
    dropout: float = 0.0,
    augment_params: AugmentParams = UNDISTORTED,
) -> tuple[dict[str, mx.array], list[EpochMetrics]]:
    """Train from start to end; return the weights and the history."""
    run = new_training(params, dropout, augment_params)
    history = list(train(run, Splits(TRAIN, validation)))
    return weights(run.model), history


def train_plainly(params: TrainParams) -> tuple[dict[str, mx.array], list[EpochMetrics]]:
    """Train as MLX's documentation does: float32 images, step by step, without optimizations."""
    images, labels = mx.array(TRAIN.images.astype(np.float32) / 255), mx.array(TRAIN.labels)
    test_images = mx.array(VALIDATION.images.astype(np.float32) / 255)
    test_labels = mx.array(VALIDATION.labels)

    def plain_loss_fn(model: Network, x: mx.array, y: mx.array) -> mx.array:
        return mx.mean(nn.losses.cross_entropy(model(x), y))

    run = new_training(params)
    model: Any = run.model
    optimizer = run.optimizer
    loss_and_grad_fn = nn.value_and_grad(model, plain_loss_fn)
    history = []
    for epoch in range(1, params.num_epochs + 1):
        permutation = np.random.default_rng((params.seed, epoch)).permutation(len(TRAIN))
        total = 0.0
        for first in range(0, len(permutation), params.batch_size):
            batch = mx.array(permutation[first : first + params.batch_size])
            loss, grads = loss_and_grad_fn(model, images[batch], labels[batch])
            optimizer.update(model, grads)
            mx.eval(model.parameters(), optimizer.state)
            total += float(loss) * len(batch)
        accuracy = mx.mean(mx.argmax(model(test_images), axis=1) == test_labels)
        loss = plain_loss_fn(model, test_images, test_labels)
        history.append(EpochMetrics(epoch, total / len(TRAIN), float(loss), float(accuracy)))
    return weights(model), history


@pytest.mark.parametrize(
    "params",
    [
        PARAMS,
        replace(PARAMS, batch_size=500, num_epochs=5),
        replace(PARAMS, shards=4),
        replace(PARAMS, batch_size=62, shards=8),  # of the last minibatch, 4 are empty
        replace(PARAMS, momentum=0.9, learning_rate_schedule="linear"),
        replace(PARAMS, momentum=0.5, learning_rate_schedule="cosine"),
    ],
)
def test_training_equals_the_plain_loop(params: TrainParams) -> None:
    ours, history = train_all(params)
    plain, plain_history = train_plainly(params)
    for name in ours:
        np.testing.assert_allclose(ours[name], plain[name], rtol=0, atol=1e-5)
    for epoch, expected in zip(history, plain_history, strict=True):
        assert epoch == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("params", "augment_params"), [(PARAMS, UNDISTORTED), (ALL_ON, DISTORTED)])
def test_compiled_step_is_bitwise_identical(
    params: TrainParams, augment_params: AugmentParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, here on the CPU; the last minibatch is smaller and compiled by itself."""
    expected, history = train_all(params, VALIDATION, 0.2, augment_params)
    made = []

    def make_compiled_step(model: Any, optimizer: Any, shards: Shards, compiled: bool) -> Any:
        assert not compiled
        made.append(make_step(model, optimizer, shards, compiled=True))
        return made[-1]

    monkeypatch.setattr(stage, "make_step", make_compiled_step)
    ours, history_compiled = train_all(params, VALIDATION, 0.2, augment_params)
    assert len(made) == 1
    assert history_compiled == history
    for name in expected:
        assert mx.array_equal(ours[name], expected[name]), name


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda _: 1.0),
        ("linear", lambda part: 1 - part),
        ("cosine", lambda part: (1 + math.cos(math.pi * part)) / 2),
    ],
)
def test_learning_rate_follows_the_schedule(
    schedule: Any, factor: Callable[[float], float]
) -> None:
    params = replace(PARAMS, learning_rate=0.3, momentum=0.8, learning_rate_schedule=schedule)
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(params, num_steps=20)
    assert optimizer.momentum == 0.8
    for step in range(20):
        optimizer.update(model, model.parameters())
        assert float(optimizer.learning_rate) == pytest.approx(0.3 * factor(step / 20), abs=1e-6)


def test_loss_is_the_mean_cross_entropy() -> None:
    logits = np.random.default_rng(0).normal(size=(7, 3))
    labels = np.array([0, 1, 2, 0, 1, 2, 0])
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    model: Any = lambda pixels: pixels  # noqa: E731
    loss = loss_fn(model, mx.array(logits.astype(np.float32)), mx.array(labels))
    assert float(loss) == pytest.approx(
        -np.log(probabilities[np.arange(7), labels]).mean(), abs=1e-6
    )


def test_accuracy_rises_and_loss_falls() -> None:
    _, history = train_all(replace(PARAMS, num_epochs=10))
    assert history[-1].validation_accuracy is not None
    assert history[-1].validation_accuracy > 0.9
    assert history[-1].train_loss < history[0].train_loss / 2


def test_same_seed_gives_same_weights() -> None:
    first, _ = train_all(ALL_ON, VALIDATION, 0.2, DISTORTED)
    again, _ = train_all(ALL_ON, EMPTY, 0.2, DISTORTED)
    other, _ = train_all(replace(ALL_ON, seed=8), VALIDATION, 0.2, DISTORTED)
    assert all(mx.array_equal(first[name], again[name]) for name in first)
    assert not any(mx.array_equal(first[name], other[name]) for name in first)


def test_no_validation_split_gives_no_validation_metrics() -> None:
    _, history = train_all(PARAMS, validation=EMPTY)
    assert {(epoch.validation_loss, epoch.validation_accuracy) for epoch in history} == {
        (None, None)
    }


def test_dropout_is_off_in_evaluation() -> None:
    run = new_training(PARAMS, dropout=0.5)
    history = list(train(run, Splits(TRAIN, VALIDATION)))
    assert predict(run.model, VALIDATION).loss == history[-1].validation_loss
    assert history[-1].train_loss > train_all(PARAMS)[1][-1].train_loss


def diverge(run: Training) -> str:
    """Return the error that training ends with."""
    with pytest.raises(UserError) as error:
        list(train(run, Splits(TRAIN, EMPTY)))
    return str(error.value)


def test_diverged_loss_stops_training() -> None:
    run = new_training(PARAMS)
    run.model.layers[1].weight *= 1e38
    assert re.fullmatch(
        rf"params\.yaml: .*epoch 1 .*nan.* train\.learning_rate .*{PARAMS.learning_rate}.*",
        diverge(run),
    )


def test_diverged_weight_stops_training() -> None:
    without_decay = optim.SGD(PARAMS.learning_rate)  # weight decay would show it in the loss
    run = new_training(PARAMS)._replace(optimizer=without_decay)
    run.model.layers[0].bias = mx.full((16,), -mx.inf)  # ReLU hides it from the loss
    assert re.search(r"epoch 1 \(train_loss \d", diverge(run))


def test_validation_loss_that_is_not_finite_stops_training() -> None:
    """Black images train none of these weights, and finite weights can give infinite logits."""
    run = new_training(PARAMS)
    run.model.layers[0].weight = mx.full(run.model.layers[0].weight.shape, 3e38)
    black = Split(np.zeros_like(TRAIN.images), TRAIN.labels, TRAIN.class_names)
    with pytest.raises(UserError, match=r"epoch 1 \(train_loss \d.*validation_loss (inf|nan)\)"):
        list(train(run, Splits(black, VALIDATION)))


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
@pytest.mark.parametrize(
    ("params", "dropout", "augment_params"),
    [
        (PARAMS, 0.0, UNDISTORTED),
        (ALL_ON, 0.2, DISTORTED),
        (replace(ALL_ON, shards=4), 0.2, DISTORTED),
    ],
)
def test_resumed_run_ends_like_an_undisturbed_one(
    stopped_after: int,
    params: TrainParams,
    dropout: float,
    augment_params: AugmentParams,
    tmp_path: Path,
) -> None:
    path, identity = tmp_path / "checkpoint.safetensors", {"params": "same"}
    splits = Splits(TRAIN, VALIDATION)
    expected, history = train_all(params, VALIDATION, dropout, augment_params)

    stopped = new_training(params, dropout, augment_params)
    epochs = train(stopped, splits)
    rows = [next(epochs) for _ in range(stopped_after)]
    save_checkpoint(path, identity, stopped.model, stopped.optimizer, rows)

    run = new_training(params, dropout, augment_params)
    saved = load_checkpoint(path, identity, run.model, run.optimizer)
    resumed = [EpochMetrics(*row) for row in saved]
    assert len(resumed) == stopped_after
    resumed += train(run, splits, first_epoch=stopped_after + 1)
    assert resumed == history
    for name, array in weights(run.model).items():
        assert mx.array_equal(array, expected[name])


def test_each_epoch_has_every_example_once_in_a_new_order() -> None:
    names = tuple(map(str, range(250)))
    split = Split(TRAIN.images[:250], np.arange(250, dtype=np.uint8), names)
    orders = []
    for seed in (0, 0, 1):
        rng = np.random.default_rng(seed)
        batches = list(prefetch(batch_iterate(split, 64, UNDISTORTED, rng), mx.new_stream(mx.cpu)))
        assert [len(labels) for _, labels in batches] == [64, 64, 64, 250 - 3 * 64]
        for pixels, labels in batches:
            expected = split.images[np.array(labels)].astype(np.float32) / 255
            assert mx.array_equal(pixels, mx.array(expected))
        orders.append([int(label) for _, labels in batches for label in np.array(labels)])
    assert sorted(orders[0]) == list(range(250))
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_prefetch_is_one_batch_ahead() -> None:
    started = []

    def batches() -> Iterator[tuple[mx.array, mx.array]]:
        for number in range(3):
            started.append(number)
            yield mx.array(number), mx.array(number)

    seen = []
    for number, _ in prefetch(batches(), mx.new_stream(mx.cpu)):
        seen.append(int(number))
        assert started == list(range(min(len(seen) + 1, 3)))
    assert seen == [0, 1, 2]


def test_distortions_do_not_depend_on_the_batch_size() -> None:
    seen = []
    for seed, batch_size in ((0, 64), (0, 7), (0, len(TRAIN)), (1, 64)):
        rng = np.random.default_rng(seed)
        batches = batch_iterate(TRAIN, batch_size, DISTORTED, rng)
        seen.append(mx.concatenate([pixels for pixels, _ in batches]))
    assert mx.array_equal(seen[0], seen[1])
    assert mx.array_equal(seen[0], seen[2])
    assert not mx.array_equal(seen[0], seen[3])
    assert 0 <= seen[0].min() < seen[0].max() <= 1


def test_metadata_name_the_gpu_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    params, splits = read_params("model", ModelParams, ROOT / "params.yaml"), Splits(TRAIN, EMPTY)
    monkeypatch.setattr(stage, "backend", lambda: ("mlx 1", "Device(gpu, 0)"))
    for device, expected in ((mx.cpu, UNSET), (mx.gpu, ("mlx 1", "Device(gpu, 0)"))):
        default = mx.Device(device)
        monkeypatch.setattr(mx, "default_device", lambda default=default: default)
        assert make_metadata(params, splits).backend == expected


def test_network_larger_than_the_memory_is_rejected() -> None:
    model = nn.Linear(2**15, 2**17)  # 16 GiB; MLX is lazy and has computed nothing yet
    model.layers = [nn.Linear(2**15, 2**17) for _ in range(99)]
    with pytest.raises(UserError, match=r"^params\.yaml: .* model .*6,8\d\d GB .*smaller$"):
        stage.check_feasible(replace(PARAMS, momentum=0.9), model, len(TRAIN))
    stage.check_feasible(PARAMS, Network(), len(TRAIN))


def test_stop_after_the_last_epoch_loses_nothing(
    finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC deletes the outputs of the stage; only the checkpoint is left."""
    monkeypatch.chdir(finished.root)
    before = finished.results()
    outputs = [Path("data/model.safetensors"), *Path("metrics").glob("[ht]*")]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "save_model", stop)
        with pytest.raises(KeyboardInterrupt):
            stage.main(Ranks())
    for path in outputs:
        path.unlink()
    stage.main(Ranks())
    assert finished.results() == before


def test_history_grows_with_each_epoch(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.root)
    num_lines = []
    monkeypatch.setattr(
        stage,
        "save_checkpoint",
        lambda *_: num_lines.append(len(Path("metrics/history.csv").read_text().splitlines())),
    )
    stage.main(Ranks())
    assert num_lines == [2 + epoch for epoch in range(finished.params()["train"]["num_epochs"])]


Mistake = tuple[Callable[[Project], object], str]
MISTAKES: list[Mistake] = [
    (
        lambda project: (project.root / "data/train.npz").unlink(),
        r"data/train\.npz: not found.*`dvc repro`",
    ),
    (
        lambda project: save_split(project.root / "data/validation.npz", small_split(5, (9, 12))),
        r"data/validation\.npz: .*\(9, 12\).*\(9, 11\).*; .*one data set",
    ),
    (
        lambda project: project.set(batch_size=len(TRAIN) + 1),
        rf"params\.yaml: train\.batch_size is {len(TRAIN) + 1}, .*at most {len(TRAIN)}",
    ),
]
if not mx.is_available(mx.Device(mx.gpu)):
    MISTAKES.append(
        (
            lambda project: project.set(device="gpu"),
            r"params\.yaml: train\.device is gpu.*; write cpu",
        )
    )


@pytest.mark.parametrize(("mistake", "pattern"), MISTAKES)
def test_mistake_is_one_line(
    mistake: Callable[[Project], object],
    pattern: str,
    finished: Project,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(finished)

    def main() -> None:
        stage.main(Ranks())

    assert re.match(f"error: {pattern}", error_of(main, finished, monkeypatch))
