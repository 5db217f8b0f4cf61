"""Tell a difference from noise: mean and deviation over experiments that differ in the seed alone.

Usage: dvc exp show --csv --hide-workspace | python -m stages.seeds
"""

import csv
import sys
from collections.abc import Iterable
from statistics import mean, stdev

from stages.errors import UserError, run
from stages.params import SECTIONS

SEED = "train.seed"
FIGURES = ("validation_accuracy", "accuracy")  # to choose by the first, to report the second


def summarize(rows: Iterable[dict[str, str]]) -> list[list[str]]:
    """Make a table, the header first, of what `dvc exp show --csv` gives.

    A line stands for the experiments that have all params but the seed in common; it has the params
    in which lines differ, the number of seeds and the mean and standard deviation of each figure.
    """
    groups: dict[tuple[tuple[str, str], ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        if all(row.get(figure) for figure in FIGURES):  # neither queued nor failed
            params = [key for key in row if key.partition(".")[0] in SECTIONS and key != SEED]
            group = groups.setdefault(tuple((key, row[key]) for key in params), {})
            group[row[SEED]] = row
    if not groups:
        raise UserError("no experiments; pipe `dvc exp show --csv --hide-workspace` into this")
    values = [dict(params) for params in groups]
    varying = [key for key in values[0] if len({shared.get(key) for shared in values}) > 1]
    table = [[*varying, "seeds", *FIGURES]]
    for shared, seeds in zip(values, groups.values(), strict=True):
        table.append([*(shared.get(key, "") for key in varying), str(len(seeds))])
        for figure in FIGURES:
            found = [float(row[figure]) for row in seeds.values()]
            deviation = f" ± {stdev(found):.4f}" if len(found) > 1 else ""
            table[-1].append(f"{mean(found):.4f}{deviation}")
    return table


def main() -> None:
    table = summarize(csv.DictReader(sys.stdin))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    run(main)
