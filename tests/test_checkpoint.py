"""The checkpoint of a training run: its content, and when it is ignored."""

import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from stages.shared.checkpoint import (
    code_hash,
    config_hash,
    data_hash,
    imported_files,
    load_checkpoint,
    save_checkpoint,
)
from tests.conftest import SMALL, small_split

SPLITS = (SMALL["train"], SMALL["validation"])
IDENTITY = {"params": "same"}


def test_hashes_differ_with_params_and_data() -> None:
    train, validation = SPLITS
    hashes = [
        config_hash(1, "a"),
        config_hash(2, "a"),
        data_hash(train, validation),
        data_hash(validation, train),
        data_hash(train, validation[:0]),
        data_hash(train, small_split(len(validation), seed=9)),
    ]
    assert len(set(hashes)) == len(hashes)
    assert config_hash(1, "a") == hashes[0]
    assert data_hash(train, validation) == hashes[2]


def test_code_hash_covers_every_imported_module(monkeypatch: pytest.MonkeyPatch) -> None:
    files = imported_files()
    assert {"stages", "stages.shared", "stages.shared.checkpoint"} <= set(files)
    before = code_hash()
    assert code_hash() == before
    read_bytes = Path.read_bytes
    for edited in files.values():

        def read_edited(path: Path, edited: Path = edited) -> bytes:
            return read_bytes(path) + b"#" * (path == edited)

        monkeypatch.setattr(Path, "read_bytes", read_edited)
        assert code_hash() != before, edited
        monkeypatch.undo()


def test_code_hash_covers_the_gpu_but_not_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    info: dict[str, str | int] = {"device_name": "A", "architecture": "sm_90", "free_memory": 1}
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    before = code_hash()
    info["free_memory"] = 2
    assert code_hash() == before
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    assert code_hash() != before
    monkeypatch.undo()
    assert code_hash() != before  # on the device of this machine


def test_checkpoint_of_another_run_is_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    model, optimizer = nn.Linear(3, 2), optim.SGD(learning_rate=0.1, momentum=0.9)
    optimizer.update(model, {"weight": mx.ones((2, 3)), "bias": mx.ones(2)})
    save_checkpoint(path, IDENTITY, model, optimizer, [(1, 0.5, None, None)])
    other, other_optimizer = nn.Linear(3, 2), optim.SGD(learning_rate=0.1, momentum=0.9)
    before = dict(tree_flatten(other.parameters()))
    assert load_checkpoint(path, {"params": "other"}, other, other_optimizer) == []
    assert re.fullmatch(f"note: {path}: .*another run.* params; .*\n", capsys.readouterr().out)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:50], b"", whole[:-9] + b"\x55" + whole[-8:]):
        path.write_bytes(damaged)
        assert load_checkpoint(path, IDENTITY, other, other_optimizer) == []
    path.unlink()
    assert load_checkpoint(path, IDENTITY, other, other_optimizer) == []
    assert all(other[name] is array for name, array in before.items())

    path.write_bytes(whole)
    assert load_checkpoint(path, IDENTITY, other, other_optimizer) == [[1, 0.5, None, None]]
    assert all(mx.array_equal(other[name], model[name]) for name in before)
    momenta = dict(tree_flatten(other_optimizer.state))
    for name, array in dict(tree_flatten(optimizer.state)).items():
        assert mx.array_equal(momenta[name], array)


@pytest.mark.parametrize("rows", [[], [(1, 0.123456789012345, 0.5, 0.25)]])
def test_rows_keep_every_digit(rows: list[tuple[float, ...]], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    model, optimizer = nn.Linear(3, 2), optim.SGD(learning_rate=0.1)
    save_checkpoint(path, IDENTITY, model, optimizer, rows)
    assert load_checkpoint(path, IDENTITY, model, optimizer) == [list(row) for row in rows]
