"""The train loop, on a network and on data of the tests' own, and the stage's mistakes."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from msgspec.structs import replace

from stages import train as stage
from stages.shared.augment import AugmentParams
from stages.shared.checkpoint import load_checkpoint, run_key, save_checkpoint
from stages.shared.data import Split, save_split
from stages.shared.distributed import Ranks, Shards
from stages.shared.errors import UserError
from stages.shared.metrics import predict
from stages.shared.params import read_params
from stages.train import EpochMetrics, TrainParams, loss_fn, minibatches, sgd, step_fn, train
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
ALONE = Shards(1, Ranks())


class Network(nn.Module):
    """Two linear layers, with dropout that each epoch draws anew."""

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


def start(params: TrainParams, dropout: float = 0.0) -> tuple[Network, optim.SGD]:
    mx.random.seed(params.seed)
    steps = params.num_epochs * math.ceil(len(TRAIN) / params.batch_size)
    return Network(dropout=dropout), sgd(params, steps)


def shards(params: TrainParams) -> Shards:
    return Shards(params.shards, Ranks())


def weights(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def trained(
    params: TrainParams,
    validation_split: Split = VALIDATION,
    dropout: float = 0.0,
    augment_params: AugmentParams = UNDISTORTED,
) -> tuple[dict[str, mx.array], list[EpochMetrics]]:
    model, optimizer = start(params, dropout)
    epochs = train(
        model, optimizer, TRAIN, validation_split, params, augment_params, shards(params)
    )
    history = list(epochs)
    return weights(model), history


def plainly_trained(params: TrainParams) -> tuple[dict[str, mx.array], list[EpochMetrics]]:
    """Train as MLX's documentation does: float32 images, a step at a time, nothing clever."""
    images, labels = mx.array(TRAIN.images.astype(np.float32) / 255), mx.array(TRAIN.labels)
    test_images = mx.array(VALIDATION.images.astype(np.float32) / 255)
    test_labels = mx.array(VALIDATION.labels)

    def plain_loss_fn(model: Network, x: mx.array, y: mx.array) -> mx.array:
        return mx.mean(nn.losses.cross_entropy(model(x), y))

    model, optimizer = start(params)
    loss_and_grad_fn = nn.value_and_grad(model, plain_loss_fn)
    history = []
    for epoch in range(1, params.num_epochs + 1):
        order = np.random.default_rng((params.seed, epoch)).permutation(len(TRAIN))
        total = 0.0
        for first in range(0, len(order), params.batch_size):
            batch = mx.array(order[first : first + params.batch_size])
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
def test_same_as_the_plain_loop(params: TrainParams) -> None:
    ours, history = trained(params)
    plain, plain_history = plainly_trained(params)
    for name in ours:
        np.testing.assert_allclose(ours[name], plain[name], rtol=0, atol=1e-5)
    for epoch, expected in zip(history, plain_history, strict=True):
        assert epoch == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("params", "augment_params"), [(PARAMS, UNDISTORTED), (ALL_ON, DISTORTED)])
def test_a_compiled_step_gives_the_same_bits(
    params: TrainParams, augment_params: AugmentParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, here on the CPU; the last minibatch is smaller and compiled by itself."""
    expected, history = trained(params, VALIDATION, 0.2, augment_params)
    made = []

    def compiled_step_fn(model: Any, optimizer: Any, shards: Shards, compiled: bool) -> Any:
        assert not compiled
        made.append(step_fn(model, optimizer, shards, compiled=True))
        return made[-1]

    monkeypatch.setattr(stage, "step_fn", compiled_step_fn)
    ours, history_compiled = trained(params, VALIDATION, 0.2, augment_params)
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
def test_the_learning_rate_of_each_step(schedule: Any, factor: Callable[[float], float]) -> None:
    params = replace(PARAMS, learning_rate=0.3, momentum=0.8, learning_rate_schedule=schedule)
    model = nn.Linear(2, 2)
    optimizer = sgd(params, num_steps=20)
    assert optimizer.momentum == 0.8
    for step in range(20):
        optimizer.update(model, model.parameters())
        assert float(optimizer.learning_rate) == pytest.approx(0.3 * factor(step / 20), abs=1e-6)


def test_the_loss_is_the_mean_cross_entropy() -> None:
    logits = np.random.default_rng(0).normal(size=(7, 3))
    labels = np.array([0, 1, 2, 0, 1, 2, 0])
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    model: Any = lambda pixels: pixels  # noqa: E731
    loss = loss_fn(model, mx.array(logits.astype(np.float32)), mx.array(labels), len(labels))
    assert float(loss) == pytest.approx(-np.log(shares[np.arange(7), labels]).mean(), abs=1e-6)


def test_it_learns() -> None:
    _, history = trained(replace(PARAMS, num_epochs=10))
    assert history[-1].validation_accuracy is not None
    assert history[-1].validation_accuracy > 0.9
    assert history[-1].train_loss < history[0].train_loss / 2


def test_the_seed_is_all_the_chance_there_is() -> None:
    first, _ = trained(ALL_ON, VALIDATION, 0.2, DISTORTED)
    again, _ = trained(ALL_ON, EMPTY, 0.2, DISTORTED)
    other, _ = trained(replace(ALL_ON, seed=8), VALIDATION, 0.2, DISTORTED)
    assert all(mx.array_equal(first[name], again[name]) for name in first)
    assert not any(mx.array_equal(first[name], other[name]) for name in first)


def test_no_validation_split() -> None:
    _, history = trained(PARAMS, validation_split=EMPTY)
    assert {(epoch.validation_loss, epoch.validation_accuracy) for epoch in history} == {
        (None, None)
    }


def test_dropout_is_for_training_alone() -> None:
    model, optimizer = start(PARAMS, dropout=0.5)
    (*_, last) = train(model, optimizer, TRAIN, VALIDATION, PARAMS, UNDISTORTED, ALONE)
    assert predict(model, VALIDATION).loss == last.validation_loss
    assert last.train_loss > trained(PARAMS)[1][-1].train_loss


def test_divergence_stops_training() -> None:
    model, optimizer = start(PARAMS)
    model.layers[1].weight *= 1e38
    with pytest.raises(UserError) as error:
        list(train(model, optimizer, TRAIN, EMPTY, PARAMS, UNDISTORTED, ALONE))
    assert str(error.value) == (
        "params.yaml: train.learning_rate is 0.1, with which training diverges in epoch 1"
        " (loss nan); try a lower one"
    )


def test_divergence_of_a_weight_alone_stops_training() -> None:
    model = Network()
    model.layers[0].bias = mx.full((16,), -mx.inf)  # behind ReLU it is not seen in the loss
    with pytest.raises(UserError, match=r"diverges in epoch 1 \(loss \d"):
        list(train(model, optim.SGD(0.1), TRAIN, EMPTY, PARAMS, UNDISTORTED, ALONE))


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
@pytest.mark.parametrize(
    ("params", "dropout", "augment_params"),
    [
        (PARAMS, 0.0, UNDISTORTED),
        (ALL_ON, 0.2, DISTORTED),
        (replace(ALL_ON, shards=4), 0.2, DISTORTED),
    ],
)
def test_a_resumed_run_ends_as_an_undisturbed_one(
    stopped_after: int,
    params: TrainParams,
    dropout: float,
    augment_params: AugmentParams,
    tmp_path: Path,
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    expected, history = trained(params, VALIDATION, dropout, augment_params)
    key = run_key(params, (TRAIN, VALIDATION))

    model, optimizer = start(params, dropout)
    others = augment_params, shards(params)
    epochs = train(model, optimizer, TRAIN, VALIDATION, params, *others)
    rows = [next(epochs) for _ in range(stopped_after)]
    save_checkpoint(path, key, model, optimizer, rows)

    model, optimizer = start(params, dropout)
    resumed = [EpochMetrics(*row) for row in load_checkpoint(path, key, model, optimizer)]
    assert len(resumed) == stopped_after
    resumed += train(model, optimizer, TRAIN, VALIDATION, params, *others, stopped_after + 1)
    assert resumed == history
    for name, array in weights(model).items():
        assert mx.array_equal(array, expected[name])


def test_each_epoch_takes_every_example_once_in_a_new_order() -> None:
    names = tuple(map(str, range(250)))
    split = Split(TRAIN.images[:250], np.arange(250, dtype=np.uint8), names)
    orders = []
    for seed in (0, 0, 1):
        random = np.random.default_rng(seed)
        batches = list(minibatches(split, 64, UNDISTORTED, random, mx.new_stream(mx.cpu)))
        assert [len(chosen) for _, chosen in batches] == [64, 64, 64, 250 - 3 * 64]
        for pixels, chosen in batches:
            expected = split.images[np.array(chosen)].astype(np.float32) / 255
            assert mx.array_equal(pixels, mx.array(expected))
        orders.append([int(label) for _, chosen in batches for label in np.array(chosen)])
    assert sorted(orders[0]) == list(range(250))
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_distortions_depend_on_the_place_in_the_epoch_alone() -> None:
    """Whatever the size of a minibatch, so that the work can be divided in other ways."""
    seen = []
    for seed, batch_size in ((0, 64), (0, 7), (0, len(TRAIN)), (1, 64)):
        random = np.random.default_rng(seed)
        stream = mx.new_stream(mx.cpu)
        batches = minibatches(TRAIN, batch_size, DISTORTED, random, stream)
        seen.append(mx.concatenate([pixels for pixels, _ in batches]))
    assert mx.array_equal(seen[0], seen[1])
    assert mx.array_equal(seen[0], seen[2])
    assert not mx.array_equal(seen[0], seen[3])
    assert 0 <= seen[0].min() < seen[0].max() <= 1


def test_a_network_that_no_memory_holds_is_refused() -> None:
    model = nn.Linear(2**15, 2**17)  # 16 GiB, of which MLX has computed nothing yet
    model.layers = [nn.Linear(2**15, 2**17) for _ in range(99)]
    with pytest.raises(UserError) as error:
        stage.check_feasible(replace(PARAMS, momentum=0.9), model, len(TRAIN))
    assert re.fullmatch(
        r"params.yaml: the network of the section model takes 6,8\d\d GB to train, this machine has"
        r" [\d,]+; make it smaller",
        str(error.value),
    )
    stage.check_feasible(PARAMS, Network(), len(TRAIN))


def test_a_stop_after_the_last_epoch_loses_nothing(
    finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC removes what the stage wrote; only the checkpoint is left."""
    monkeypatch.chdir(finished.root)
    before = finished.results()
    outputs = [Path("data/model.safetensors"), *Path("metrics").glob("[ht]*")]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "save_model", stop)
        with pytest.raises(KeyboardInterrupt):
            stage.main()
    for path in outputs:
        path.unlink()
    stage.main()
    assert finished.results() == before


def test_a_running_training_can_be_followed(
    finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.root)
    seen = []
    monkeypatch.setattr(
        stage,
        "save_checkpoint",
        lambda *_: seen.append(len(Path("metrics/history.csv").read_text().splitlines())),
    )
    stage.main()
    assert seen == [2 + epoch for epoch in range(finished.params()["train"]["num_epochs"])]


def put(split: Split) -> Callable[[Project], object]:
    """Let data/validation.npz hold `split`."""
    return lambda project: save_split(project.root / "data/validation.npz", split)


MISTAKES: list[tuple[Callable[[Project], object], str]] = [
    (
        lambda project: (project.root / "data/train.npz").unlink(),
        "error: data/train.npz: not found; make it with `dvc repro`",
    ),
    (
        put(small_split(5, (9, 12))),
        "error: data/validation.npz: has images (9, 12) and classes ant, bee, cow, but the network"
        " is for (9, 11) and ant, bee, cow; make the splits from one data set",
    ),
]
MISTAKES += [
    (
        lambda project: project.set(batch_size=len(TRAIN) + 1),
        f"error: params.yaml: train.batch_size is {len(TRAIN) + 1}, must be at most {len(TRAIN)},"
        " the number of training examples",
    ),
]
if not mx.is_available(mx.Device(mx.gpu)):
    MISTAKES.append(
        (
            lambda project: project.set(device="gpu"),
            "error: params.yaml: train.device is gpu, which this MLX does not have; write cpu",
        )
    )


@pytest.mark.parametrize(("mistake", "line"), MISTAKES)
def test_mistake(
    mistake: Callable[[Project], object],
    line: str,
    finished: Project,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(finished)
    assert error_of(stage.main, finished, monkeypatch) == line
