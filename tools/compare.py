"""Say in a line whether this run reproduced the committed one; the last step of `make repro`.

It compares dvc.lock, metrics/accuracy.json and metrics/mistakes.csv with those in Git, and so needs
no data of the committed run.
"""

import csv
import json
from pathlib import Path
from typing import Any

from stages.shared.cli import run
from stages.shared.errors import UserError
from tools.provenance import digests_of, git, params_of, stages_of

ACCURACY = "metrics/accuracy.json"
MISTAKES = "metrics/mistakes.csv"  # all predictions, for the others are the labels


def committed(path: str) -> str:
    """What Git has of a file at the last commit; nothing if it has none."""
    try:
        return git("show", f"HEAD:./{path}")
    except UserError:
        return ""


def current(path: str) -> str:
    """The text of a file as it is now; nothing if there is none."""
    return Path(path).read_text() if Path(path).exists() else ""


def all_of(stages: dict[str, dict[str, Any]], kind: str) -> dict[str, str]:
    """The digests of the "deps" or "outs" of all stages."""
    return digests_of(part for stage in stages.values() for part in stage.get(kind, ()))


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """Where two mappings differ, and how."""
    names = [*before, *(name for name in after if name not in before)]
    return {
        name: f"{before.get(name, 'none')} -> {after.get(name, 'none')}"
        for name in names
        if before.get(name) != after.get(name)
    }


def accuracies() -> str:
    """The accuracies of the committed run and of this one, where both have one."""
    try:
        before, after = (
            json.loads(text)["accuracy"] for text in (committed(ACCURACY), current(ACCURACY))
        )
        return f"; accuracy {before:.4f} -> {after:.4f} ({after - before:+.4f})"
    except (KeyError, TypeError, ValueError):
        return ""


def predictions() -> str:
    """How many test examples are predicted as another class than in the committed run."""
    if not (text := committed(MISTAKES)):
        return ""
    before, after = (
        {row["example"]: row["predicted"] for row in csv.DictReader(lines.splitlines())}
        for lines in (text, current(MISTAKES))
    )
    others = sum(before.get(example) != after.get(example) for example in {*before, *after})
    return f"; the same predictions on all but {others:,} of the test examples"


def verdict() -> str:
    """The line."""
    before, after = (stages_of(text) for text in (committed("dvc.lock"), current("dvc.lock")))
    if not before:
        return "no committed run to compare this one with"
    params = [
        {name: value for stage in stages.values() for name, value in params_of(stage).items()}
        for stages in (before, after)
    ]
    if changed := changes(*params):
        return f"a changed experiment: {', '.join(map(' '.join, changed.items()))}{accuracies()}"
    outs = [all_of(stages, "outs") for stages in (before, after)]
    if outs[0] == outs[1]:
        return "reproduced: the same bits as the committed run"
    inputs = [
        {path: md5 for path, md5 in all_of(stages, "deps").items() if path not in made}
        for stages, made in zip((before, after), outs, strict=True)
    ]
    if changed := changes(*inputs):
        return f"changed code or data: {', '.join(changed)}{accuracies()}"
    return f"other bits than the committed run{predictions()}{accuracies()}"


def main() -> None:
    print(verdict())


if __name__ == "__main__":
    run(main)
