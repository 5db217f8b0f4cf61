"""Shards of a minibatch, and checks between ranks, in one process."""

import os
import re
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from stages.shared.distributed import (
    RANK_AND_SIZE,
    Ranks,
    Shards,
    first_difference,
    first_error,
    rank_and_size,
)
from stages.shared.errors import UserError
from stages.train import loss_fn

PIXELS = mx.array(np.random.default_rng(0).normal(size=(70, 9)).astype(np.float32))
LABELS = mx.array(np.random.default_rng(1).integers(0, 3, 70))


def is_equal(tree: Any, other: Any) -> bool:
    """Return whether two nested structures of arrays are bitwise identical."""
    pairs: Any = zip(tree_flatten(tree), tree_flatten(other), strict=True)
    return all(mx.array_equal(a, b) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("count", [70, 4, 3, 1])
def test_shards_are_added_as_a_binary_tree(count: int) -> None:
    """Split 70 examples into 18, 18, 18 and 16, and 3 examples into 1, 1, 1 and 0."""
    model = nn.Linear(9, 3)
    pixels, labels = PIXELS[:count], LABELS[:count]
    shards = Shards(4, Ranks())
    shards.seed(0)
    found = shards.value_and_grad(model, loss_fn)(model, pixels, labels)

    def weighted_loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> Any:
        return loss_fn(model, x, y) * (len(y) / count)

    size = -(-count // 4)
    terms = []
    for start in range(0, 4 * size, size):
        if start < count:
            x, y = pixels[start : start + size], labels[start : start + size]
            terms.append(nn.value_and_grad(model, weighted_loss_fn)(model, x, y))
        else:
            terms.append(tree_map(mx.zeros_like, terms[0]))
    left, right = tree_map(mx.add, *terms[:2]), tree_map(mx.add, *terms[2:])
    assert is_equal(found, tree_map(mx.add, left, right))
    if count == 70:
        in_sequence = tree_map(mx.add, tree_map(mx.add, left, terms[2]), terms[3])
        assert not is_equal(found, in_sequence)


@pytest.mark.parametrize("count", [70, 6])
def test_running_statistics_are_averaged_over_the_shards(count: int) -> None:
    """A frozen layer stays as it is. Of 6 examples, the last shard is empty."""
    frozen = nn.Linear(9, 9)
    frozen.freeze()
    model = nn.Sequential(frozen, nn.BatchNorm(9), nn.Linear(9, 3))
    pixels, labels = PIXELS[:count], LABELS[:count]
    weight, mean = mx.array(frozen.weight), mx.array(model.layers[1].running_mean)
    shards = Shards(4, Ranks())
    size = -(-count // 4)
    parts = [frozen(pixels[start : start + size]) for start in range(0, count, size)]
    momentum = model.layers[1].momentum
    means = sum(len(part) / count * part.mean(axis=0) for part in parts)
    shards.value_and_grad(model, loss_fn)(model, pixels, labels)
    expected = (1 - momentum) * mean + momentum * means
    assert mx.allclose(model.layers[1].running_mean, expected, atol=1e-6)
    assert mx.array_equal(frozen.weight, weight)


def test_each_shard_of_each_step_has_its_own_random_numbers() -> None:
    model = nn.Linear(9, 3)

    def sample(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        samples.append(mx.random.uniform().item())
        return loss_fn(model, x, y)

    shards = Shards(4, Ranks())
    step = shards.value_and_grad(model, sample)
    runs = []
    for seed in (0, 0, 1):
        samples: list[Any] = []
        shards.seed(seed)
        for _ in range(3):
            step(model, PIXELS, LABELS)
        assert len(set(samples)) == len(samples) == 3 * 4
        runs.append(samples)
    assert runs[0] == runs[1]
    assert not set(runs[0]) & set(runs[2])


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LAUNCHER": "mpirun -np 4", **OPEN_MPI}, (3, 4)),
        ({"LAUNCHER": "srun -n 2", **SLURM}, (1, 2)),
        ({"LAUNCHER": "nice"}, (0, 1)),
        ({"LAUNCHER": "", **OPEN_MPI}, (0, 1)),
        (SLURM, (0, 1)),  # `srun --pty bash`
    ],
)
def test_rank_and_size_count_only_with_a_launcher(
    variables: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LAUNCHER", *chain(*RANK_AND_SIZE)):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert rank_and_size() == expected


@pytest.mark.parametrize(
    ("platform", "library"), [("linux", "libmpi.so.40"), ("darwin", "libmpi.40.dylib")]
)
@pytest.mark.parametrize("is_installed", [True, False])
def test_open_mpi_of_the_package_is_found(
    platform: str,
    library: str,
    is_installed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setenv("MLX_MPI_LIBNAME", "")  # restored after the test
    monkeypatch.delenv("MLX_MPI_LIBNAME")
    monkeypatch.setattr("mlx.core.distributed.is_available", lambda _: False)
    if is_installed:
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / library).touch()
    with pytest.raises(UserError, match=r"^LAUNCHER: .*Open MPI"):
        Ranks().join()
    expected = str(tmp_path / "lib" / library) if is_installed else library
    assert os.environ["MLX_MPI_LIBNAME"] == expected


def test_first_error_names_its_host_unless_all_have_it() -> None:
    good, bad = {"host": "a", "code": "1"}, {"host": "b", "error": "file: missing; make it"}
    assert first_error([good, good]) is None
    assert first_error([good, bad]) == "file: missing; make it (on b)"
    assert first_error([bad, bad]) == "file: missing; make it"


def test_first_difference_names_the_fact_and_both_hosts() -> None:
    one, two = {"host": "a", "code": "1", "data": "2"}, {"host": "b", "code": "1", "data": "3"}
    assert first_difference([one, {**one, "host": "b"}]) is None
    line = first_difference([one, two])
    assert line
    assert re.search(r"data differs .*\ba\b.*\bb\b.*; .*rerun", line)
