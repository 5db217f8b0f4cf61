"""Let OpenBLAS multiply matrices for MLX on Linux, instead of the reference BLAS of MLX's wheel.

`tools/openblas.py` makes the library, a step of `make`. `stages/__init__.py` explains why it can be
loaded after MLX was imported, but not after MLX multiplied its first matrices.
"""

import ctypes
import os
import sys
from pathlib import Path

from stages import MLX_CAME_FIRST

LIBRARY = Path(sys.prefix) / "lib" / "libopenblas-for-mlx.so"


def load_openblas(threads: int) -> str:
    """Load OpenBLAS with this many threads on the CPU, before the first matrix product.

    With one thread, OpenBLAS uses one family of kernels, so all CPUs of a kind give identical
    bits (docs/reproducibility.md). With more threads, it uses the fastest kernels of this CPU. The
    environment variable OPENBLAS_CORETYPE overrides both. Only the first call in a process counts.

    Returns what the last bits of a product depend on: OpenBLAS's version and kernels, or "" if
    another library multiplies. Prints a note if OpenBLAS cannot be used or has fewer cores.
    """
    if sys.platform != "linux":
        return ""  # macOS has a fast BLAS of its own
    cores = os.cpu_count() or 1
    if threads > cores:  # more threads would only wait for each other
        note(f"train.threads is {threads}, but this machine has {cores} cores; using {cores}")
    if threads == 1 and not os.environ.get("OPENBLAS_CORETYPE"):
        os.environ["OPENBLAS_CORETYPE"] = common_kernels()
    # By default OpenBLAS starts one thread per core, and they spin at first.
    os.environ["OPENBLAS_NUM_THREADS"] = str(min(threads, cores))
    try:
        library = ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        note(
            "without OpenBLAS, training on the CPU takes 10 to 50 times longer and its last bits"
            " differ; `python -m tools.openblas` installs it"
        )
        return ""
    if MLX_CAME_FIRST:
        note(
            "MLX was imported before this project, so it cannot use OpenBLAS and is 10 to 50 times"
            " slower; write `import stages` above the first import of mlx and restart"
        )
        return ""
    library.scipy_openblas_get_config.restype = ctypes.c_char_p
    config: bytes = library.scipy_openblas_get_config()
    return config.decode()


def common_kernels() -> str:
    """Return OpenBLAS's name for the kernels that all CPUs of this kind can run, "" for any."""
    if os.uname().machine == "aarch64":
        return "ARMV8"
    if {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split()):
        return "Haswell"
    return ""


def note(text: str) -> None:
    """Print a note about the machine."""
    print(f"note: {text}", flush=True)
