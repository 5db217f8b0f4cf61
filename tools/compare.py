"""Compare this run with the committed one and print the result in one line.

This is the last step of `make repro`. It compares dvc.lock, metrics/accuracy.json and
metrics/mistakes.csv with their versions in Git, so it needs no data of the committed run.
"""

import csv
import json
from pathlib import Path
from typing import Any

from stages.shared.cli import run
from stages.shared.dvc_lock import Stage, stages_of
from stages.shared.errors import UserError, escape
from tools.provenance import git

ACCURACY = "metrics/accuracy.json"
MISTAKES = "metrics/mistakes.csv"  # the wrong predictions: any other prediction is the label


def committed(path: str) -> str:
    """Return the text of a file at the last commit, or no text if it is not in Git."""
    try:
        return git("show", f"HEAD:./{path}")
    except UserError:
        return ""


def current(path: str) -> str:
    """Return the text of a file in the workspace, or no text if it does not exist."""
    return Path(path).read_text() if Path(path).exists() else ""


def params_of(stages: dict[str, Stage]) -> dict[str, Any]:
    """Return the params of all stages by their full names."""
    return {
        name: value for stage in stages.values() for name, value in stage.named_params().items()
    }


def outputs_of(stages: dict[str, Stage]) -> dict[str, str]:
    """Return the digests of the outputs of all stages by path."""
    return {out.path: out.md5 for stage in stages.values() for out in stage.outs}


def inputs_of(stages: dict[str, Stage]) -> dict[str, str]:
    """Return the digests of the code and data that no stage makes, by path."""
    made = outputs_of(stages)
    deps = [dep for stage in stages.values() for dep in stage.deps]
    return {dep.path: dep.md5 for dep in deps if dep.path not in made}


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """Return "old -> new" for each key with a changed value. A missing value is "none"."""
    return {
        key: f"{before.get(key, 'none')} -> {after.get(key, 'none')}"
        for key in before | after
        if before.get(key) != after.get(key)
    }


def accuracy_change() -> str:
    """Describe both accuracies and their difference; no text if one of them is missing."""
    try:
        before = json.loads(committed(ACCURACY))["accuracy"]
        after = json.loads(current(ACCURACY))["accuracy"]
        return f"; accuracy {before:.4f} -> {after:.4f} ({after - before:+.4f})"
    except (KeyError, TypeError, ValueError):
        return ""


def wrong_predictions(mistakes: str) -> dict[str, str]:
    """Return the predicted class per example from the text of metrics/mistakes.csv."""
    return {row["example"]: row["predicted"] for row in csv.DictReader(mistakes.splitlines())}


def prediction_change() -> str:
    """Describe how many predictions differ; no text if the committed ones are missing."""
    mistakes = committed(MISTAKES)
    changed = differences(wrong_predictions(mistakes), wrong_predictions(current(MISTAKES)))
    return f"; {len(changed):,} predictions on the test split differ" if mistakes else ""


def compare(before: dict[str, Stage], after: dict[str, Stage]) -> str:
    """Describe how the run `after` differs from the committed run `before`."""
    if not before:
        return "no committed run to compare with"
    if changed := differences(params_of(before), params_of(after)):
        return f"changed params: {', '.join(map(' '.join, changed.items()))}{accuracy_change()}"
    if outputs_of(before) == outputs_of(after):
        return "reproduced: bitwise identical to the committed run"
    if changed := differences(inputs_of(before), inputs_of(after)):
        return f"changed code or data: {', '.join(changed)}{accuracy_change()}"
    return f"not bitwise identical to the committed run{prediction_change()}{accuracy_change()}"


def main() -> None:
    print(escape(compare(stages_of(committed("dvc.lock")), stages_of(current("dvc.lock")))))


if __name__ == "__main__":
    run(main)
