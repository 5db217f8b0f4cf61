"""Group DVC's experiments by their settings, and compare the groups over seeds.

Two runs with the same seed have the same first weights and the same order of examples. So their
difference varies much less than between two runs with different seeds ("common random numbers").
"""

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from shlex import quote
from typing import Any

from stages.shared.errors import UserError
from stages.shared.inputs import flatten
from stages.shared.params import read_sections
from tools.provenance import git
from tools.revisions import TEST_SPLIT
from tools.significance import FEWEST_PAIRS, LEVEL, PairedTest, holm, paired_test, pairs_needed

SEED = "train.seed"
ACCURACY = "metrics/accuracy.json:accuracy"
VALIDATION_ACCURACY = "metrics/training.json:validation_accuracy"
VALIDATION_SPLIT = "data/validation.npz"
TOO_FEW, NOT_SHOWN = "too few seeds", "no difference shown"
OTHER_EXAMPLES = "measured on other examples"
MOST_SEEDS = 100  # more are not suggested
UNFINISHED = ("queued", "running", "failed")
SHOW_ATTEMPTS = 20


@dataclass(frozen=True)
class Run:
    """The results of a commit or of an experiment."""

    revision: str
    seed: Any
    params: dict[str, Any]  # by full name, without the seed
    digests: dict[str, str]  # of all files that the stages read or write, by path
    inputs: dict[str, str]  # digests of the code and data that no stage makes
    metrics: dict[str, float]  # by FILE:NAME


@dataclass(frozen=True)
class Setting:
    """All runs that have everything but the seed in common."""

    runs: dict[Any, Run]  # by seed
    is_head: bool  # whether it has the params, the code and the data of HEAD

    @cached_property
    def any_run(self) -> Run:
        """Return one run, to read values that all of them have in common."""
        return next(iter(self.runs.values()))

    def values(self, metric: str) -> dict[Any, float]:
        """Return the metric by seed. Runs without this metric are left out."""
        return {
            seed: run.metrics[metric] for seed, run in self.runs.items() if metric in run.metrics
        }


@dataclass
class Comparison:
    """The differences between a setting and the baseline, over pairs of runs with the same seed."""

    setting: Setting
    metric: str | None  # decides; None if the two were measured on different examples
    tests: dict[str, PairedTest]  # by metric
    adjusted_p: float = math.nan  # of the deciding metric, corrected for all comparisons
    family: int = 1  # the number of these comparisons

    @property
    def test(self) -> PairedTest | None:
        """The test of the deciding metric, if there are pairs."""
        return self.tests.get(self.metric or "")

    @property
    def pairs(self) -> int:
        """The number of seeds that both settings have."""
        return self.test.pairs if self.test else 0

    @property
    def verdict(self) -> str:
        """Whether the setting is better than the baseline, in words."""
        if self.metric is None:
            return OTHER_EXAMPLES
        if not self.test or self.pairs < FEWEST_PAIRS:
            return TOO_FEW
        if self.adjusted_p >= LEVEL:
            return NOT_SHOWN
        return "better" if self.test.mean > 0 else "worse"

    @property
    def seeds_needed(self) -> float:
        """The number of seeds that would show the difference seen so far; 0 if nothing is open."""
        if self.verdict not in (TOO_FEW, NOT_SHOWN):
            return 0
        if not self.test or self.pairs < 2:
            return FEWEST_PAIRS
        needed = pairs_needed(self.test.mean, self.test.deviation, self.family)
        return max(self.pairs + 1, needed)

    def missing_seeds(self, setting: Setting, baseline: Setting) -> list[Any]:
        """Return the seeds that `setting`, one of the two, needs to reach `seeds_needed` pairs."""
        either = [*self.setting.runs, *baseline.runs]
        both = [seed for seed in self.setting.runs if seed in baseline.runs]
        unused = (seed for seed in count() if seed not in either)
        wanted = dict.fromkeys([*both, *either, *islice(unused, MOST_SEEDS)])
        return [seed for seed in islice(wanted, int(self.seeds_needed)) if seed not in setting.runs]


def collect_runs() -> tuple[Run | None, list[Run]]:
    """Return the run of HEAD, if it has results, and all runs, including experiments.

    Experiments count, whatever commit they started from.
    """
    head = git("rev-parse", "--verify", "HEAD").strip()
    table = show_experiments({head, *commits_with_experiments()})
    note_unfinished(table)
    runs = list(finished_runs(table))
    return next((run for run in runs if run.revision == head), None), runs


def commits_with_experiments() -> set[str]:
    """Return the commits that have experiments.

    DVC stores an experiment under the Git reference refs/exps/AA/BBBB.../NAME. It started at the
    commit AABBBB....
    """
    references = git("for-each-ref", "--format=%(refname)", "refs/exps").splitlines()
    parts = [reference.split("/") for reference in references]
    return {part[2] + part[3] for part in parts if len(part) == 5 and len(part[2]) == 2}


def show_experiments(commits: Iterable[str]) -> list[dict[str, Any]]:
    """Return the table of `dvc exp show --json` for these commits.

    DVC fails if a running experiment creates or deletes its temporary folder meanwhile. Then this
    tries again.
    """
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json"]
    for commit in sorted(commits):
        command += ["--rev", commit]
    for _ in range(SHOW_ATTEMPTS):
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode == 0:
            table: list[dict[str, Any]] = json.loads(done.stdout)
            return table
        if ".dvc/tmp/exps" not in done.stderr:
            problem = " ".join(done.stderr.split()).removeprefix("ERROR: ")
            raise UserError(f"dvc exp show: {problem:.300}; fix that and rerun")
        time.sleep(1)
    remedy = "rerun when `dvc queue status` lists no running experiment"
    raise UserError(f"dvc exp show: failed while experiments start or end; {remedy}")


def experiments_of(table: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the state and the row of each experiment. Without an executor it is a success."""
    for commit in table:
        for experiment in commit["experiments"] or []:
            executor = experiment["executor"]
            yield executor["state"] if executor else "success", experiment["revs"][0]


def note_unfinished(table: list[dict[str, Any]]) -> None:
    """Print a note about experiments that are queued or running, or that failed.

    DVC lists a running experiment a second time, as queued.
    """
    states = {state: set[str]() for state in UNFINISHED}
    for state, row in experiments_of(table):
        if state in states:
            states[state].add(row["name"])
    states["queued"] -= states["running"]
    counts = [f"{len(names)} {state}" for state, names in states.items() if names]
    if counts:
        remedy = "`dvc queue status` lists them, `dvc queue logs NAME` shows why one failed"
        print(f"note: without experiments that are {', '.join(counts)}; {remedy}", file=sys.stderr)


def finished_runs(table: list[dict[str, Any]]) -> Iterator[Run]:
    """Yield the commits and the experiments with results of a table of `dvc exp show --json`.

    A queued or running experiment is left out: its metrics in the table belong to the commit where
    it started.
    """
    rows = [commit for commit in table if commit["rev"] != "workspace"]
    rows += [row for state, row in experiments_of(table) if state == "success"]
    for row in rows:
        if row["error"] is None and row["data"]:
            run = read_run(row["data"])
            if ACCURACY in run.metrics:
                yield run


def read_run(data: dict[str, Any]) -> Run:
    """Read the data of a row of `dvc exp show --json`."""
    params = {
        name.removeprefix("params.yaml:"): comparable(value)
        for name, value in named_values(data["params"])
    }
    outs = {path: out["hash"] for path, out in data["outs"].items()}
    deps = {path: dep["hash"] for path, dep in data["deps"].items()}
    return Run(
        revision=data["rev"],
        seed=params.pop(SEED, None),
        params=params,
        digests=deps | outs,
        inputs={path: md5 for path, md5 in deps.items() if path not in outs},
        metrics={
            name: value
            for name, value in named_values(data["metrics"])
            if isinstance(value, int | float) and math.isfinite(value)
        },
    )


def comparable(value: Any) -> Any:
    """Return a whole number as int: `-S train.momentum=0.0` sets the same value as 0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def named_values(files: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield FILE:NAME and the value of each param or metric, such as params.yaml:train.seed."""
    for file, content in files.items():
        for name, value in flatten(content.get("data")).items():
            yield f"{file}:{name}", value


def group(runs: Iterable[Run], head: Run | None) -> list[Setting]:
    """Group runs by params, code and data, sorted by the values of the params."""
    groups: dict[str, dict[Any, Run]] = {}
    for run in sorted(runs, key=lambda run: sort_key(run.seed)):
        groups.setdefault(setting_key(run), {}).setdefault(run.seed, run)
    head_key = setting_key(head) if head else None
    settings = [Setting(runs, key == head_key) for key, runs in groups.items()]
    names = varying_params(settings)
    return sorted(
        settings, key=lambda setting: [sort_key(setting.any_run.params.get(name)) for name in names]
    )


def setting_key(run: Run) -> str:
    """Return text that is equal for two runs if they have everything but the seed in common."""
    return json.dumps([run.params, run.inputs], sort_keys=True, default=str)


def sort_key(value: Any) -> tuple[bool, float, str]:
    """Return a key that sorts the values of a param: numbers first, then all others as text."""
    if isinstance(value, int | float):
        return False, value, ""
    return True, 0, str(value)


def varying_params(settings: Iterable[Setting]) -> list[str]:
    """Return the names of the params that do not have the same value in all settings."""
    params = [setting.any_run.params for setting in settings]
    names = dict.fromkeys(name for values in params for name in values)
    return [name for name in names if len({str(values.get(name)) for values in params}) > 1]


def find_baseline(settings: list[Setting], values: Mapping[str, Any]) -> Setting:
    """Return the setting of HEAD, or the setting with these values of params.

    If several settings have these values, return the one that is like HEAD in all other params, the
    code and the data.
    """
    head = next((setting for setting in settings if setting.is_head), None)
    if not values:
        if head is None:
            remedy = "commit a run, or name the baseline as PARAM=VALUE"
            raise UserError(f"HEAD: has no results in metrics/; {remedy}")
        return head
    for name in values:
        if not any(name in setting.any_run.params for setting in settings):
            raise UserError(f"{name}: is not a parameter of these experiments; check the name")

    def matches(setting: Setting, wanted: Mapping[str, Any]) -> bool:
        return all(setting.any_run.params.get(name) == value for name, value in wanted.items())

    found = [setting for setting in settings if matches(setting, values)]
    if len(found) > 1 and head is not None:
        wanted = {**head.any_run.params, **values}
        same_inputs = [s for s in found if s.any_run.inputs == head.any_run.inputs]
        found = [setting for setting in same_inputs if matches(setting, wanted)] or found
    if len(found) != 1:
        named = " ".join(f"{name}={value}" for name, value in values.items())
        remedy = f"give more of {', '.join(varying_params(settings))}" if found else "run one first"
        raise UserError(f"{named}: {len(found) or 'no'} settings have this; {remedy}")
    return found[0]


def resolve_metric(name: str, runs: Iterable[Run]) -> str:
    """Return FILE:NAME of a metric, which may be given as NAME if only one file has it."""
    known = {metric for run in runs for metric in run.metrics}
    found = sorted(metric for metric in known if name in (metric, metric.partition(":")[2]))
    if not found:
        names = ", ".join(sorted(metric.partition(":")[2] for metric in known))
        raise UserError(f"--metric {name}: no experiment has it; choose from {names:.300}")
    if len(found) > 1:
        raise UserError(f"--metric {name}: is ambiguous; choose from {', '.join(found)}")
    return found[0]


def deciding_metric(setting: Setting, baseline: Setting) -> str | None:
    """Return the metric to compare two settings by, or None if no split is the same.

    It is the validation accuracy if both have one on the same split, and else the test accuracy.
    """
    metrics = {VALIDATION_ACCURACY: VALIDATION_SPLIT, ACCURACY: TEST_SPLIT}
    for metric, split in metrics.items():
        digests = {runs.any_run.digests.get(split) for runs in (setting, baseline)}
        if len(digests) == 1 and setting.values(metric) and baseline.values(metric):
            return metric
    return None


def paired_tests(
    setting: Setting, baseline: Setting, metrics: Iterable[str]
) -> dict[str, PairedTest]:
    """Test the differences of each metric between runs with the same seed, if there are any."""
    tests = {}
    for metric in metrics:
        values, others = setting.values(metric), baseline.values(metric)
        differences = [value - others[seed] for seed, value in values.items() if seed in others]
        if differences:
            tests[metric] = paired_test(differences)
    return tests


def compare_settings(
    settings: Iterable[Setting], baseline: Setting, metrics: Iterable[str]
) -> list[Comparison]:
    """Compare each setting with the baseline.

    Several comparisons are corrected by Holm's method: if no setting differs from the baseline, the
    probability of any verdict "better" or "worse" is at most 5%.
    """
    comparisons = [
        Comparison(
            setting, deciding_metric(setting, baseline), paired_tests(setting, baseline, metrics)
        )
        for setting in settings
    ]
    tests = {
        place: comparison.test
        for place, comparison in enumerate(comparisons)
        if comparison.test and comparison.pairs >= FEWEST_PAIRS
    }
    adjusted = holm([test.p for test in tests.values()])
    for place, p in zip(tests, adjusted, strict=True):
        comparisons[place].adjusted_p = p
        comparisons[place].family = len(tests)
    return comparisons


def queue_command(setting: Setting, seeds: Iterable[Any], baseline: Setting) -> str:
    """Return the command that queues runs of a setting with these seeds.

    It sets the params that differ from the baseline or from the workspace, where it will run.
    """
    workspace = flatten(read_sections())
    options = [
        f"{name}={override(value)}"
        for name, value in setting.any_run.params.items()
        if baseline.any_run.params.get(name) != value or workspace.get(name) != value
    ]
    options.append(f"{SEED}={','.join(map(str, seeds))}")
    return " ".join(["dvc exp run --queue", *(f"-S {quote(option)}" for option in options)])


def override(value: Any) -> str:
    """Return the value of a param in the syntax of `dvc exp run -S`, which is Hydra's."""
    is_word = isinstance(value, str) and re.fullmatch(r"[a-z]+(-[a-z]+)*", value)
    return value if is_word and value not in ("true", "false", "null") else json.dumps(value)
