"""Put OpenBLAS under MLX on Linux, where MLX's own package brings a reference BLAS.

MLX calls `cblas_sgemm`, and the first library in the global symbol scope that has it serves.
Importing this module loads one that tools/openblas.py has put into the environment, if it comes
before the import of mlx.core.

OpenBLAS is held to one family of its kernels, Haswell on x86-64 with AVX2 and FMA, ARMV8 on arm64:
all CPUs of a kind then compute the same bits (docs/reproducibility.md). Your own value of
OPENBLAS_CORETYPE takes precedence.
"""

import ctypes
import os
import sys
from pathlib import Path

LIBRARY = Path(sys.prefix) / "lib" / "libopenblas-for-mlx.so"


def _load() -> ctypes.CDLL | None:
    """Load the library with its symbols for all to see; None if there is none to load."""
    try:
        if os.uname().machine == "aarch64":
            os.environ.setdefault("OPENBLAS_CORETYPE", "ARMV8")
        elif {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text().split()):
            os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")
        return ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None


_openblas = _load()


def use_threads(threads: int) -> None:
    """Multiply matrices on the CPU with this many threads, where OpenBLAS does it.

    Prints a line if it should and does not, or if there are not so many cores.
    """
    cores = os.cpu_count() or 1
    if threads > cores:  # more only wait for each other
        print(
            f"note: train.threads is {threads}, more than the {cores} cores here; using {cores}",
            flush=True,
        )
    if _openblas:
        _openblas.scipy_openblas_set_num_threads(min(threads, cores))
    elif sys.platform == "linux":
        print(
            "note: without OpenBLAS, training on the CPU takes about 10 times longer and its last"
            " bits differ; `python -m tools.openblas` installs it",
            flush=True,
        )
