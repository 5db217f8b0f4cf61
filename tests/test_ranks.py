"""That the bits are those of one process, however many there are, and how several end.

Those with several processes take Open MPI (docs/scale.md): `.venv/bin/python -m pytest -m mpi`.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from stages.shared.ranks import Ranks, Shards
from stages.train import loss_fn

PIXELS = mx.array(np.random.default_rng(0).normal(size=(70, 9)).astype(np.float32))
LABELS = mx.array(np.random.default_rng(1).integers(0, 3, 70))


def equal(one: Any, other: Any) -> bool:
    pairs: Any = zip(tree_flatten(one), tree_flatten(other), strict=True)
    return all(mx.array_equal(a, b) for (_, a), (_, b) in pairs)


def test_one_shard_is_the_minibatch() -> None:
    model = nn.Linear(9, 3)
    loss_and_grad_fn = nn.value_and_grad(model, loss_fn)
    of_one = Shards(1, Ranks()).sum(loss_and_grad_fn, model)
    assert equal(of_one(PIXELS, LABELS), loss_and_grad_fn(model, PIXELS, LABELS, 70))

    def mean_fn(model: nn.Module) -> Any:
        return nn.losses.cross_entropy(model(PIXELS), LABELS, reduction="mean")

    assert equal(of_one(PIXELS, LABELS), nn.value_and_grad(model, mean_fn)(model))


@pytest.mark.parametrize("count", [70, 4, 3, 1])
def test_shards_are_added_as_a_tree(count: int) -> None:
    """Of 70 examples as 18, 18, 18 and 16, of 3 as 1, 1, 1 and none."""
    model = nn.Linear(9, 3)
    loss_and_grad_fn = nn.value_and_grad(model, loss_fn)
    pixels, labels = PIXELS[:count], LABELS[:count]
    shards = Shards(4, Ranks())
    shards.seed(0)
    found = shards.sum(loss_and_grad_fn, model)(pixels, labels)

    terms = []
    for part in np.array_split(np.arange(4 * -(-count // 4)), 4):
        index = mx.array(part[part < count])
        if index.size:
            terms.append(loss_and_grad_fn(model, pixels[index], labels[index], count))
        else:
            terms.append(tree_map(mx.zeros_like, terms[0]))
    left, right = tree_map(mx.add, *terms[:2]), tree_map(mx.add, *terms[2:])
    assert equal(found, tree_map(mx.add, left, right))
    if count == 70:
        in_a_row = tree_map(mx.add, tree_map(mx.add, left, terms[2]), terms[3])
        assert not equal(found, in_a_row)


def test_each_shard_of_each_step_draws_its_own_random_numbers() -> None:
    def draw(*_: object) -> tuple[mx.array, list[mx.array]]:
        drawn.append(mx.random.uniform().item())
        return mx.array(0.0), [mx.array(0.0)]

    shards = Shards(4, Ranks())
    step = shards.sum(draw, nn.Linear(1, 1))
    runs = []
    for seed in (0, 0, 1):
        drawn: list[Any] = []
        shards.seed(seed)
        for _ in range(3):
            step(PIXELS, LABELS)
        assert len(set(drawn)) == len(drawn) == 3 * 4
        runs.append(drawn)
    assert runs[0] == runs[1]
    assert not set(runs[0]) & set(runs[2])
