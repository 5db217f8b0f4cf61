"""Compare runs. This command answers one of three questions:

How do two models differ? A and B are commits, branches, tags or names of experiments, by default
HEAD and the files in the workspace.

Is a setting better? --seeds groups all experiments by their parameters and code, and compares each
group with the baseline over pairs of runs with the same seed. The baseline is the setting of HEAD,
or the setting with the given values of parameters.

Did the last run give the committed results? --last-run answers this at the end of `make repro`.
"""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from stages.shared.cli import argument_parser, run
from stages.shared.errors import UserError, escape
from tools.experiments import (
    ACCURACY,
    SEED,
    VALIDATION_ACCURACY,
    Comparison,
    Setting,
    collect_runs,
    compare_settings,
    find_baseline,
    group,
    resolve_metric,
)
from tools.provenance import git
from tools.report import describe_models, describe_settings
from tools.revisions import (
    WORKSPACE,
    compare_models,
    describe_last_run,
    read_results,
)

DEFAULT_METRICS = (VALIDATION_ACCURACY, ACCURACY)


def setting_data(
    setting: Setting, comparison: Comparison | None, metrics: list[str]
) -> dict[str, Any]:
    """Return the facts about a setting, for scripts. The baseline has no comparison."""
    found: dict[str, Any] = {
        "params": setting.any_run.params,
        "inputs": setting.any_run.inputs,
        "seeds": list(setting.runs),
        "metrics": {metric: list(setting.values(metric).values()) for metric in metrics},
    }
    if comparison:
        found["verdict"], found["verdict_on"] = comparison.verdict, comparison.metric
        found["adjusted_p"] = comparison.adjusted_p
        found["seeds_needed"] = comparison.seeds_needed
        found["differences"] = {name: asdict(test) for name, test in comparison.tests.items()}
    return found


def finite(value: Any) -> Any:
    """Replace each number that JSON does not have, in nested lists and dicts, by None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any) -> str:
    """Return JSON text. A value of a type that JSON does not have becomes text."""
    return json.dumps(finite(value), indent=2, default=str)


def parse_values(assignments: Iterable[str]) -> dict[str, Any]:
    """Return the values of params from PARAM=VALUE. A value that is not JSON is text."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--seeds {assignment}: is not PARAM=VALUE; write train.momentum=0.9")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def compare_seeds(assignments: list[str], metrics: list[str], as_json: bool, markdown: bool) -> str:
    """Answer whether settings are better than the baseline."""
    values = parse_values(assignments)
    if git("rev-parse", "--is-shallow-repository").strip() == "true":
        problem = "this clone is shallow, and DVC loses queued experiments in it"
        print(f"note: {problem}; run `git fetch --unshallow`", file=sys.stderr)
    head, runs = collect_runs()
    if not runs:
        raise UserError("HEAD: no run has results; run `dvc repro` and commit, or `dvc exp run`")
    if all(run.seed is None for run in runs):
        raise UserError(f"params.yaml: has no {SEED}, which pairs the runs; add it")
    asked = [resolve_metric(name, runs) for name in metrics]
    shown = [name for name in DEFAULT_METRICS if any(name in run.metrics for run in runs)]
    shown = list(dict.fromkeys([*shown, *asked]))
    settings = group(runs, head)
    baseline = find_baseline(settings, values)
    others = [setting for setting in settings if setting is not baseline]
    comparisons = compare_settings(others, baseline, shown)
    if as_json:
        found = [setting_data(each.setting, each, shown) for each in comparisons]
        return to_json({"baseline": setting_data(baseline, None, shown), "settings": found})
    return describe_settings(baseline, comparisons, shown, markdown)


def main(
    a: str | None,
    b: str | None,
    last_run: bool,
    seeds: list[str] | None,
    metric: list[str],
    json: bool,
    md: bool,
) -> None:
    if a and (last_run or seeds is not None):
        raise UserError(f"{a}: --last-run and --seeds take no revision; leave it out")
    if metric and seeds is None:
        raise UserError(f"--metric {metric[0]}: is only for --seeds; add --seeds")
    if last_run:
        text = describe_last_run()
    elif seeds is not None:
        text = compare_seeds(seeds, metric, json, md)
    else:
        found = compare_models(read_results(a or "HEAD"), read_results(b or WORKSPACE))
        text = to_json(asdict(found)) if json else describe_models(found, md)
    print("\n".join(map(escape, text.split("\n"))))


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("a", metavar="A", nargs="?")
    parser.add_argument("b", metavar="B", nargs="?")
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--seeds", nargs="*", metavar="PARAM=VALUE", help="compare settings")
    question.add_argument("--last-run", action="store_true", help="compare with the committed run")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, for scripts")
    form.add_argument("--md", action="store_true", help="print Markdown, for reports")
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="with --seeds: add a metric"
    )
    run(main, parser)
