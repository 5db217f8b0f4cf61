"""`tools.compare --seeds`: made-up tables of `dvc exp show --json`, and experiments in a clone."""

import json
import random
import re
import shlex
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from stages.shared.errors import UserError
from tests.conftest import Project, commit
from tools.experiments import (
    ACCURACY,
    MOST_SEEDS,
    NOT_SHOWN,
    OTHER_EXAMPLES,
    SEED,
    TOO_FEW,
    VALIDATION_ACCURACY,
    VALIDATION_SPLIT,
    Comparison,
    Run,
    Setting,
    compare_settings,
    find_baseline,
    finished_runs,
    group,
    note_unfinished,
    override,
    queue_command,
    resolve_metric,
)
from tools.report import MOST_SUGGESTIONS, describe_settings, short_names
from tools.revisions import TEST_SPLIT
from tools.significance import FEWEST_PAIRS

DIGESTS = {VALIDATION_SPLIT: "1", TEST_SPLIT: "2", "stages/model.py": "3"}


def run_of(
    seed: int,
    validation_accuracy: float | None,
    accuracy: float = 0.9,
    digests: dict[str, str] | None = None,
    **params: Any,
) -> Run:
    metrics = {ACCURACY: accuracy}
    if validation_accuracy is not None:
        metrics[VALIDATION_ACCURACY] = validation_accuracy
    found = DIGESTS | (digests or {})
    inputs = {path: md5 for path, md5 in found.items() if path.startswith("stages/")}
    return Run(f"{seed}", seed, {"momentum": 0, **params}, found, inputs, metrics)


def compare(baseline: Iterable[Run], *others: Iterable[Run]) -> list[Comparison]:
    settings = [Setting({run.seed: run for run in runs}, False) for runs in (baseline, *others)]
    return compare_settings(settings[1:], settings[0], [VALIDATION_ACCURACY, ACCURACY])


def row(revision: str, seed: int = 0, **accuracies: float) -> dict[str, Any]:
    """Return a row of `dvc exp show --json`."""
    metrics = {
        "metrics/accuracy.json": {"data": {"accuracy": 0.9, "loss": float("nan")}},
        "metrics/training.json": {"data": {"validation_accuracy": 0.8}},
        "metrics/other.json": {"data": {"accuracy": 0.1, "deep": {"f1": 0.5}}},
    }
    data = {
        "rev": revision,
        "params": {"params.yaml": {"data": {"train": {"seed": seed, "momentum": 0}}}},
        "metrics": metrics | {"metrics/accuracy.json": {"data": {"accuracy": 0.9, **accuracies}}},
        "deps": {"stages/model.py": {"hash": "a"}, "data/test.npz": {"hash": "b"}},
        "outs": {"data/test.npz": {"hash": "b"}},
    }
    return {"rev": revision, "data": data, "error": None}


def experiment(
    revision: str, state: str | None = None, error: dict[str, str] | None = None
) -> dict[str, Any]:
    executor = state and {"state": state}
    return {"executor": executor, "revs": [{**row(revision), "name": revision, "error": error}]}


def test_only_finished_runs_count(capsys: pytest.CaptureFixture[str]) -> None:
    failed = {
        "executor": {"state": "failed"},
        "revs": [{"rev": "f", "name": "f", "data": None, "error": {}}],
    }
    running = experiment("r", "running")
    running["revs"][0]["data"]["rev"] = "workspace"  # with the metrics of its commit
    experiments = [
        experiment("a"),
        experiment("b", "success"),
        experiment("c", "queued"),
        experiment("d", error={"type": "any", "msg": "broken"}),
        failed,
        running,
        {**running, "executor": {"state": "queued"}},  # DVC lists it twice
    ]
    table = [
        {**row("workspace"), "experiments": None},
        {**row("head"), "experiments": experiments},
    ]
    assert [run.revision for run in finished_runs(table)] == ["head", "a", "b"]
    note_unfinished(table)
    assert re.fullmatch(
        "note: .* 1 queued, 1 running, 1 failed; .*`dvc queue status`.*\n", capsys.readouterr().err
    )
    without_accuracy = row("x")
    del without_accuracy["data"]["metrics"]["metrics/accuracy.json"]
    assert list(finished_runs([{**without_accuracy, "experiments": None}])) == []


def test_run_has_params_metrics_and_digests_by_name() -> None:
    table = row("head", seed=7)
    table["data"]["params"]["params.yaml"]["data"]["train"]["momentum"] = 0.0
    (run,) = finished_runs([{**table, "experiments": None}])
    assert (run.seed, run.params) == (7, {"train.momentum": 0})
    assert json.dumps(run.params) == '{"train.momentum": 0}'
    assert run.digests == {"stages/model.py": "a", "data/test.npz": "b"}
    assert run.inputs == {"stages/model.py": "a"}
    assert run.metrics[ACCURACY] == 0.9
    assert run.metrics["metrics/other.json:deep.f1"] == 0.5
    assert not any(name.endswith("loss") for name in run.metrics)


def test_metric_is_found_by_its_name_or_file_and_name() -> None:
    runs = list(finished_runs([{**row("head"), "experiments": None}]))
    assert resolve_metric("deep.f1", runs) == "metrics/other.json:deep.f1"
    assert resolve_metric(ACCURACY, runs) == ACCURACY
    with pytest.raises(UserError, match=r"accuracy: .*accuracy\.json:accuracy, .*other\.json"):
        resolve_metric("accuracy", runs)
    with pytest.raises(UserError, match=r"f2: .*deep\.f1"):
        resolve_metric("f2", runs)


def test_runs_are_grouped_by_everything_but_the_seed() -> None:
    head = run_of(0, 0.9)
    runs = [
        run_of(0, 0.7, momentum=0.5),
        run_of(1, 0.8, momentum=0.5),
        run_of(0, 0.9, digests={"stages/model.py": "other"}),
        head,
        run_of(0, 0.9),  # the same experiment again
        run_of(1, 0.9),
    ]
    same_as_head = replace(head, revision="earlier")  # such as a commit with the same results
    settings = group([same_as_head, *runs], head)
    found = {
        (setting.any_run.params["momentum"], setting.any_run.inputs["stages/model.py"]): setting
        for setting in settings
    }
    assert len(found) == len(settings) == 3
    assert list(found[0, "3"].runs) == [0, 1]
    assert found[0, "3"].is_head
    assert not found[0, "other"].is_head
    assert found[0.5, "3"].values(VALIDATION_ACCURACY) == {0: 0.7, 1: 0.8}


def test_runs_without_a_seed_are_one_group() -> None:
    runs = [replace(run_of(0, 0.9), seed=None) for _ in range(2)]
    (setting,) = group(runs, None)
    assert list(setting.runs) == [None]


def test_baseline_is_head_or_has_the_named_params() -> None:
    head = run_of(0, 0.9)
    runs = [head, *(run_of(0, 0.8, momentum=m, dropout=d) for m in (0.5, 0.9) for d in (0, 0.1))]
    settings = group(runs, head)
    assert find_baseline(settings, {}).any_run is head
    assert find_baseline(settings, {"momentum": 0.5, "dropout": 0.1}).any_run is runs[2]
    with pytest.raises(UserError, match=r"momentum=0\.5: 2 settings .*dropout"):
        find_baseline(settings, {"momentum": 0.5})
    with pytest.raises(UserError, match="momentum=7: no settings"):
        find_baseline(settings, {"momentum": 7})
    with pytest.raises(UserError, match="momentun: "):
        find_baseline(settings, {"momentun": 0.5})
    with pytest.raises(UserError, match="HEAD: "):
        find_baseline(group(runs[1:], None), {})


def test_named_params_change_those_of_head() -> None:
    head = run_of(0, 0.9, dropout=0)
    runs = [head, run_of(0, 0.8, momentum=0.5, dropout=0), run_of(0, 0.8, momentum=0.5, dropout=1)]
    assert find_baseline(group(runs, head), {"momentum": 0.5}).any_run is runs[1]


def noisy_runs(mean: float, count: int, rng: random.Random, **params: Any) -> list[Run]:
    luck = [random.Random(seed).gauss(0, 0.01) for seed in range(count)]
    return [
        run_of(seed, mean + luck[seed] + rng.gauss(0, 0.001), **params) for seed in range(count)
    ]


def test_verdict_follows_the_paired_differences() -> None:
    rng = random.Random(0)
    baseline = noisy_runs(0.8, 8, rng)
    others = [noisy_runs(mean, 8, rng) for mean in (0.81, 0.79, 0.8)]
    comparisons = compare(baseline, *others)
    assert [found.verdict for found in comparisons] == ["better", "worse", NOT_SHOWN]
    assert [found.pairs for found in comparisons] == [8] * 3
    assert [found.family for found in comparisons] == [3] * 3
    test = comparisons[0].test
    assert test is not None
    assert test.low < 0.01 < test.high
    assert comparisons[0].adjusted_p > test.p
    assert comparisons[0].seeds_needed == 0
    assert comparisons[2].seeds_needed > 8


def test_only_pairs_with_the_same_seed_count() -> None:
    baseline, other = noisy_runs(0.8, 9, random.Random(0)), noisy_runs(0.81, 9, random.Random(1))
    (found,) = compare(baseline[:5], other[2:])
    assert (found.pairs, found.verdict) == (3, "better")
    (found,) = compare(baseline[:4], other[2:])
    assert (found.pairs, found.verdict) == (FEWEST_PAIRS - 1, TOO_FEW)
    assert found.seeds_needed >= FEWEST_PAIRS
    (found,) = compare(baseline[:2], other[2:])
    assert (found.pairs, found.verdict, found.tests) == (0, TOO_FEW, {})


def test_missing_seeds_complete_pairs_before_they_add_new_ones() -> None:
    rng = random.Random(0)
    (found,) = compare(noisy_runs(0.8, 2, rng), noisy_runs(0.81, 1, rng))
    assert found.seeds_needed == 3
    baseline = Setting({seed: run_of(seed, 0.9) for seed in (0, 1)}, True)
    assert found.missing_seeds(found.setting, baseline) == [1, 2]
    assert found.missing_seeds(baseline, baseline) == [2]


def test_without_a_common_validation_split_the_test_split_decides() -> None:
    def runs(accuracy: float, **digests: str) -> list[Run]:
        return [run_of(seed, 0.5, accuracy + seed / 7, digests) for seed in range(3)]

    other_split = {VALIDATION_SPLIT: "other"}
    (found,) = compare(runs(0.1), runs(0.2, **other_split))
    assert (found.metric, found.verdict) == (ACCURACY, "better")
    unvalidated = [run_of(seed, None, 0.2 + seed / 7) for seed in range(3)]
    assert compare(runs(0.1), unvalidated)[0].metric == ACCURACY
    (found,) = compare(runs(0.1), runs(0.2, **other_split, **{TEST_SPLIT: "other"}))
    assert (found.metric, found.verdict) == (None, OTHER_EXAMPLES)


def test_suggested_command_sets_what_the_workspace_does_not(
    finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.root)
    params = {
        f"{section}.{name}": value
        for section, values in finished.params().items()
        for name, value in values.items()
        if f"{section}.{name}" != SEED
    }
    baseline = Setting({0: Run("", 0, params | {"train.num_epochs": 9}, {}, {}, {})}, True)
    params |= {"train.momentum": 0.5, "model.dropout": 1e-5}
    setting = Setting({0: Run("", 0, params, {}, {}, {})}, False)
    command = queue_command(setting, [3, 4], baseline)
    assert set(shlex.split(command)) == {
        *("dvc", "exp", "run", "--queue", "-S"),
        *("train.momentum=0.5", "model.dropout=1e-05", "train.seed=3,4"),
        f"train.num_epochs={params['train.num_epochs']}",
    }


def test_only_the_most_promising_settings_are_suggested(
    finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search leaves many settings with one seed each."""
    monkeypatch.chdir(finished.root)
    runs = [run_of(0, 0.5 + number / 100, number=number) for number in range(30)]
    settings = [Setting({0: run}, run is runs[0]) for run in runs]
    metrics = [VALIDATION_ACCURACY, ACCURACY]
    comparisons = compare_settings(settings[1:], settings[0], metrics)
    text = describe_settings(settings[0], comparisons, metrics, markdown=False)
    commands = re.findall(r"-S number=(\d+) .*-S train.seed=1,2$", text, re.MULTILINE)
    best = [str(29 - place) for place in range(MOST_SUGGESTIONS)]
    assert commands == [best[0], "0", *best[1:]]  # the baseline, number 0, just once
    assert f"{29 - MOST_SUGGESTIONS} more settings" in text


def test_difference_that_is_too_small_gets_no_command() -> None:
    baseline = [run_of(seed, 0.8 + seed / 100) for seed in range(3)]
    same = [run_of(seed, 0.8 + seed / 100, momentum=0.1) for seed in range(3)]
    settings = [Setting({run.seed: run for run in runs}, False) for runs in (baseline, same)]
    comparisons = compare_settings(settings[1:], settings[0], [VALIDATION_ACCURACY])
    text = describe_settings(settings[0], comparisons, [VALIDATION_ACCURACY], markdown=False)
    assert NOT_SHOWN in text
    assert f"more than {MOST_SEEDS} seeds" in text


def test_other_code_is_named() -> None:
    other = run_of(0, 0.9, digests={"stages/model.py": "other"})
    settings = [Setting({0: run}, False) for run in (run_of(0, 0.9), other)]
    metrics = [VALIDATION_ACCURACY, ACCURACY]
    comparisons = compare_settings(settings[1:], settings[0], metrics)
    text = describe_settings(settings[0], comparisons, metrics, markdown=False)
    assert re.search(r"^#1 .*stages/model\.py", text, re.MULTILINE)


def test_metrics_with_the_same_name_keep_their_file() -> None:
    other = "metrics/other.json:accuracy"
    assert short_names([VALIDATION_ACCURACY, ACCURACY]) == {
        VALIDATION_ACCURACY: "validation_accuracy",
        ACCURACY: "accuracy",
    }
    assert short_names([ACCURACY, other]) == {ACCURACY: ACCURACY, other: other}


@pytest.mark.parametrize("value", [0.1, True, None, "cosine", "two words", "true", "1", [1, "a"]])
def test_override_keeps_the_type_of_a_value(value: Any) -> None:
    parser = pytest.importorskip("hydra.core.override_parser.overrides_parser")
    parsed = parser.OverridesParser.create().parse_override(f"name={override(value)}").value()
    assert (type(parsed), parsed) == (type(value), value)


def report(project: Project, *arguments: str) -> dict[str, Any]:
    text = re.sub("^note: .*\n", "", output_of(project, "--json", *arguments))
    found: dict[str, Any] = json.loads(text)
    return found


def output_of(project: Project, *arguments: str, ok: bool = True) -> str:
    return project.run("python", "-m", "tools.compare", "--seeds", *arguments, ok=ok)


def test_experiments_of_a_clone_are_compared(finished: Project) -> None:
    """Experiments from an earlier commit count, too; a queued experiment does not."""
    assert "nothing to compare" in output_of(finished)
    finished.run(
        *[
            "dvc",
            "exp",
            "run",
            "--quiet",
            "--queue",
            "-S",
            "train.num_epochs=1",
            "-S",
            "train.seed=0,1",
        ]
    )
    finished.run(*["dvc", "exp", "run", "--quiet", "--run-all"])
    text = output_of(finished)
    assert TOO_FEW in text
    for command in re.findall("dvc exp run .*", text):
        finished.run(*shlex.split(command))
    finished.run("git", "commit", "--quiet", "--allow-empty", "--message=Another commit")
    finished.run(*["dvc", "exp", "run", "--quiet", "--run-all"])

    found = report(finished)
    assert found["baseline"]["seeds"] == found["settings"][0]["seeds"] == [0, 1, 2]
    (setting,) = found["settings"]
    assert setting["params"]["train.num_epochs"] == 1
    assert setting["verdict"] in ("worse", NOT_SHOWN)
    assert setting["verdict_on"] == VALIDATION_ACCURACY
    means = setting["differences"]
    for metric in (VALIDATION_ACCURACY, ACCURACY):
        pairs = zip(setting["metrics"][metric], found["baseline"]["metrics"][metric], strict=True)
        assert means[metric]["mean"] == pytest.approx(sum(a - b for a, b in pairs) / 3)
    text = output_of(finished, "--metric", "loss", "--md")
    assert setting["verdict"] in text
    header = next(line for line in text.splitlines() if "verdict" in line)
    assert [cell.strip() for cell in header.split("|")][3:6] == [
        "validation_accuracy",
        "accuracy",
        "loss",
    ]


def test_mistake_is_one_line(finished: Project) -> None:
    mistakes = (["--metric=none"], ["momentum"], ["momentun=1"], ["--json", "HEAD"])
    for arguments in mistakes:
        line = output_of(finished, *arguments, ok=False)
        assert re.fullmatch("error: .+\n", line)


def test_shallow_clone_is_noted(finished: Project) -> None:
    finished.append("README.md", "another version")
    commit(finished, "Change a file")
    shallow = finished.root.parent / "shallow"
    finished.run("git", "clone", "--quiet", "--depth=1", f"file://{finished.root}", str(shallow))
    text = output_of(Project(shallow, finished.extra))
    assert re.search("^note: .*shallow.*git fetch --unshallow", text, re.MULTILINE)
