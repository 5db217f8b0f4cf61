"""The progress of a training run: what it holds, and when it is not used."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from stages.shared.checkpoint import load_checkpoint, run_key, save_checkpoint
from tests.conftest import SMALL, small_split

SPLITS = (SMALL["train"], SMALL["validation"])


def test_the_key_is_of_params_data_and_code() -> None:
    keys = {
        run_key("params", SPLITS),
        run_key("other params", SPLITS),
        run_key("params", SPLITS[::-1]),
        run_key("params", (SPLITS[0], SPLITS[1][:0])),
        run_key("params", (SPLITS[0], small_split(len(SPLITS[1]), seed=9))),
    }
    assert len(keys) == 5
    assert run_key("params", SPLITS) in keys


def test_only_the_same_run_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    model, optimizer = nn.Linear(3, 2), optim.SGD(learning_rate=0.1, momentum=0.9)
    optimizer.update(model, {"weight": mx.ones((2, 3)), "bias": mx.ones(2)})
    save_checkpoint(path, "key", model, optimizer, [(1, 0.5, None, None)])
    other, other_optimizer = nn.Linear(3, 2), optim.SGD(learning_rate=0.1, momentum=0.9)
    before = dict(tree_flatten(other.parameters()))
    assert load_checkpoint(path, "another", other, other_optimizer) == []
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:50], b"", whole[:-9] + b"\x55" + whole[-8:]):
        path.write_bytes(damaged)
        assert load_checkpoint(path, "key", other, other_optimizer) == []
    path.unlink()
    assert load_checkpoint(path, "key", other, other_optimizer) == []
    assert all(other[name] is array for name, array in before.items())

    path.write_bytes(whole)
    assert load_checkpoint(path, "key", other, other_optimizer) == [[1, 0.5, None, None]]
    assert all(mx.array_equal(other[name], model[name]) for name in before)
    momenta = dict(tree_flatten(other_optimizer.state))
    for name, array in dict(tree_flatten(optimizer.state)).items():
        assert mx.array_equal(momenta[name], array)


@pytest.mark.parametrize("rows", [[], [(1, 0.123456789012345, 0.5, 0.25)]])
def test_rows_keep_every_digit(rows: list[tuple[float, ...]], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    model, optimizer = nn.Linear(3, 2), optim.SGD(learning_rate=0.1)
    save_checkpoint(path, "key", model, optimizer, rows)
    assert load_checkpoint(path, "key", model, optimizer) == [list(row) for row in rows]
