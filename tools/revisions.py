"""Read the results of a revision from Git, and compare two of them. This needs no data."""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from stages.shared.dvc_lock import Stage, stages_of
from stages.shared.errors import UserError
from stages.shared.inputs import flatten
from stages.shared.params import read_sections
from tools.provenance import git
from tools.significance import mcnemar_p

LOCK = "dvc.lock"
ACCURACY = "metrics/accuracy.json"
MISTAKES = "metrics/mistakes.csv"  # the wrong predictions: any other prediction is the label
TEST_SPLIT = "data/test.npz"
WORKSPACE = "workspace"

Key = TypeVar("Key")


class AccuracyMetrics(msgspec.Struct, frozen=True):
    """What this module needs of metrics/accuracy.json. An older file has no number of examples."""

    accuracy: float | None = None
    examples: int | None = None
    accuracy_of: dict[str, float] = {}  # by class


@dataclass(frozen=True)
class Results:
    """The results of a run, as read from the files in Git."""

    name: str  # a commit, a branch, a tag, an experiment or "workspace"
    stages: dict[str, Stage]  # by name; empty if there is no dvc.lock
    metrics: AccuracyMetrics  # without values if there is no metrics/accuracy.json
    mistakes: dict[int, str] | None  # the predicted class by example; None if not recorded

    def params(self, stages: Iterable[str]) -> dict[str, Any]:
        """Return the params of these stages by their full names."""
        named = [self.stages[stage].named_params() for stage in stages]
        return {name: value for params in named for name, value in params.items()}

    def outs(self, stages: Iterable[str]) -> dict[str, str]:
        """Return the digests of what these stages write, by path."""
        return {out.path: out.md5 for stage in stages for out in self.stages[stage].outs}

    def inputs(self, stages: Iterable[str]) -> dict[str, str]:
        """Return the digests of the code and data that these stages read and no stage makes."""
        made = self.outs(self.stages)
        deps = [dep for stage in stages for dep in self.stages[stage].deps]
        return {dep.path: dep.md5 for dep in deps if dep.path not in made}

    @property
    def test_split(self) -> str | None:
        """The digest of the test split, if it is recorded."""
        digests = self.inputs(self.stages) | self.outs(self.stages)
        return digests.get(TEST_SPLIT)


def check_params_are_recorded(results: Results) -> None:
    """Raise `UserError` if params.yaml was edited after the last run in the workspace."""
    current = flatten(read_sections())
    recorded = results.params(results.stages)
    for name, (old, new) in changes(recorded, current).items():
        if name in recorded and name in current:
            problem = f"{name} is {new}, but the results in the workspace are of {old}"
            raise UserError(f"params.yaml: {problem}; run `dvc repro`")


def read_results(name: str) -> Results:
    """Read the results of a revision, or of the workspace. Files that do not exist are empty."""
    revision = None if name == WORKSPACE else find_revision(name)
    try:
        metrics = msgspec.json.decode(read_file(revision, ACCURACY) or "{}", type=AccuracyMetrics)
        text = read_file(revision, MISTAKES)
        rows = csv.DictReader(text.splitlines())
        mistakes = {int(row["example"]): row["predicted"] for row in rows} if text else None
    except (csv.Error, KeyError, TypeError, ValueError):
        problem = f"{ACCURACY} or {MISTAKES} is malformed"
        raise UserError(f"{name}: {problem}; name another revision, or run `dvc repro`") from None
    return Results(name, stages_of(read_file(revision, LOCK)), metrics, mistakes)


def find_revision(name: str) -> str:
    """Return the commit of a branch, a tag, an experiment or another name of a commit."""
    # This also raises what is wrong with the repository, so the next error means the name.
    experiments = git("for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}").split()
    try:
        return git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").strip()
    except UserError:
        if len(experiments) == 1:
            return experiments[0]
        problem = "several experiments have this name" if experiments else "unknown revision"
    remedy = "name a commit, a branch, a tag or an experiment (`git log`, `dvc exp list -A`)"
    raise UserError(f"{name}: {problem}; {remedy}")


def read_file(revision: str | None, path: str) -> str:
    """Return the text of a file at a revision, or in the workspace. A missing file has no text."""
    if revision is None:
        if not Path(path).exists():
            return ""
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape")  # as `git` does
    exists = git("ls-tree", revision, "--", path)
    return git("show", f"{revision}:./{path}") if exists else ""


def changes(before: Mapping[Key, Any], after: Mapping[Key, Any]) -> dict[Key, tuple[Any, Any]]:
    """Return the old and the new value for each key with a changed value. A missing one is None."""
    return {
        key: (before.get(key), after.get(key))
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    }


def describe_last_run() -> str:
    """Describe in one line how the results of the workspace differ from the committed results.

    Only stages that both have are compared. A stage that is new in the workspace is named.
    """
    has_commit = git("rev-list", "--max-count=1", "--all")
    before = read_results("HEAD") if has_commit else None
    after = read_results(WORKSPACE)
    if not before or not before.stages:
        return "no committed run to compare with"
    stages = [name for name in before.stages if name in after.stages]
    line = describe_difference(before, after, stages)
    if new := [name for name in after.stages if name not in before.stages]:
        line += f"; not compared: new stages {', '.join(new)}"
    return line


def describe_difference(before: Results, after: Results, stages: list[str]) -> str:
    """Describe in one line how two results of these stages differ."""
    if changed := changes(before.params(stages), after.params(stages)):
        values = [f"{name} {old} -> {new}" for name, (old, new) in changed.items()]
        return f"changed params: {', '.join(values)}{accuracy_change(before, after)}"
    if before.outs(stages) == after.outs(stages):
        return "reproduced: bitwise identical to the committed run"
    if changed := changes(before.inputs(stages), after.inputs(stages)):
        return f"changed code or data: {', '.join(changed)}{accuracy_change(before, after)}"
    line = "not bitwise identical to the committed run"
    if before.mistakes is not None and after.mistakes is not None:
        count = len(changes(before.mistakes, after.mistakes))
        line += f"; {count:,} predictions on the test split differ"
    return f"{line}{accuracy_change(before, after)}"


def accuracy_change(before: Results, after: Results) -> str:
    """Describe both accuracies and their difference; no text if they cannot be compared."""
    if before.test_split != after.test_split:
        return ""
    old, new = before.metrics.accuracy, after.metrics.accuracy
    if old is None or new is None:
        return ""
    return f"; accuracy {old:.4f} -> {new:.4f} ({new - old:+.4f})"


@dataclass(frozen=True)
class ModelComparison:
    """How two models and their predictions on the test split differ."""

    names: tuple[str, str]
    params: dict[str, tuple[Any, Any]]  # both values of each param that differs
    accuracies: tuple[float, float]
    examples: int | None  # in the test split
    became_right: int  # examples that only the first model got wrong
    became_wrong: int  # examples that only the second model got wrong
    p: float  # of McNemar's exact test
    notes: list[str]

    @property
    def is_same(self) -> bool:
        """Whether there is nothing to compare."""
        return not (self.params or self.became_right or self.became_wrong or self.notes)


def require_accuracy(results: Results) -> float:
    """Return the accuracy. Raises `UserError` if it or the predictions are not recorded."""
    if results.metrics.accuracy is None or results.mistakes is None:
        problem = f"has no accuracy in {ACCURACY}, or no {MISTAKES}"
        raise UserError(f"{results.name}: {problem}; name a revision with results")
    return results.metrics.accuracy


def compare_models(a: Results, b: Results) -> ModelComparison:
    """Compare the models of two results. Raises `UserError` if their test splits differ in size."""
    accuracies = require_accuracy(a), require_accuracy(b)
    sizes = [results.metrics.examples for results in (a, b)]
    if None not in sizes and sizes[0] != sizes[1]:
        problem = f"its test split has {sizes[1]} examples, but {a.name} has {sizes[0]}"
        raise UserError(f"{b.name}: {problem}; compare models with one test split")
    classes = [results.metrics.accuracy_of.keys() for results in (a, b)]
    if all(classes) and classes[0] != classes[1]:
        problem = f"its classes differ from the classes of {a.name}"
        raise UserError(f"{b.name}: {problem}; compare models with one test split")
    for results in (a, b):
        if results.name == WORKSPACE:
            check_params_are_recorded(results)
    notes = []
    if a.test_split != b.test_split:
        notes.append(f"note: {TEST_SPLIT} differs, so the examples may not be the same")
    wrong_a, wrong_b = set(a.mistakes or ()), set(b.mistakes or ())
    became_right, became_wrong = len(wrong_a - wrong_b), len(wrong_b - wrong_a)
    return ModelComparison(
        names=(a.name, b.name),
        params=changes(a.params(a.stages), b.params(b.stages)),
        accuracies=accuracies,
        examples=sizes[0] or sizes[1],
        became_right=became_right,
        became_wrong=became_wrong,
        p=mcnemar_p(became_right, became_wrong),
        notes=notes,
    )
