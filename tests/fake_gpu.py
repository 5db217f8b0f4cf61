"""Let MLX seem to compute on a GPU that rounds float32 products as TF32 does (NVIDIA, Apple M5).

`python -m pytest -p tests.fake_gpu` runs the tests of one process with it, and they must pass.
"""

from collections.abc import Callable
from typing import Any

import pytest

import stages as stages  # before MLX, so that it can use OpenBLAS

import mlx.core as mx  # isort: skip


def to_tf32(array: mx.array, increment: int) -> mx.array:
    """Cut to the 10 bits of TF32's fraction. The gradient is that of the identity."""
    if array.dtype != mx.float32:
        return array
    bits = (mx.view(mx.stop_gradient(array), mx.uint32) + increment) & 0xFFFFE000
    return array + mx.stop_gradient(mx.view(bits, mx.float32) - array)


def install(patch: Callable[[object, str, object], None] = setattr) -> None:
    """Make a GPU the default device, as it is with MLX's packages for GPUs. It computes on the CPU.

    `patch` is `setattr`, or that of a test, which restores everything.
    """
    device = mx.Device(mx.gpu)
    real_stream, real_matmul, real_addmm = mx.new_stream, mx.array.__matmul__, mx.addmm

    def set_default_device(new: Any) -> None:
        nonlocal device
        device = new if isinstance(new, mx.Device) else mx.Device(new)

    def rounded(array: mx.array, increment: int) -> mx.array:
        return to_tf32(array, increment) if device == mx.Device(mx.gpu) else array

    # Two kernels give different bits: one rounds down, the other to the nearest.
    def addmm(c: mx.array, a: mx.array, b: mx.array, **options: Any) -> mx.array:
        return real_addmm(c, rounded(a, 0), rounded(b, 0), **options)

    def matmul(a: mx.array, b: mx.array) -> mx.array:
        return real_matmul(rounded(a, 0x1000), rounded(b, 0x1000))

    patch(mx, "default_device", lambda: device)
    patch(mx, "set_default_device", set_default_device)
    patch(mx, "new_stream", lambda _: real_stream(mx.cpu))
    patch(mx, "addmm", addmm)
    patch(mx, "matmul", matmul)
    patch(mx.array, "__matmul__", matmul)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Install it before tests/conftest.py."""
    install()
