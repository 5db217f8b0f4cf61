"""Tell a difference from noise: mean and deviation over experiments that differ in the seed alone.

Usage: dvc exp show --csv --hide-workspace | python -m tools.seeds
"""

import csv
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

import yaml

from stages.shared.cli import run
from stages.shared.errors import UserError, escape

SEED = "train.seed"
REPORTED = "accuracy"
FIGURES = ("validation_accuracy", REPORTED)  # to choose by the first, to report the second


def summarize(rows: Iterable[dict[str, str]]) -> list[list[str]]:
    """Make a table, the header first, of what `dvc exp show --csv` gives.

    A line stands for the experiments that have the code and all params but the seed in common; it
    has those in which lines differ, the number of seeds, means and standard deviations.
    """
    sections = yaml.safe_load(Path("params.yaml").read_text())
    groups: dict[tuple[tuple[str, str], ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        if _number(row, REPORTED) is not None:  # else it is queued or has failed
            shared = [
                (key, value[:12] if key.startswith("stages/") else value)  # of a digest
                for key, value in row.items()
                if (key.partition(".")[0] in sections and key != SEED) or key.startswith("stages/")
            ]
            groups.setdefault(tuple(shared), {})[row.get(SEED, "")] = row
    if not groups:
        raise UserError("no experiments; pipe `dvc exp show --csv --hide-workspace` into this")
    keys = [dict(shared) for shared in groups]
    varying = [name for name in keys[0] if len({key.get(name) for key in keys}) > 1]
    table = [[*varying, "seeds", *FIGURES]]
    for key, seeds in zip(keys, groups.values(), strict=True):
        table.append([*(key.get(name, "") for name in varying), str(len(seeds))])
        for figure in FIGURES:
            found = [_number(row, figure) for row in seeds.values()]
            known = [number for number in found if number is not None]
            deviation = f" ± {stdev(known):.4f}" if len(known) > 1 else ""
            table[-1].append(f"{mean(known):.4f}{deviation}" if known else "")
    return table


def _number(row: dict[str, str], key: str) -> float | None:
    try:
        number = float(row[key])
    except (KeyError, TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def main() -> None:
    try:
        table = summarize(csv.DictReader(sys.stdin))
    except (csv.Error, UnicodeDecodeError):
        remedy = "pipe `dvc exp show --csv --hide-workspace` into this"
        raise UserError(f"standard input: is not a CSV table; {remedy}") from None
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(escape("  ".join(cells).rstrip()))


if __name__ == "__main__":
    run(main)
