"""Time our train loop against its peers: alternating processes, medians, ratios.

Usage: python -m bench.run PYTHON [ROUNDS], where PYTHON has the peers of requirements.txt.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from bench.common import CONFIGS, CORES, row

CONTENDERS = {
    "ours": (sys.executable, "this project's train loop"),
    "plain": (sys.executable, "MLX's documentation, MLX's own BLAS"),
    "torch_eager": (sys.argv[1], "PyTorch eager"),
    "jax_scan": (sys.argv[1], "JAX, lax.scan over the epoch"),
}
FIGURES = {
    "seconds": "seconds an epoch",
    "process": "seconds of the whole process",
    "accuracy": "test accuracy",
}
ROUNDS = int(sys.argv[2]) if len(sys.argv) > 2 else 5


def measure(contender: str, config: str) -> dict[str, float]:
    """The figures of one process, with the seconds of all of it."""
    python, _ = CONTENDERS[contender]
    started = time.perf_counter()
    printed = subprocess.check_output([python, "-m", f"bench.{contender}", config], text=True)
    figures: dict[str, float] = json.loads(printed.splitlines()[-1])
    if figures.pop("part") < 1:  # neither the process nor the accuracy is of whole epochs
        return {"seconds": figures["seconds"]}
    return {**figures, "process": time.perf_counter() - started}


def cell(rounds: list[dict[str, dict[str, float]]], contender: str, figure: str) -> str:
    """The median of a figure over the rounds and of its ratio to ours, in the same round."""
    if figure not in rounds[0][contender]:
        return ""
    values = [figures[contender][figure] for figures in rounds]
    ratios = [figures[contender][figure] / figures["ours"][figure] for figures in rounds]
    ratio = "" if figure == "accuracy" else f" ({statistics.median(ratios):.2f})"
    return f"{statistics.median(values):.3g}{ratio}"


def cpu() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    peers = "import jax, torch; print('PyTorch', torch.__version__ + ', JAX', jax.__version__)"
    versions = subprocess.check_output([sys.argv[1], "-c", peers], text=True).strip()
    print(f"{cpu()}, {CORES} cores, {platform.system()}; Python {platform.python_version()},")
    print(f"MLX {version('mlx')}, {versions}; medians of {ROUNDS} alternating processes")
    print("each, in brackets their ratio to this project's loop\n")
    row(["", *FIGURES.values()])
    row(["---"] * 4)
    for name, config in CONFIGS.items():
        rounds = [{key: measure(key, name) for key in CONTENDERS} for _ in range(ROUNDS)]
        row([f"**{name}**: {config}", "", "", ""])
        for key, (_, title) in CONTENDERS.items():
            row([title, *(cell(rounds, key, figure) for figure in FIGURES)])


if __name__ == "__main__":
    main()
