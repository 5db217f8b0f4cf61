"""Notice that other programs slow down training, because they use its cores."""

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple


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


def describe_contention(before: CoreUse, after: CoreUse, threads: int, cores: int) -> str | None:
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
        if after and (text := describe_contention(before, after, self.threads, len(self.cores))):
            print(f"note: {text}", flush=True)
            self.before = None
