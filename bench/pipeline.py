"""Time `dvc repro`, and measure how time and memory of each stage grow with the data.

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

from bench.common import print_header, print_row
from stages.preprocess import RAW, decode_idx
from tests.conftest import ROOT, STAGES, Project, clone, commit

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 5
FACTORS = (1, 10, 50)  # times the examples of MNIST
SITUATIONS = {  # and train.learning_rate
    "cold, without the download": 0.1,
    "`learning_rate` changed": 0.2,
    "changed back": 0.1,
    "nothing changed": 0.1,
}
# Print the peak memory of a command in bytes. On Linux a child process starts with the peak of its
# parent, so a small process has to start the command.
PEAK_MEMORY = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
unit = 1 if sys.platform == "darwin" else 1024
print(unit * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def time_of(action: Callable[[], object]) -> float:
    """Call `action`. Return the seconds that it took."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def delete_outputs(project: Project) -> None:
    for folder in (".dvc/cache", RAW):
        shutil.rmtree(project.root / folder, ignore_errors=True)
    for path in (project.root / "data").glob("*.*z"):
        path.unlink()


def time_repro(project: Project) -> None:
    """Print the median seconds of `dvc repro` in each situation."""
    project.set(learning_rate=0.1)
    commit(project, "Start")
    seconds: dict[str, list[float]] = {situation: [] for situation in SITUATIONS}
    for _ in range(ROUNDS):
        delete_outputs(project)
        for situation, learning_rate in SITUATIONS.items():
            project.set(learning_rate=learning_rate)
            seconds[situation].append(time_of(lambda: project.run("dvc", "repro")))
    print_header(list(SITUATIONS))
    print_row([f"{statistics.median(values):.2f}" for values in seconds.values()])


def write_raw_files(root: Path, factor: int) -> None:
    """Write raw files that repeat the examples of MNIST."""
    (root / RAW).mkdir(parents=True)
    for path in (ROOT / RAW).iterdir():
        if path.suffix == ".json":
            shutil.copy(path, root / RAW)
            continue
        array = decode_idx(path.read_bytes())
        shape = (factor * len(array), *array.shape[1:])
        with (root / RAW / path.name).open("wb") as file:
            file.write(b"\0\0\x08" + struct.pack(f">B{len(shape)}I", len(shape), *shape))
            for _ in range(factor):
                file.write(array.tobytes())


def measure_growth(root: Path) -> None:
    """Print seconds and peak memory of all stages but fetch for growing data."""
    stages = list(STAGES)[1:]
    print_header(["examples", *stages])
    for factor in FACTORS:
        project = clone(root / str(factor), PYTHONPATH=str(ROOT))
        project.set(num_epochs=1)
        write_raw_files(project.root, factor)
        size = sum(path.stat().st_size for path in (project.root / RAW).iterdir())
        cells = [f"{factor * 70_000:,} ({size / 1e6:,.0f} MB)"]
        for stage in stages:
            started = time.perf_counter()
            peak = project.run("python", "-c", PEAK_MEMORY, "python", "-m", f"stages.{stage}")
            seconds = time.perf_counter() - started
            cells.append(f"{seconds:.1f} s, {int(peak) / 1e6:,.0f} MB")
        print_row(cells)
        shutil.rmtree(project.root)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = clone(Path(folder) / "project")
        shutil.copytree(ROOT / ".downloads", project.root / ".downloads")
        print("\nSeconds of `dvc repro`:\n")
        time_repro(project)
        print("\nSeconds and peak memory of each stage, one epoch of training:\n")
        measure_growth(Path(folder))


if __name__ == "__main__":
    main()
