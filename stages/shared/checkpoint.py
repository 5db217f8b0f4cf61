"""Save the progress of a training run, so that an interrupted run resumes after its last epoch."""

import os
import sys
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from stages.shared.data import Split
from stages.shared.errors import DamagedError
from stages.shared.model_file import load_arrays, save_arrays

# Each package has its own kernels. Listing all installed packages would take 0.1 s.
MLX_PACKAGES = ("mlx", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal")


def config_hash(*params: object) -> str:
    """Return the SHA-256 of the values of params."""
    return sha256(repr(params).encode()).hexdigest()


def data_hash(*splits: Split) -> str:
    """Return the SHA-256 of the images and labels of splits."""
    digest = sha256()
    for split in splits:
        digest.update(repr(split.images.shape).encode())
        digest.update(split.images.data)
        digest.update(split.labels.data)
    return digest.hexdigest()


def code_hash() -> str:
    """Return the SHA-256 of this project's imported code and of the packages that compute."""
    digest = sha256(repr([backend(), np.__version__]).encode())
    for name, path in sorted(imported_files().items()):
        digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()


def backend() -> tuple[str, ...]:
    """Return MLX's packages with their versions, the device, and all else that decides its bits.

    On Linux CPUs the kernels of OpenBLAS decide the bits of a result. Elsewhere the chip decides
    them and, on some GPUs, the permission to use TF32 in products.
    """
    packages = []
    for name in MLX_PACKAGES:
        with suppress(PackageNotFoundError):
            packages.append(f"{name} {version(name)}")
    device = mx.default_device()
    if sys.platform == "linux" and device == mx.Device(mx.cpu):
        return (*packages, str(device))
    info = mx.device_info()  # also has the free memory, which differs from run to run
    chip = f"{info.get('device_name')} {info.get('architecture')}"
    tf32 = f"MLX_ENABLE_TF32={os.environ.get('MLX_ENABLE_TF32', '')}"
    return (*packages, str(device), chip, tf32)


def imported_files() -> dict[str, Path]:
    """Return the imported modules of the package `stages` and their files.

    Their specs have the names, because the module that Python runs is called `__main__`.
    """
    specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    return {
        spec.name: Path(spec.origin)
        for spec in specs
        if spec and spec.origin and spec.name.split(".")[0] == "stages"
    }


def save_checkpoint(
    path: Path, identity: dict[str, str], model: nn.Module, optimizer: optim.Optimizer, rows: Any
) -> None:
    """Write the state that the next epoch needs and the history's `rows` to `path`.

    `identity` holds hashes of the run's inputs. Only a run with the same hashes resumes.
    """
    state = {"model": model.parameters(), "optimizer": optimizer.state}
    save_arrays(path, dict(tree_flatten(state)), {"identity": identity, "rows": rows})


def load_checkpoint(
    path: Path, identity: dict[str, str], model: nn.Module, optimizer: optim.Optimizer
) -> list[Any]:
    """Restore `model` and `optimizer` from `path`; return the history's rows.

    Changes nothing and returns no rows if there is no checkpoint, or if it is damaged or of a run
    with another `identity`. In the last two cases, prints a note.
    """
    if not path.is_file():  # a pipe would block
        return []
    try:
        arrays, entries = load_arrays(path)
    except DamagedError:
        print(f"note: {path}: damaged, so training starts from the beginning")
        return []
    other = entries.get("identity")
    if other != identity:
        known = other if isinstance(other, dict) else {}
        changed = [name for name, value in identity.items() if known.get(name) != value]
        reason = f"because of changes in {', '.join(changed)}"
        print(f"note: {path}: belongs to another run, {reason}; training starts from the beginning")
        return []
    state = tree_unflatten(list(arrays.items()))
    model.update(state["model"])
    optimizer.state = state["optimizer"]
    rows: list[Any] = entries["rows"]
    return rows
