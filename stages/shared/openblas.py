"""Let OpenBLAS multiply matrices for MLX on Linux, instead of the reference BLAS of MLX's wheel.

`tools/openblas.py` makes the library, a step of `make`. `stages/__init__.py` explains why it can be
loaded after MLX was imported, but not after MLX multiplied its first matrices.
"""

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

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


class CoreUse(NamedTuple):
    """Times in seconds up to now."""

    wall: float
    own: float  # processor time of this process
    total: float  # processor time of all processes on these cores


def usable_cores() -> set[str]:
    """Return the names in /proc/stat of the cores that this process may use; none on macOS."""
    if sys.platform == "linux":
        return {f"cpu{core}" for core in os.sched_getaffinity(0)}
    return set()


def read_core_use(cores: set[str], stat: Path = Path("/proc/stat")) -> CoreUse | None:
    """Read the times of this moment; None where the system does not show them.

    Processes that give way ("nice") do not count.
    """
    try:
        lines = stat.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    ticks = 0
    for line in lines:
        name, *fields = line.split()
        if name in cores:
            user, _, system, _, _, irq, softirq, steal, *_ = map(int, fields)
            ticks += user + system + irq + softirq + steal
    return CoreUse(time.perf_counter(), time.process_time(), ticks / os.sysconf("SC_CLK_TCK"))


def contention(before: CoreUse, after: CoreUse, threads: int, cores: int) -> str | None:
    """Describe how other programs take cores from `threads`; None if they leave enough."""
    wall = after.wall - before.wall
    others = (after.total - before.total - (after.own - before.own)) / wall
    if others <= cores - threads + 0.5:
        return None
    return (
        f"other programs use {others:.1f} of {cores} cores, so the {threads} threads of this run"
        " wait for each other and can be 10 times slower; end those programs, or set train.threads"
        " to 1 and start again, which gives other last bits"
    )


class ContentionMonitor:
    """Prints a note if other programs take the cores that several threads need, on Linux.

    The threads of OpenBLAS spin while they wait for each other. One thread only gets slower as its
    share of a core shrinks. The load average is not used, because it lags by a minute.
    """

    SECONDS = 3.0  # at least, between two measurements

    def __init__(self, threads: int) -> None:
        self.cores = usable_cores()
        self.threads = min(threads, len(self.cores))
        self.before = read_core_use(self.cores) if self.threads > 1 else None

    def check(self) -> None:
        """Print the note if it holds since the last measurement, once per run."""
        if self.before is None or time.perf_counter() - self.before.wall < self.SECONDS:
            return
        before, after = self.before, read_core_use(self.cores)
        self.before = after
        if after and (text := contention(before, after, self.threads, len(self.cores))):
            note(text)
            self.before = None


def note(text: str) -> None:
    """Print a note about the machine."""
    print(f"note: {text}", flush=True)
