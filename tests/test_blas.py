"""That OpenBLAS serves MLX on Linux, and that it gives the same bits on each x86-64 CPU with AVX2.

The second takes QEMU (Debian's qemu-user) and about five minutes:
`.venv/bin/python -m pytest -m qemu -s`.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

AVX2 = "x86_64" in platform.machine() and "avx2" in Path("/proc/cpuinfo").read_text().split()
linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS has a fast BLAS of its own")

RATE = """
import time
import mlx.core as mx

a, b = mx.random.normal((2, 512, 512))
seconds = []
for _ in range(20):
    mx.eval(a, b)
    started = time.perf_counter()
    mx.eval(a @ b)
    seconds.append(time.perf_counter() - started)
print(min(seconds))
"""
CORE = """
from stages import blas

blas._openblas.scipy_openblas_get_corename.restype = blas.ctypes.c_char_p
print(blas._openblas.scipy_openblas_get_corename().decode())
"""
DIGEST = """
from tests.test_train import PARAMS, trained
from hashlib import sha256

weights, history = trained(PARAMS)
print(sha256(b"".join(bytes(memoryview(weights[name])) for name in sorted(weights))).hexdigest())
"""
NO_LIBRARY = "import sys; sys.prefix = '/nowhere'\n"


def printed(code: str, *emulator: str, **environment: str) -> str:
    """What `code` prints, run by a Python of its own."""
    command = [*emulator, sys.executable, "-c", code]
    inherited = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
    environment = {**inherited, **environment}
    return subprocess.check_output(command, cwd=ROOT, text=True, env=environment).strip()


@linux
def test_openblas_serves_matmul() -> None:
    reference = float(printed(RATE))
    ours = float(printed(f"import stages.blas\n{RATE}"))
    assert reference / ours > 3  # measured: 25 on one core


@linux
def test_without_it_all_works_and_a_line_says_what_is_lost() -> None:
    code = f"{NO_LIBRARY}from stages.blas import use_threads\nuse_threads(1)\n{RATE}"
    note, seconds = printed(code).splitlines()
    assert note.startswith("note: without OpenBLAS, training on the CPU takes about 10 times longe")
    assert float(seconds) > 0


@linux
@pytest.mark.skipif(not AVX2, reason="only CPUs with AVX2 are held to one kernel family")
def test_kernels_are_those_of_haswell_unless_told_otherwise() -> None:
    assert printed(CORE) == "Haswell"
    assert printed(CORE, OPENBLAS_CORETYPE="Sandybridge") == "Sandybridge"


@pytest.mark.qemu
@pytest.mark.skipif(not AVX2, reason="needs an x86-64 CPU with AVX2")
def test_same_bits_on_other_cpus() -> None:
    models = ("Haswell", "Broadwell", "Skylake-Client", "EPYC", "EPYC-Rome", "EPYC-Milan", "max")
    native = printed(DIGEST)
    print(f"\n{native} natively")
    for model in models:
        emulated = printed(DIGEST, "qemu-x86_64", "-cpu", model)
        print(f"{emulated} on {model}")
        assert emulated == native
