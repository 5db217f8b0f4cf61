import math
from dataclasses import astuple, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from stages.checkpoint import load_checkpoint, run_key, save_checkpoint
from stages.errors import UserError
from stages.files import Split
from stages.model import MLP, Metadata, load_model, save_model, score, to_pixels
from stages.preprocess import decode_split
from stages.train import Epoch, TrainParams, minibatches, sgd, shift, train
from tests.conftest import SMALL

PARAMS = TrainParams(
    num_layers=2,
    hidden_dim=32,
    dropout=0.0,
    max_shift=0,
    batch_size=64,
    num_epochs=3,
    learning_rate=0.1,
    learning_rate_schedule="constant",
    momentum=0.0,
    seed=7,
    device="cpu",
    threads=1,
)
ALL_KNOBS = replace(
    PARAMS,
    dropout=0.2,
    max_shift=2,
    learning_rate_schedule="cosine",
    momentum=0.9,
)
FILES = SMALL["mnist"]
TRAIN = decode_split(FILES["train-images-idx3-ubyte"], FILES["train-labels-idx1-ubyte"], 10)
VALIDATION = decode_split(FILES["t10k-images-idx3-ubyte"], FILES["t10k-labels-idx1-ubyte"], 10)
EMPTY = Split(TRAIN.images[:0], TRAIN.labels[:0])


def start(params: TrainParams) -> tuple[MLP, optim.SGD]:
    mx.random.seed(params.seed)
    model = MLP([784, *[params.hidden_dim] * params.num_layers, 10], params.dropout)
    return model, sgd(params, params.num_epochs * math.ceil(len(TRAIN) / params.batch_size))


def trained(
    params: TrainParams, validation_split: Split = VALIDATION
) -> tuple[dict[str, mx.array], list[Epoch]]:
    model, optimizer = start(params)
    history = list(train(model, optimizer, TRAIN, validation_split, params))
    weights = dict(tree_flatten(model.parameters()))
    return {name: array.T for name, array in weights.items()}, history


class PlainMLP(nn.Module):
    """The network as MLX's documentation presents it."""

    def __init__(self, num_layers: int, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        sizes = [input_dim] + [hidden_dim] * num_layers + [output_dim]
        self.layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)


def plainly_trained(params: TrainParams) -> tuple[dict[str, mx.array], list[Epoch]]:
    """Train as MLX's documentation does: float32 images, a step at a time, nothing clever."""
    train_images = mx.array(TRAIN.images.astype(np.float32) / 255)
    train_labels = mx.array(TRAIN.labels)
    test_images = mx.array(VALIDATION.images.astype(np.float32) / 255)
    test_labels = mx.array(VALIDATION.labels)

    def loss_fn(model: PlainMLP, x: mx.array, y: mx.array) -> mx.array:
        return mx.mean(nn.losses.cross_entropy(model(x), y))

    mx.random.seed(params.seed)
    model = PlainMLP(params.num_layers, 784, params.hidden_dim, 10)
    mx.eval(model.parameters())
    loss_and_grad_fn = nn.value_and_grad(model, loss_fn)
    num_steps = params.num_epochs * math.ceil(len(TRAIN) / params.batch_size)
    weights: dict[str, Any] = dict(tree_flatten(model.parameters()))
    velocity = {name: mx.zeros_like(weight) for name, weight in weights.items()}
    step = 0
    history = []
    for epoch in range(1, params.num_epochs + 1):
        order = np.random.default_rng((params.seed, epoch)).permutation(len(TRAIN))
        total = 0.0
        for start in range(0, len(order), params.batch_size):
            batch = mx.array(order[start : start + params.batch_size])
            loss, grads = loss_and_grad_fn(model, train_images[batch], train_labels[batch])
            falling = {
                "constant": 1.0,
                "linear": 1 - step / num_steps,
                "cosine": (1 + math.cos(math.pi * step / num_steps)) / 2,
            }[params.learning_rate_schedule]
            step += 1
            for name, grad in dict(tree_flatten(grads)).items():
                velocity[name] = params.momentum * velocity[name] + grad
                weights[name] -= params.learning_rate * falling * velocity[name]
            model.update(tree_unflatten(list(weights.items())))
            mx.eval(model.parameters(), velocity)
            total += float(loss) * len(batch)
        accuracy = mx.mean(mx.argmax(model(test_images), axis=1) == test_labels)
        loss = loss_fn(model, test_images, test_labels)
        history.append(Epoch(epoch, total / len(TRAIN), float(loss), float(accuracy)))
    return weights, history


@pytest.mark.parametrize(
    "params",
    [
        PARAMS,
        replace(PARAMS, num_layers=0),
        replace(PARAMS, num_layers=3, hidden_dim=7, batch_size=600, num_epochs=5),
        replace(PARAMS, momentum=0.9),
        replace(PARAMS, learning_rate_schedule="linear"),
        replace(PARAMS, momentum=0.5, learning_rate_schedule="cosine"),
    ],
)
def test_same_as_the_plain_loop(params: TrainParams) -> None:
    weights, history = trained(params)
    plain_weights, plain_history = plainly_trained(params)
    assert list(weights) == list(plain_weights)
    for name in weights:
        np.testing.assert_allclose(weights[name], plain_weights[name], rtol=0, atol=1e-5)
    for epoch, plain in zip(history, plain_history, strict=True):
        assert vars(epoch) == pytest.approx(vars(plain), abs=1e-5)


def test_it_learns() -> None:
    _, history = trained(replace(PARAMS, num_epochs=10))
    assert history[-1].validation_accuracy is not None
    assert history[-1].validation_accuracy > 0.9
    assert history[-1].train_loss < history[0].train_loss / 2


def test_the_seed_is_all_the_chance_there_is() -> None:
    first, _ = trained(PARAMS)
    again, _ = trained(PARAMS, validation_split=EMPTY)
    other, _ = trained(replace(PARAMS, seed=8))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)


def test_no_validation_split() -> None:
    _, history = trained(PARAMS, validation_split=EMPTY)
    assert {(epoch.validation_loss, epoch.validation_accuracy) for epoch in history} == {
        (None, None)
    }


def test_divergence_stops_training() -> None:
    with pytest.raises(UserError, match="diverges in epoch 1"):
        trained(replace(PARAMS, learning_rate=100.0, num_layers=10))


def test_divergence_of_a_weight_alone_stops_training() -> None:
    model = MLP([784, 4, 10])
    model.layers[0].bias = mx.full((4,), -mx.inf)  # behind ReLU it is not seen in the loss
    with pytest.raises(UserError, match=r"diverges in epoch 1 \(loss \d"):
        list(train(model, optim.SGD(learning_rate=0.1), TRAIN, EMPTY, PARAMS))


@pytest.mark.parametrize("params", [PARAMS, ALL_KNOBS])
@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_a_resumed_run_ends_as_an_undisturbed_one(
    stopped_after: int, params: TrainParams, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    weights, history = trained(params)
    key = run_key(params, (TRAIN, VALIDATION))

    model, optimizer = start(params)
    epochs = train(model, optimizer, TRAIN, VALIDATION, params)
    rows = [astuple(next(epochs)) for _ in range(stopped_after)]
    save_checkpoint(path, key, model, optimizer, rows)

    model, optimizer = start(params)
    resumed = [Epoch(*row) for row in load_checkpoint(path, key, model, optimizer)]
    assert len(resumed) == stopped_after
    resumed += train(model, optimizer, TRAIN, VALIDATION, params, first_epoch=stopped_after + 1)
    assert resumed == history
    for name, array in dict(tree_flatten(model.parameters())).items():
        assert np.array_equal(array.T, weights[name])


def test_dropout_is_for_training_alone() -> None:
    model = MLP([784, 32, 10], dropout=0.5)
    pixels = to_pixels(mx.array(TRAIN.images[:9]))
    assert not mx.array_equal(model(pixels), model(pixels))
    score(model, VALIDATION)
    assert mx.array_equal(model(pixels), model(pixels))
    _, history = trained(replace(PARAMS, dropout=0.5, num_epochs=10))
    assert history[-1].train_loss > trained(replace(PARAMS, num_epochs=10))[1][-1].train_loss


@pytest.mark.parametrize("max_shift", [1, 2, 8])
def test_shift(max_shift: int) -> None:
    images = TRAIN.images[:50]
    offsets = np.random.default_rng(0).integers(0, 2 * max_shift + 1, (len(images), 2))
    shifted = np.array(shift(mx.array(images), mx.array(offsets), max_shift))
    assert shifted.dtype == np.uint8
    for image, moved, (row, column) in zip(images, shifted, offsets, strict=True):
        padded = np.pad(image.reshape(28, 28), max_shift)
        assert (moved.reshape(28, 28) == padded[row : row + 28, column : column + 28]).all()


def test_each_epoch_shifts_anew() -> None:
    images, labels = mx.array(TRAIN.images), mx.array(TRAIN.labels)
    seen = []
    for seed in (0, 0, 1):
        random = np.random.default_rng(seed)
        ((pixels, _),) = minibatches(images, labels, 600, 2, random, mx.new_stream(mx.cpu))
        seen.append(pixels)
    assert mx.array_equal(seen[0], seen[1])
    assert not mx.array_equal(seen[0], seen[2])


def test_the_checkpoint_of_another_run_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    model, optimizer = MLP([784, 10]), optim.SGD(learning_rate=0.1)
    key = run_key(PARAMS, (TRAIN, VALIDATION))
    save_checkpoint(path, key, model, optimizer, [(1, 0.5, None, None)])
    assert load_checkpoint(path, key, model, optimizer) == [[1, 0.5, None, None]]
    others = {
        run_key(replace(PARAMS, num_epochs=4), (TRAIN, VALIDATION)),
        run_key(PARAMS, (TRAIN, EMPTY)),
        run_key(PARAMS, (VALIDATION, TRAIN)),
    }
    assert key not in others
    for other in others:
        assert load_checkpoint(path, other, model, optimizer) == []
    whole = bytearray(path.read_bytes())
    for damaged in (whole[:-1], whole[:50], b"", bytes(whole[:-9]) + b"\x55" + bytes(whole[-8:])):
        path.write_bytes(damaged)
        assert load_checkpoint(path, key, model, optimizer) == []
    save_model(path, model, Metadata([784, 10], "mnist", list("0123456789")))
    assert load_checkpoint(path, key, model, optimizer) == []
    with pytest.raises(UserError, match="damaged"):
        save_checkpoint(path, key, model, optimizer, [])
        load_model(path)


def test_a_model_file_rebuilds_the_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    metadata = Metadata([784, 16, 10], "mnist", list("0123456789"))
    model = MLP(metadata.layer_sizes)
    save_model(path, model, metadata)
    loaded, loaded_metadata = load_model(path)
    assert loaded_metadata == metadata
    assert score(loaded, VALIDATION).loss == score(model, VALIDATION).loss
    by_mlx: Any = mx.load(str(path), return_metadata=True)
    weights, entries = by_mlx
    assert weights["layers.0.weight"].shape == (16, 784)
    assert entries["layer_sizes"] == "[784, 16, 10]"


def test_damaged_model_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    metadata = Metadata([784, 16, 10], "mnist", list("0123456789"))
    save_model(path, MLP(metadata.layer_sizes), metadata)
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"junk",
        whole[:500],
        whole.replace(b"784, 16", b"784, 61"),
        whole[:-1] + b"\x55",
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            load_model(path)
    save_model(path, MLP([784, 17, 10]), metadata)
    with pytest.raises(UserError, match="damaged"):
        load_model(path)


def test_no_flipped_bit_of_a_model_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, MLP([4, 3, 2]), Metadata([4, 3, 2], "mnist", ["a", "b"]))
    whole = path.read_bytes()
    good, metadata = load_model(path)
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            model, named = load_model(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert named == metadata
            assert mx.array_equal(model(mx.ones((1, 4))), good(mx.ones((1, 4))))
