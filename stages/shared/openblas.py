"""Put OpenBLAS under MLX on Linux, where MLX's own package brings a reference BLAS.

MLX calls `cblas_sgemm`, and the first library in the global symbol scope that has it serves. This
module imports MLX so that it looks for a symbol when it first calls it, and not before: until its
first product `load_openblas` can load the library that tools/openblas.py has put into the
environment. So it must come before any other import of mlx.
"""

import ctypes
import os
import sys
from pathlib import Path

LIBRARY = Path(sys.prefix) / "lib" / "libopenblas-for-mlx.so"


def load_openblas(threads: int) -> str:
    """Multiply matrices on the CPU with this many threads, where OpenBLAS does it.

    One thread is held to one family of its kernels, Haswell on x86-64 with AVX2 and FMA, ARMV8 on
    arm64: all CPUs of a kind then compute the same bits (docs/reproducibility.md). With more,
    OpenBLAS takes the fastest kernels of this CPU. Your own value of OPENBLAS_CORETYPE takes
    precedence; the first call in a process decides.

    Returns what decides the last bits of a product: the version and kernels of OpenBLAS, "" where
    another library multiplies. Prints a line if OpenBLAS is missing, or if there are not so many
    cores.
    """
    if sys.platform != "linux":
        return ""  # macOS has a fast BLAS of its own
    cores = os.cpu_count() or 1
    if threads > cores:  # more only wait for each other
        print(
            f"note: train.threads is {threads}, more than the {cores} cores here; using {cores}",
            flush=True,
        )
    if threads == 1 and not os.environ.get("OPENBLAS_CORETYPE"):
        if os.uname().machine == "aarch64":
            os.environ["OPENBLAS_CORETYPE"] = "ARMV8"
        elif {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text().split()):
            os.environ["OPENBLAS_CORETYPE"] = "Haswell"
    # By itself it starts one for each core, which at first wait by running, in the way of others.
    os.environ["OPENBLAS_NUM_THREADS"] = str(min(threads, cores))
    try:
        library = ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        print(
            "note: without OpenBLAS, training on the CPU takes 10 to 50 times longer and its last"
            " bits differ; `python -m tools.openblas` installs it",
            flush=True,
        )
        return ""
    library.scipy_openblas_get_config.restype = ctypes.c_char_p
    config: bytes = library.scipy_openblas_get_config()
    return config.decode()
