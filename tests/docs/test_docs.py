"""The claims of README.md and docs/, and every command that they show."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from stages.model import ModelParams
from stages.shared.augment import AugmentParams
from stages.shared.data import load_split
from stages.shared.metrics import predict
from stages.shared.model_file import load_model
from stages.shared.params import read_params
from stages.train import TrainParams
from tests.conftest import ROOT, Project, clone, commit, stale
from tests.docs.pages import (
    DOCS,
    IS_UPDATE,
    METRICS,
    PAGES,
    README,
    blocks,
    check_consoles,
    check_or_update,
    check_states,
    line_pattern,
    pasted,
    section,
    updated_output,
    with_extracts,
    with_metrics,
)
from tests.test_significance import DIFFERENCE, detected
from tools.page import mlp_layers
from tools.predict import main as classify

MODEL = "data/model.safetensors"
PACKAGES = ("numpy", "torch")  # in the order of the code blocks that read the weights
REQUIREMENTS = (ROOT / "stages/requirements.txt").read_text()
PARAMS: dict[str, Any] = {"augment": AugmentParams, "model": ModelParams, "train": TrainParams}
SPEED = (DOCS / "speed.md").read_text()
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture
def committed_params() -> None:
    """Skip a test of published numbers in a copy of the project that has other results."""
    text = README.read_text()
    if with_metrics(text) != text and not IS_UPDATE:
        stale("README.md states other results than metrics/accuracy.json")


published = pytest.mark.usefixtures("committed_params")


@published
def test_model_card_states_params() -> None:
    page = DOCS / "model-card.md"
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    model, train = params["model"], params["train"]
    held_out = params["preprocess"]["validation_size"]
    sizes = [784, *[model["hidden_dim"]] * model["num_layers"], len(METRICS["accuracy_of"])]
    check_states(section(page, "Model"), "-".join(map(str, sizes)))
    check_states(
        section(page, "Training"),
        *(f"{60_000 - held_out:,}", f"{held_out:,}", "10,000", f"{train['num_epochs']} epochs"),
        *(str(train["learning_rate"]), str(train["batch_size"])),
    )


@published
def test_commands_of_the_ladder_set_valid_params(tmp_path: Path) -> None:
    ladder = section(DOCS / "experiments.md", "How good can it be?")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    path = tmp_path / "params.yaml"
    for command in re.findall("^dvc exp run .*$", ladder, re.MULTILINE):
        for part, name, value in re.findall(r"-S (\w+)\.(\w+)=(\S+)", command):
            assert name in params[part]
            params[part][name] = yaml.safe_load(value)
        path.write_text(yaml.safe_dump(params))
        for part, params_class in PARAMS.items():
            read_params(part, params_class, path)


@published
def test_power_of_comparisons_is_that_of_a_simulation() -> None:
    page = section(DOCS / "experiments.md", "Compare settings over seeds")
    rows = re.findall(r"^\| (\d) \| (.*) \| 0\.\d+ \|$", page, re.MULTILINE)
    assert len(rows) == 2
    for pairs, powers in rows:
        found = [detected(int(pairs), count, DIFFERENCE, 2_000).mean() for count in (1, 2, 3)]
        assert powers == " | ".join(f"{power:.2f}" for power in found)


@published
def test_promised_accuracy_and_speed_are_those_of_the_evidence() -> None:
    guarantees = section(README, "What is guaranteed")
    ladder = (DOCS / "experiments.md").read_text()
    accuracies = re.findall(r"\| (0\.\d+) ± 0\.\d+ \| [\d.]+ s \|", ladder)
    check_states(guarantees, accuracies[0], accuracies[-1])
    rows = re.findall(r"^\| \D.*? \| ([\d.]+) \(.*? \| ([\d.]+) \(", SPEED, re.MULTILINE)[:4]
    for times in zip(*rows, strict=True):  # seconds per epoch, then of the whole process
        check_states(section(README, "The code"), *times)


@pytest.fixture
def real_project(tmp_path: Path) -> Project:
    """Clone this repository with the real data, run `dvc repro` and commit the results.

    Its cache has only the committed results.
    """
    cache = ROOT / ".dvc/cache/files"
    if not (cache.is_dir() and (ROOT / MODEL).exists()):
        pytest.skip("this needs the results of `make repro`")
    project = clone(tmp_path)
    shutil.copytree(cache, tmp_path / ".dvc/cache/files", copy_function=os.link)
    commit(project, "Start")
    project.run("dvc", "checkout", "--allow-missing")
    project.repro()
    if project.run("git", "status", "--porcelain"):
        commit(project, "Run")
    return project


@pytest.mark.docs
@published
def test_readme_shows_what_its_commands_print(real_project: Project) -> None:
    daily_use = section(README, "Daily use")
    check_states(daily_use, "params.yaml", "learning_rate", "0.2")
    comments = re.findall("#.*", real_project.read("params.yaml").decode())
    real_project.set(learning_rate=0.2)
    check_consoles(real_project, daily_use, README)
    assert real_project.run("git", "status", "--porcelain") == ""
    check_consoles(real_project, section(README, "Experiments"), README)
    assert re.findall("#.*", real_project.read("params.yaml").decode()) == comments


@pytest.mark.docs
@published
def test_experiments_page_shows_what_its_commands_print(real_project: Project) -> None:
    page = DOCS / "experiments.md"
    check_consoles(real_project, page.read_text(), page)
    assert real_project.run("git", "status", "--porcelain") == ""


@pytest.mark.docs
@published
def test_predict_page_shows_what_its_commands_print(real_project: Project) -> None:
    """Read two digits of the test split: one enlarged on white, one as a noisy grey photo."""
    seven, three = load_split(real_project.root / "data/test.npz").images[[0, 18]]
    Image.fromarray(255 - seven).resize((280, 280)).save(real_project.root / "seven.png")
    noise = np.random.default_rng(0).normal(170, 4, (400, 400))
    photo = noise - np.array(Image.fromarray(three).resize((400, 400))) * 0.4
    Image.fromarray(photo.astype(np.uint8)).convert("RGB").save(real_project.root / "photo.jpg")
    page = DOCS / "predict.md"
    check_consoles(real_project, page.read_text(), page)


@pytest.mark.docs
@published
def test_experiments_of_the_tour_print_what_the_page_shows(real_project: Project) -> None:
    """Run each experiment in a Python of its own, after the imports that the page shows first."""
    pattern = "^<!-- extract: .*? -->\n```python\n.*?^```$"
    typed = re.sub(pattern, "", (DOCS / "tour.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (imports, _), *experiments = re.findall(
        r"^```python\n((?:(?!```).*\n)*)```\n(?:\n```\n((?:(?!```).*\n)*))?", typed, re.MULTILINE
    )
    assert any(shown for _, shown in experiments)
    for code, shown in experiments:
        assert len(code.splitlines()) == 3
        printed = real_project.run("python", "-c", imports + code)
        if shown:  # the others print times
            assert re.fullmatch(line_pattern(shown), printed), printed


@pytest.mark.docs
@published
def test_exercises_of_the_tour_have_the_outcome_that_it_states(real_project: Project) -> None:
    exercises = section(DOCS / "tour.md", "Exercises")
    old, new = re.findall(r"`(mx\.\w+\(\w+\))`", exercises)
    code = real_project.root / "stages/train.py"
    assert f"        {old}\n" in code.read_text()
    code.write_text(code.read_text().replace(f"        {old}\n", f"        {new}\n"))
    check_consoles(real_project, exercises)


@published
def test_error_line_of_the_readme_is_what_a_stage_prints(finished: Project) -> None:
    params = finished.root / "params.yaml"
    params.write_text(params.read_text().replace("hidden_dim", "hiden_dim"))
    (shown,) = re.findall("^error: .*\n", README.read_text(), re.MULTILINE)
    assert finished.run("python", "-m", "stages.train", ok=False) == shown


def test_code_that_loads_the_model_prints_five_class_names(finished: Project) -> None:
    (code,) = blocks(section(DOCS / "predict.md", "In Python"), "python")
    names = ast.literal_eval(finished.run("python", "-c", code))
    assert len(names) == 5
    assert set(names) <= set(load_split(finished.root / "data/test.npz").class_names)


def test_code_for_a_notebook_uses_openblas(finished: Project) -> None:
    (code,) = blocks(section(DOCS / "predict.md", "In a notebook"), "python")
    printed = finished.run("python", "-c", code)
    accuracy = json.loads(finished.read("metrics/accuracy.json"))["accuracy"]
    lines = printed.splitlines()
    assert len(lines) == 2  # no note that MLX multiplies by itself
    assert all(line.startswith(f"{accuracy} ") for line in lines)


@pytest.mark.parametrize("data", ["small", "real"])
@pytest.mark.parametrize("package", PACKAGES)
def test_weights_give_the_same_classes_elsewhere(
    package: str, data: str, finished: Project
) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    root = ROOT if data == "real" else finished.root
    if not (root / MODEL).exists():
        pytest.skip("this needs the results of `make repro`")
    model, metadata = load_model(root / MODEL)
    if mlp_layers(model, metadata) is None:
        pytest.skip("docs/predict.md is about the multi-layer perceptron")
    codes = blocks(section(DOCS / "predict.md", "The weights elsewhere"), "python")
    printed = Project(root, {}).run("python", "-c", codes[PACKAGES.index(package)])
    labels = predict(model, load_split(root / "data/test.npz")).predicted_labels
    assert ast.literal_eval(printed) == [metadata.class_names[label] for label in labels]


def test_predict_page_states_the_accuracy_on_digits_of_scikit_learn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn comes with `make lint`")
    model = ROOT / MODEL
    if not model.exists() or load_model(model)[1].preprocessing != "mnist":
        pytest.skip("data/model.safetensors is missing or no model of digits; see `make repro`")
    digits = datasets.load_digits()
    names = [str(tmp_path / f"{number}.png") for number in range(len(digits.target))]
    for name, image in zip(names, digits.images, strict=True):
        Image.fromarray((image * (255 / 16)).astype(np.uint8)).save(name)
    classify(names, model, as_json=True)
    answers = [json.loads(line)["class"] for line in capsys.readouterr().out.splitlines()]
    accuracy = np.mean(np.array(answers) == digits.target.astype(str))
    page = (DOCS / "predict.md").read_text()
    assert f"scikit-learn has {len(answers):,} digits" in page
    if f"{accuracy:.4f} of them" not in page:
        stale(f"docs/predict.md has another accuracy than {accuracy:.4f}")


@pytest.mark.docs
def test_sweep_over_hosts_gives_the_weights_of_a_queue(finished: Project, tmp_path: Path) -> None:
    """Follow docs/sharing.md. Two clones that train at the same time stand for two hosts."""
    page = section(DOCS / "sharing.md", "Experiments on several hosts")
    sweep, _, collect = blocks(page, "sh")
    remote = str(tmp_path / "remote.git")
    finished.run("dvc", "remote", "add", "--default", "storage", str(tmp_path / "storage"))
    commit(finished, "Share results")
    finished.run("git", "init", "--quiet", "--bare", "--initial-branch=main", remote)
    finished.run("git", "push", "--quiet", remote, "HEAD:main")
    finished.run("dvc", "push", "--quiet")
    (tmp_path / "sweep.sh").write_text(sweep)
    environment = {**finished.environment(), "PROJECT": remote}
    slurm = {**environment, "SLURM_ARRAY_TASK_ID": "1"}
    hosts = [
        subprocess.Popen(["sh", "sweep.sh"], cwd=tmp_path, env=slurm),
        subprocess.Popen(["bash", "-c", "bash -s 2 < sweep.sh"], cwd=tmp_path, env=environment),
    ]
    assert [host.wait() for host in hosts] == [0, 0]

    finished.run("git", "clone", "--quiet", remote, str(tmp_path / "collected"))
    collected, queue = Project(tmp_path / "collected", {}), finished
    printed = collected.run("bash", "-euc", collect)
    assert "seed-1" in collected.run("dvc", "exp", "list", "--name-only")
    queue.run("dvc", "exp", "run", "--queue", "--name=queued", "-S", "train.seed=1,2")
    queue.run("dvc", "exp", "run", "--run-all")
    table = queue.run("python", "-m", "tools.compare", "--seeds")
    assert table.strip() in printed
    assert re.search(r"^baseline +3 +0\.\d+ ± 0\.\d+ +0\.\d+ ± 0\.\d+$", table, re.MULTILINE)
    models = []
    for seed in (1, 2):
        for project, name in ((collected, f"seed-{seed}"), (queue, f"queued-{seed}")):
            project.run("dvc", "exp", "apply", name)
            assert project.params()["train"]["seed"] == seed
            models.append(project.read(MODEL))
    assert models[0] == models[1] != models[2] == models[3]


@pytest.mark.docs
def test_branches_that_both_trained_can_be_merged(finished: Project) -> None:
    (commands,) = blocks(
        section(DOCS / "sharing.md", "Merge two branches with different results"), "sh"
    )
    finished.run("git", "switch", "--quiet", "--create", "other")
    for branch, params in (("other", {"batch_size": 40}), ("main", {"momentum": 0.5})):
        finished.run("git", "switch", "--quiet", branch)
        finished.run("dvc", "checkout")
        finished.set(**params)
        finished.repro()
        commit(finished, f"Train on {branch}")
    finished.run("bash", "-c", commands.replace("\n", "; "))
    train = finished.params()["train"]
    assert (train["batch_size"], train["momentum"]) == (40, 0.5)
    assert finished.run("git", "status", "--porcelain") == ""
    assert len(finished.run("git", "show", "--no-patch", "--format=%P", "HEAD").split()) == 2
    assert finished.repro() == []


def links(page: Path) -> list[tuple[Path, str]]:
    """Return the file and the anchor, if any, of each link to a page or a picture."""
    text = re.sub("```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", text)
    return [((page.parent / file).resolve() if file else page, anchor) for file, anchor in found]


@by_name
def test_extracted_code_is_that_of_the_files(page: Path) -> None:
    check_or_update(page, with_extracts(page.read_text()))


@published
@by_name
def test_metrics_on_pages_are_those_of_the_last_run(page: Path) -> None:
    check_or_update(page, with_metrics(page.read_text()))


@by_name
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists()
        if anchor:
            titles = re.findall("^#+ (.*)$", target.read_text().lower(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]
            assert anchor in anchors


@by_name
def test_named_files_exist(page: Path) -> None:
    command = ["git", "ls-files", "--cached", "--others"]
    files = subprocess.check_output(command, cwd=ROOT, text=True).split()
    files += re.findall(r"^```python\n# (\S+)$", page.read_text(), re.MULTILINE)  # to be created
    text = re.sub("```.*?```", "", page.read_text(), flags=re.DOTALL)
    for path in re.findall(r"`((?:stages|tools|tests|docs|\.ci)/[\w./]*\w)`", text):
        assert any(file == path or file.startswith(f"{path}/") for file in files), path


def test_every_page_and_picture_is_linked() -> None:
    linked = {target for page in PAGES for target, _ in links(page)}
    pictures = (DOCS / "pictures").glob("*.[ps][nv]g")
    assert linked >= {path.resolve() for path in (*PAGES[1:], *pictures)}


@pytest.mark.parametrize(("page", "lock"), [("scale", "mpi"), ("experiments", "search")])
def test_ci_installs_packages_as_the_page_shows(page: str, lock: str) -> None:
    (command,) = re.findall(f".*{lock}.txt.*", (DOCS / f"{page}.md").read_text())
    assert f"{command}\n" in (ROOT / ".ci/run").read_text().replace(" --quiet", "")


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: help (.*)$", makefile, re.MULTILINE)
    printed = subprocess.check_output(["make", "help"], cwd=ROOT, text=True)
    assert re.findall(r"^make (\w+) ", printed, re.MULTILINE) == targets.split()


def test_stages_depend_on_the_packages_that_they_import() -> None:
    locked = re.findall(r"^([\w-]+)==", REQUIREMENTS, re.MULTILINE)
    modules = set()
    for path in (ROOT / "stages").rglob("*.py"):
        modules |= set(re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
    imported = modules - sys.stdlib_module_names - {"stages"}
    assert {"numpy", "mlx"} <= imported
    names = {"yaml": "pyyaml", "PIL": "pillow"}
    assert {names.get(module, module) for module in imported} <= set(locked)
    assert not {"pytest", "hypothesis", "dvc"} & set(locked)  # an upgrade must not rerun stages


@pytest.mark.parametrize("python", ["", "no-such-python", "./old-python"])
def test_missing_python_is_one_line(python: str, tmp_path: Path) -> None:
    project = clone(tmp_path)
    (tmp_path / "old-python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "old-python").chmod(0o755)
    printed = project.run("make", "repro", f"PYTHON={python}", ok=False)
    assert re.search(r"^error: no Python 3\.11 to 3\.14.*; install one \(apt .*brew", printed, re.M)
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(not shutil.which("zsh"), reason="this needs zsh")
def test_consoles_are_pasted_into_zsh() -> None:
    """The default shell of macOS does not take "#" for a comment."""
    project = Project(ROOT, {})
    assert project.run(*pasted("printf '%s ' a # b")) == "a # b "
    check_consoles(project, "```console\n$ echo '[a]*' $((1 + 2))\n[a]* 3\n```\n")
    with pytest.raises(AssertionError):
        check_consoles(project, "```console\n$ echo a # b\na\n```\n")
    with pytest.raises(AssertionError):
        check_consoles(project, "```console\n$ ls [\n```\n")


def test_make_docs_changes_only_the_numbers_of_an_excerpt() -> None:
    shown = "...\naccuracy 0.9506, 95% interval 0.9462 to 0.9547\n...\n"
    output = "epoch 1\raccuracy 0.9617, 95% interval 0.9578 to 0.9653\nanother line 1\n"
    assert updated_output(shown, output) == (
        "...\naccuracy 0.9617, 95% interval 0.9578 to 0.9653\n...\n"
    )
    table = "Path  Metric    HEAD     Change\na     accuracy  0.9506   0.01\n"
    assert updated_output("Path  Metric  HEAD  Change\na  accuracy  1  2\n", table) == table
    with_any_text = "...\nfile://.../index.html\n| ... [fast] | 0.9 |\n"
    printed = "file:///tmp/index.html\n| main | 0.8 |\n| a [fast] | 0.9 |\n"
    assert updated_output(with_any_text, printed) == with_any_text


def test_make_docs_renews_code_and_metrics(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for file, name in (("stages/train.py", "train_epoch"), ("stages/model.py", "Model")):
        comment = f"<!-- extract: {file} {name} -->\n"
        page.write_text(f"{comment}```python\nold\n```\ntext\n")
        code = with_extracts(page.read_text())
        assert code.startswith(f"{comment}```python\n")
        assert code.endswith("```\ntext\n")
        assert f" {name}" in code
        assert '"""' not in code
        assert with_extracts(code) == code
    template = "accuracy {accuracy:.2f}, worst {worst_class}"
    text = with_metrics(f"<!-- metrics: {template} -->\n```\nold\n```\n")
    assert f"\naccuracy {METRICS['accuracy']:.2f}, worst " in text
    assert with_metrics(text) == text
