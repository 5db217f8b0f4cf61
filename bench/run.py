"""Time our training loop against other frameworks: alternating processes, medians and ratios.

Usage: python -m bench.run PYTHON [ROUNDS]. PYTHON has the packages of bench/requirements.txt.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from bench.common import CONFIGS, CORES, print_header, print_row

OTHER_PYTHON = sys.argv[1]
ROUNDS = int(sys.argv[2]) if len(sys.argv) > 2 else 5
CONTENDERS = {
    "ours": (sys.executable, "this project's train loop"),
    "plain": (sys.executable, "MLX's documentation, MLX's own BLAS"),
    "torch_eager": (OTHER_PYTHON, "PyTorch eager"),
    "jax_scan": (OTHER_PYTHON, "JAX, lax.scan over the epoch"),
}
METRICS = {
    "seconds": "seconds per epoch",
    "process_seconds": "seconds of the whole process",
    "accuracy": "test accuracy",
}


def measure(contender: str, config: str) -> dict[str, float]:
    """Run a contender in its own process. Return its metrics."""
    python, _ = CONTENDERS[contender]
    started = time.perf_counter()
    printed = subprocess.check_output([python, "-m", f"bench.{contender}", config], text=True)
    process_seconds = time.perf_counter() - started
    metrics: dict[str, float] = json.loads(printed.splitlines()[-1])
    if metrics["fraction"] < 1:
        return {"seconds": metrics["seconds"]}
    return {**metrics, "process_seconds": process_seconds}


def cell(rounds: list[dict[str, dict[str, float]]], contender: str, metric: str) -> str:
    """Return the median of a metric, and of its ratio to our loop's in the same round."""
    if metric not in rounds[0][contender]:
        return ""
    values = [metrics[contender][metric] for metrics in rounds]
    ratios = [metrics[contender][metric] / metrics["ours"][metric] for metrics in rounds]
    ratio = "" if metric == "accuracy" else f" ({statistics.median(ratios):.2f})"
    return f"{statistics.median(values):.3g}{ratio}"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    code = "import jax, torch; print('PyTorch', torch.__version__ + ', JAX', jax.__version__)"
    versions = subprocess.check_output([OTHER_PYTHON, "-c", code], text=True).strip()
    print(f"{cpu_name()}, {CORES} cores, {platform.system()}; Python {platform.python_version()},")
    print(f"MLX {version('mlx')}, {versions}; medians of {ROUNDS} alternating processes")
    print("each, in brackets their ratio to this project's loop\n")
    print_header(["", *METRICS.values()])
    for name, config in CONFIGS.items():
        rounds = [{key: measure(key, name) for key in CONTENDERS} for _ in range(ROUNDS)]
        print_row([f"**{name}**: {config}", "", "", ""])
        for key, (_, title) in CONTENDERS.items():
            print_row([title, *(cell(rounds, key, metric) for metric in METRICS)])


if __name__ == "__main__":
    main()
