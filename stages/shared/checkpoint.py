"""Keep the progress of a training run, so that an interrupted one goes on where it stopped."""

import sys
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from stages.shared.data import Split
from stages.shared.model_file import load_arrays, save_arrays


def run_key(choices: object, splits: Iterable[Split]) -> str:
    """A digest of what the outcome of a run depends on: choices, data, code, MLX and NumPy.

    The code is all that this process has imported from here.
    """
    mlx = mx.__version__  # type: ignore[attr-defined]
    digest = sha256(f"{choices} {mlx} {np.__version__}".encode())
    for split in splits:
        digest.update(repr(split.images.shape).encode())
        digest.update(split.images.data)
        digest.update(split.labels.data)
    for path in sorted(_imported_code()):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _imported_code() -> set[str]:
    specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    return {
        spec.origin for spec in specs if spec and spec.origin and spec.name.startswith("stages.")
    }


def save_checkpoint(
    path: Path, key: str, model: nn.Module, optimizer: optim.Optimizer, rows: list[Any]
) -> None:
    """Write all that the next epoch needs, and the `rows` of the history so far, to `path`."""
    state = {"model": model.parameters(), "optimizer": optimizer.state}
    save_arrays(path, dict(tree_flatten(state)), {"key": key, "rows": rows})


def load_checkpoint(
    path: Path, key: str, model: nn.Module, optimizer: optim.Optimizer
) -> list[Any]:
    """Put `model` and `optimizer` where a run with the same `key` stopped; return its rows.

    Without such a run, or if its checkpoint is damaged, all stays as it is and there are no rows.
    """
    if not path.is_file():  # nor a pipe, which would never end
        return []
    try:
        arrays, entries = load_arrays(path)
    except ValueError:
        return []
    if entries.get("key") != key:
        return []
    state = tree_unflatten(list(arrays.items()))
    model.update(state["model"])
    optimizer.state = state["optimizer"]
    rows: list[Any] = entries["rows"]
    return rows
