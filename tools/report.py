"""Format comparisons of models and of settings as text or Markdown."""

from collections.abc import Iterable, Iterator
from statistics import mean, stdev

from tools.experiments import (
    MOST_SEEDS,
    NOT_SHOWN,
    Comparison,
    Setting,
    queue_command,
    varying_params,
)
from tools.revisions import ModelComparison
from tools.significance import LEVEL, PairedTest

MOST_SUGGESTIONS = 3  # the most promising settings; a search can leave dozens with one seed

Table = list[list[str]]


def format_table(table: Table, markdown: bool) -> str:
    """Align the columns of a table, whose first row is the header."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in table] if markdown else table
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if markdown:
        cells.insert(1, ["-" * width for width in widths])
    edge, separator = ("| ", " | ") if markdown else ("", "  ")
    rows = [
        separator.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]
    return "\n".join((edge + row + edge[::-1]).rstrip() for row in rows)


def describe_models(found: ModelComparison, markdown: bool) -> str:
    """Describe how two models differ, and whether that is significant."""
    if found.is_same:
        first, second = found.names
        return (
            f"{first} and {second} have the same params and predictions. To compare with the commit"
            f" before, run\n`python -m tools.compare {first}~1`."
        )
    table = [["", *found.names]]
    table += [[name, *map(str, values)] for name, values in found.params.items()]
    table.append(["accuracy", *(f"{accuracy:.4f}" for accuracy in found.accuracies)])
    examples = f"{found.examples:,} test examples" if found.examples else "the test examples"
    counts = f"{found.became_right:,} became right and {found.became_wrong:,} became wrong"
    lines = [
        f"From {found.names[0]} to {found.names[1]}, of {examples}, {counts}.",
        f"McNemar's exact test gives p = {found.p:.2g}.",
    ]
    if found.p < LEVEL:
        lines += [
            "The difference between these two models is larger than the sampling error of the test"
            " split.",
            "This does not show that the setting is better: two runs with different seeds can"
            " differ as much.",
        ]
    else:
        lines += [
            "The difference between these two models is within the sampling error of the test"
            " split.",
            "This does not show that the settings are equally good.",
        ]
    lines += [
        "`python -m tools.compare --seeds` compares settings over several seeds.",
        *found.notes,
    ]
    return f"{format_table(table, markdown)}\n\n" + "\n".join(lines)


def short_names(metrics: Iterable[str]) -> dict[str, str]:
    """Return the names of metrics, without the file for each whose name is unique."""
    names = {metric: metric.partition(":")[2] for metric in metrics}
    unique = [name for name in names.values() if list(names.values()).count(name) == 1]
    return {metric: name if name in unique else metric for metric, name in names.items()}


def format_values(values: Iterable[float]) -> str:
    """Format the mean and, of at least two values, the standard deviation."""
    values = list(values)
    deviation = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{deviation}" if values else ""


def format_test(test: PairedTest | None) -> str:
    """Format the mean difference and its 95% interval."""
    if test is None:
        return ""
    interval = f" ({test.low:+.4f} to {test.high:+.4f})" if test.pairs > 1 else ""
    return f"{test.mean:+.4f}{interval}"


def describe_settings(
    baseline: Setting, comparisons: list[Comparison], metrics: list[str], markdown: bool
) -> str:
    """Describe the settings, their differences from the baseline, and the missing runs."""
    labelled = {f"#{place}": found for place, found in enumerate(comparisons, start=1)}
    names = short_names(metrics)
    parts = [format_table(values_table(baseline, labelled, names), markdown)]
    if not comparisons:
        parts.append("There is one setting, so there is nothing to compare.")
        return "\n\n".join(parts)
    parts.append(format_table(differences_table(labelled, names), markdown))
    parts.append(caption(comparisons, names))
    for label, found in labelled.items():
        if files := differing_files(baseline, found.setting):
            parts.append(f"{label} was made with other versions of {', '.join(files)}.")
    parts += suggestions(baseline, labelled)
    return "\n\n".join(parts)


def values_table(
    baseline: Setting, labelled: dict[str, Comparison], names: dict[str, str]
) -> Table:
    """Return the mean of each metric per setting, and the params that differ from the baseline."""
    settings = {label: found.setting for label, found in labelled.items()}
    common = baseline.any_run.params
    varying = varying_params([baseline, *settings.values()])
    shown = {"baseline": varying}  # the params to show
    for label, setting in settings.items():
        params = setting.any_run.params
        shown[label] = [name for name in varying if params.get(name) != common.get(name)]
    table = [["setting", "seeds", *names.values(), "params"]]
    for label, setting in {"baseline": baseline, **settings}.items():
        means = [format_values(setting.values(metric).values()) for metric in names]
        params = setting.any_run.params
        values = [f"{name}={params.get(name)}" for name in shown[label]]
        table.append([label, str(len(setting.runs)), *means, " ".join(values)])
    return table


def differences_table(labelled: dict[str, Comparison], names: dict[str, str]) -> Table:
    """Return the mean difference of each metric from the baseline, and the verdict."""
    table = [["setting", "pairs", *names.values(), "verdict"]]
    for label, found in labelled.items():
        differences = [format_test(found.tests.get(metric)) for metric in names]
        table.append([label, str(found.pairs), *differences, found.verdict])
    return table


def differing_files(baseline: Setting, setting: Setting) -> list[str]:
    """Return the paths of the code and the data that differ from the baseline."""
    inputs = baseline.any_run.inputs
    others = setting.any_run.inputs
    return [path for path in inputs | others if inputs.get(path) != others.get(path)]


def caption(comparisons: list[Comparison], names: dict[str, str]) -> str:
    """Explain the differences and the verdicts."""
    deciding = dict.fromkeys(names[found.metric] for found in comparisons if found.metric)
    return (
        "Differences from the baseline are means over pairs of runs with the same seed, each with"
        " its own\n95% interval (Student's t). The verdict is on"
        f" {' or '.join(deciding)}, at a level of 5% for all\ncomparisons together (Holm)."
    )


def suggestions(baseline: Setting, labelled: dict[str, Comparison]) -> Iterator[str]:
    """Yield how many seeds would settle the most promising open comparisons, and the commands."""
    unsettled = {
        label: found for label, found in labelled.items() if found.metric and found.seeds_needed
    }

    def promise(label: str) -> float:
        found = unsettled[label]
        return mean(found.setting.values(found.metric or "").values())

    shown: list[str] = []
    for label in sorted(unsettled, key=promise, reverse=True)[:MOST_SUGGESTIONS]:
        commands = missing_runs(unsettled[label], baseline)
        new = [f"  {command}" for command in commands if command not in shown]
        yield "\n".join([f"{label}: {describe_need(unsettled[label])}", *new])
        shown += commands
    if len(unsettled) > MOST_SUGGESTIONS:
        yield f"{len(unsettled) - MOST_SUGGESTIONS} more settings need more seeds."


def describe_need(found: Comparison) -> str:
    """Describe how many seeds would settle a comparison."""
    if found.seeds_needed > MOST_SEEDS:
        return f"a difference as small as this needs more than {MOST_SEEDS} seeds."
    purpose = "are needed"
    if found.verdict == NOT_SHOWN:
        purpose = "would show the difference seen so far in 80% of cases"
    return f"{int(found.seeds_needed)} seeds {purpose}. Queue the missing ones with"


def missing_runs(found: Comparison, baseline: Setting) -> list[str]:
    """Return the commands that queue the runs that a comparison lacks."""
    if found.seeds_needed > MOST_SEEDS:
        return []
    return [
        queue_command(setting, seeds, baseline)
        for setting in (found.setting, baseline)
        if (seeds := found.missing_seeds(setting, baseline))
    ]
