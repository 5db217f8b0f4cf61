"""Time the whole of `dvc repro`, and how time and memory of each stage grow with the data.

Usage: python -m bench.pipeline [ROUNDS]. The MNIST files must be in .downloads/.
"""

import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.common import row
from stages.preprocess import RAW, decode_idx
from tests.conftest import ROOT, STAGES, Project, clone, commit

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 5
TIMES = (1, 10, 50)  # the examples of MNIST
# A process begins with the peak memory of the one that starts it, so this one has to be small.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def whole(project: Project) -> None:
    """Print the median seconds of `dvc repro` in four situations."""
    project.set(learning_rate=0.1)
    commit(project, "Start")
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        shutil.rmtree(project.root / ".dvc/cache", ignore_errors=True)
        for path in (project.root / "data").glob("*.*z"):
            path.unlink()
        shutil.rmtree(project.root / RAW, ignore_errors=True)
        for situation, rate in (
            ("cold, without the download", 0.1),
            ("`learning_rate` changed", 0.2),
            ("changed back", 0.1),
            ("nothing changed", 0.1),
        ):
            project.set(learning_rate=rate)
            took = seconds(lambda: project.run("dvc", "repro"))
            found.setdefault(situation, []).append(took)
    row(list(found))
    row(["---"] * len(found))
    row([f"{statistics.median(values):.2f}" for values in found.values()])


def grow(root: Path, times: int) -> None:
    """Write raw files that repeat the examples of MNIST's."""
    (root / RAW).mkdir(parents=True)
    for path in (ROOT / RAW).iterdir():
        if path.suffix == ".json":
            shutil.copy(path, root / RAW)
            continue
        array = decode_idx(path.read_bytes())
        shape = (times * len(array), *array.shape[1:])
        with (root / RAW / path.name).open("wb") as file:
            file.write(b"\0\0\x08" + struct.pack(f">B{len(shape)}I", len(shape), *shape))
            for _ in range(times):
                file.write(array.tobytes())


def growth(root: Path) -> None:
    """Print seconds and peak memory of each stage but the first for more and more examples."""
    stages = list(STAGES)[1:]
    row(["examples", *stages])
    row(["---"] * len(STAGES))
    for times in TIMES:
        project = clone(root / str(times), PYTHONPATH=str(ROOT))
        project.set(num_epochs=1)
        grow(project.root, times)
        pixels = sum(path.stat().st_size for path in (project.root / RAW).iterdir())
        cells = []
        for stage in stages:
            started = time.perf_counter()
            peak = project.run("python", "-c", PEAK, "python", "-m", f"stages.{stage}")
            took = time.perf_counter() - started
            cells.append(f"{took:.1f} s, {int(peak) * 1024 / 1e6:,.0f} MB")
        row([f"{times * 70_000:,} ({pixels / 1e6:,.0f} MB)", *cells])
        shutil.rmtree(project.root)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = clone(Path(folder) / "whole")
        shutil.copytree(ROOT / ".downloads", project.root / ".downloads")
        print("\nSeconds of `dvc repro`:\n")
        whole(project)
        print("\nSeconds and peak memory of each stage, one epoch of training:\n")
        growth(Path(folder))


if __name__ == "__main__":
    main()
