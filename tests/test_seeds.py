import re
import subprocess
import sys

import pytest

from stages.shared.errors import UserError
from tests.conftest import ROOT
from tools.seeds import summarize


def row(accuracy: str, validation: str, seed: int, momentum: str = "0") -> dict[str, str]:
    return {
        "rev": "abc",
        "accuracy": accuracy,
        "validation_accuracy": validation,
        "fetch.dataset": "mnist",
        "train.momentum": momentum,
        "train.seed": str(seed),
        "preprocess.seed": "0",
    }


def test_mean_and_deviation_of_each_set_of_params() -> None:
    rows = [
        row("0.90", "0.80", 0),
        row("0.90", "0.80", 0),  # the same experiment again
        row("0.92", "0.83", 1),
        row("0.94", "0.86", 2),
        row("0.99", "0.98", 0, "0.9"),
        row("", "", 1, "0.9"),  # queued or failed
    ]
    assert summarize(rows) == [
        ["train.momentum", "seeds", "validation_accuracy", "accuracy"],
        ["0", "3", "0.8300 ± 0.0300", "0.9200 ± 0.0200"],
        ["0.9", "1", "0.9800", "0.9900"],
    ]


def test_params_in_which_none_differ_are_not_shown() -> None:
    assert summarize([row("0.9", "0.8", 0), row("0.9", "0.8", 1)])[0][0] == "seeds"


def test_experiments_with_other_code_are_not_averaged() -> None:
    digests = ("0123456789abcdef", "fedcba9876543210")
    rows = [{**row("0.9", "0.8", 0), "stages/model.py": digest} for digest in digests]
    assert [line[0] for line in summarize(rows)] == [
        "stages/model.py",
        "0123456789ab",
        "fedcba987654",
    ]


def test_params_that_differ_late_are_told_apart() -> None:
    names = ["warmup-and-cosine", "warmup-and-linear"]
    rows = [{**row("0.9", "0.8", 0), "train.schedule": name} for name in names]
    assert [line[0] for line in summarize(rows)] == ["train.schedule", *names]


def test_experiments_without_a_validation_split_count() -> None:
    assert summarize([row("0.9", "", 0), row("0.8", "!", 1)])[1] == ["2", "", "0.8500 ± 0.0707"]


def test_nothing_to_summarize() -> None:
    with pytest.raises(UserError) as error:
        summarize([row("", "", 1)])
    assert str(error.value) == (
        "no experiments; pipe `dvc exp show --csv --hide-workspace` into this"
    )


@pytest.mark.parametrize("text", [b"\x00\xff\n\x80", b"a\rb,c\n", b"train.seed,accuracy\n0,inf\n"])
def test_text_that_is_not_a_table_is_one_line(text: bytes) -> None:
    command = [sys.executable, "-m", "tools.seeds"]
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rb"error: .*`dvc exp show .*\n", done.stderr)
