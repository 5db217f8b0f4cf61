"""What README.md and docs/ claim, and every command they show."""

import ast
import json
import os
import platform
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

from stages.shared.data import load_split
from stages.shared.metrics import predict
from stages.shared.model_file import load_model
from stages.shared.params import read_params
from tests.conftest import ROOT, Project, clone, commit, stale
from tools.page import mlp_layers

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
ACCURACY: dict[str, float] = json.loads((ROOT / "metrics/accuracy.json").read_text())
# Elsewhere the last bits, and so the figures, are others.
SAME_BITS = (platform.system(), platform.machine()) == ("Linux", "x86_64")


def words(text: str) -> str:
    """The text with single spaces, wherever its lines break."""
    return " ".join(text.split())


def section(page: Path, title: str) -> str:
    """What stands below a heading, up to the next one of its level."""
    level, _, rest = page.read_text().partition(f"# {title}\n")
    assert rest, title
    marks = level.rpartition("\n")[2] + "# "
    return rest.partition(f"\n{marks}")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def committed_params() -> None:
    """Figures in the documents are those of the committed results."""
    shown = f"accuracy {ACCURACY['accuracy']:.4f}, 95% interval {ACCURACY['accuracy_95_low']:.4f}"
    if shown not in section(README, "Start"):
        stale("README.md tells of other results than metrics/accuracy.json")


@pytest.mark.usefixtures("committed_params")
def test_model_card() -> None:
    page = words((ROOT / "docs/model-card.md").read_text())
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    classes = json.loads((ROOT / "metrics/classes.json").read_text())["accuracy_of"]
    model, train = params["model"], params["train"]
    held_out = params["preprocess"]["validation_size"]
    worst = min(classes, key=classes.get)
    sizes = "-".join(map(str, [784, *[model["hidden_dim"]] * model["num_layers"], len(classes)]))
    assert f"multi-layer perceptron, {sizes} with ReLU" in page
    assert f"{60_000 - held_out:,} to train, {held_out:,} to validate, 10,000 to test" in page
    assert f"{train['num_epochs']} epochs of SGD at {train['learning_rate']} on" in page
    assert f"minibatches of {train['batch_size']}, all in" in page
    interval = f"{ACCURACY['accuracy_95_low']} to {ACCURACY['accuracy_95_high']}"
    assert f"{ACCURACY['accuracy']} on the test split (95% interval {interval})" in page
    assert f"the worst class is {worst} with {classes[worst]}" in page


@pytest.mark.usefixtures("committed_params")
def test_ladder_climbs_by_params_that_exist(tmp_path: Path) -> None:
    ladder = section(ROOT / "docs/experiments.md", "How good can it be?")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    rungs = re.findall("^dvc exp run (.*)$", ladder, re.MULTILINE)
    for rung in rungs:
        for part, name, value in re.findall(r"-S (\w+)\.(\w+)=(\S+)", rung):
            assert name in params[part]
            params[part][name] = yaml.safe_load(value)
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
        for part, params_class in params_classes().items():
            read_params(part, params_class, tmp_path / "params.yaml")
    assert len(re.findall(r"\| 0\.\d+ ± 0\.\d+ \| \d+(\.\d)? s \|", ladder)) == len(rungs) + 1


def params_classes() -> dict[str, Any]:
    from stages.model import ModelParams
    from stages.shared.augment import AugmentParams
    from stages.train import TrainParams

    return {"augment": AugmentParams, "model": ModelParams, "train": TrainParams}


@pytest.mark.usefixtures("committed_params")
def test_the_ends_of_the_ladder_and_the_speed_are_those_of_the_evidence() -> None:
    promised = words(section(README, "What is promised"))
    ladder = section(ROOT / "docs/experiments.md", "How good can it be?")
    rungs = re.findall(r"\| (0\.\d+) ± 0\.\d+ \| \d+(?:\.\d)? s \|", ladder)
    first, last = rungs[0], rungs[-1]
    assert f"{first} with the network of MLX's documentation, {last} with a larger" in promised
    whole = re.findall(
        r"^\| (?:PyTorch|JAX).*?\| .*?\| [\d.]+ \(([\d.]+)\)",
        (ROOT / "docs/speed.md").read_text(),
        re.MULTILINE,
    )
    torch, jax = (1 / float(ratio) for ratio in whole[:2])
    assert f"takes {torch:.2f} of the time of PyTorch, {jax:.2f} of JAX" in promised


@pytest.fixture
def walked(tmp_path: Path) -> Project:
    """A clone with the real data and the committed results, and no other runs in its cache."""
    cache = ROOT / ".dvc/cache/files"
    if not (cache.is_dir() and (ROOT / "data/model.safetensors").exists()):
        pytest.skip("this needs the results of `make repro`")
    project = clone(tmp_path)
    shutil.copytree(cache, tmp_path / ".dvc/cache/files", copy_function=os.link)
    commit(project, "Start")
    project.run("dvc", "checkout", "--allow-missing")
    project.repro()
    if project.run("git", "status", "--porcelain"):
        commit(project, "Run")
    return project


def lines(output: str) -> list[str]:
    """The lines of `output`, without progress bars, empty ones and spaces that only align."""
    found = [words(line.rpartition("\r")[2]) for line in output.splitlines()]
    return [line for line in found if line]


def pattern(line: str) -> str:
    """A regular expression for a line that is shown; "..." in it stands for anything."""
    literal = re.escape(line).replace(r"\.\.\.", ".*")
    return literal if SAME_BITS else re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", literal)


def walk(project: Project, text: str) -> None:
    """Run what the console blocks show, and find all their lines; only "..." allows more.

    They may come in another order, as `dvc metrics diff` takes the files in any.
    """
    sessions = re.findall(
        r"^\$ (.*)\n((?:[^$].*\n)*)", "".join(blocks(text, "console")), re.MULTILINE
    )
    assert sessions
    for command, output in sessions:
        if command == "source .venv/bin/activate":
            continue  # so it is
        printed, shown = lines(project.run("bash", "-c", command)), lines(output)
        for line in shown:
            if line != "...":
                assert any(re.fullmatch(pattern(line), found) for found in printed), (line, printed)
        assert "..." in shown or len(printed) == len(shown), printed
        if command.startswith("dvc queue start"):
            project.wait_for_queue()


@pytest.mark.docs
@pytest.mark.usefixtures("committed_params")
def test_daily_use_and_experiments(walked: Project) -> None:
    daily = section(README, "Daily use")
    assert "Change `learning_rate` in `params.yaml` to 0.2" in words(daily)
    walked.set(learning_rate=0.2)
    walk(walked, daily)
    assert walked.run("git", "status", "--porcelain") == ""
    walk(walked, section(README, "Experiments"))
    comments = re.findall("#.*", walked.read("params.yaml").decode())
    assert comments == re.findall("#.*", (ROOT / "params.yaml").read_text())


@pytest.mark.docs
@pytest.mark.usefixtures("committed_params")
def test_more_experiments(walked: Project) -> None:
    walk(walked, (ROOT / "docs/experiments.md").read_text())
    assert walked.run("git", "status", "--porcelain") == ""


@pytest.mark.docs
@pytest.mark.usefixtures("committed_params")
def test_using_the_model(walked: Project) -> None:
    """Two digits of the test split, one enlarged on white, one as a grey photo with noise."""
    seven, three = load_split(walked.root / "data/test.npz").images[[0, 18]]
    Image.fromarray(255 - seven).resize((280, 280)).save(walked.root / "seven.png")
    noise = np.random.default_rng(0).normal(170, 4, (400, 400))
    photo = noise - np.array(Image.fromarray(three).resize((400, 400))) * 0.4
    Image.fromarray(photo.astype(np.uint8)).convert("RGB").save(walked.root / "photo.jpg")
    walk(walked, (ROOT / "docs/predict.md").read_text())


@pytest.mark.usefixtures("committed_params")
def test_the_shown_mistake_is_what_a_stage_says(finished: Project) -> None:
    params = finished.root / "params.yaml"
    params.write_text(params.read_text().replace("hidden_dim", "hiden_dim"))
    (shown,) = re.findall("^error: .*\n", README.read_text(), re.MULTILINE)
    assert finished.run("python", "-m", "stages.train", ok=False) == shown


def test_use_the_model(finished: Project) -> None:
    (code,) = blocks(section(README, "Use the model"), "python")
    printed = finished.run("python", "-c", code)
    test = load_split(finished.root / "data/test.npz")
    assert set(re.findall("'(.*?)'", printed)) <= set(test.class_names)
    assert printed.count("'") == 10


@pytest.mark.parametrize("data", ["small", "real"])
@pytest.mark.parametrize("package", ["numpy", "torch"])
def test_the_weights_elsewhere(package: str, data: str, finished: Project) -> None:
    """The same class for each test image, by the code of docs/predict.md."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    root = ROOT if data == "real" else finished.root
    if not (root / "data/model.safetensors").exists():
        pytest.skip("this needs the results of `make repro`")
    model, metadata = load_model(root / "data/model.safetensors")
    if mlp_layers(model, metadata) is None:
        pytest.skip("docs/predict.md is about the multi-layer perceptron")
    (code,) = (
        block
        for block in blocks(section(ROOT / "docs/predict.md", "The weights elsewhere"), "python")
        if package in re.findall(r"^import (\w+)", block, re.MULTILINE)[-1]
    )
    printed = Project(root, {}).run("python", "-c", code)
    predictions = predict(model, load_split(root / "data/test.npz")).predicted_labels
    assert ast.literal_eval(printed) == [metadata.class_names[label] for label in predictions]


@pytest.mark.docs
def test_a_sweep_over_hosts_is_the_one_of_a_queue(finished: Project, tmp_path: Path) -> None:
    """As docs/sharing.md says, with two clones at once for two hosts."""
    page = section(ROOT / "docs/sharing.md", "Experiments on several hosts")
    sweep, _, collect = blocks(page, "sh")
    finished.run("dvc", "remote", "add", "--default", "storage", str(tmp_path / "storage"))
    commit(finished, "Share results")
    finished.run(
        "git", "init", "--quiet", "--bare", "--initial-branch=main", str(tmp_path / "remote.git")
    )
    finished.run("git", "push", "--quiet", str(tmp_path / "remote.git"), "HEAD:main")
    finished.run("dvc", "push", "--quiet")
    (tmp_path / "sweep.sh").write_text(sweep)
    remote = {"PROJECT": str(tmp_path / "remote.git")}
    hosts = [
        subprocess.Popen(command, cwd=tmp_path, env=finished.environment() | remote | task)
        for command, task in (
            (["sh", "sweep.sh"], {"SLURM_ARRAY_TASK_ID": "1"}),
            (["bash", "-c", "bash -s 2 < sweep.sh"], {}),
        )
    ]
    assert [host.wait() for host in hosts] == [0, 0]

    finished.run("git", "clone", "--quiet", remote["PROJECT"], str(tmp_path / "c"))
    host, queue = Project(tmp_path / "c", {}), finished
    shared = host.run("bash", "-euc", collect)
    assert "seed-1" in host.run("dvc", "exp", "list", "--name-only")
    queue.run("dvc", "exp", "run", "--queue", "--name=queued", "-S", "train.seed=1,2")
    queue.run("dvc", "exp", "run", "--run-all")
    queued = queue.run("bash", "-c", "dvc exp show --csv --hide-workspace | python -m tools.seeds")
    assert queued.strip() in shared
    assert re.search(r"^3 +0\.\d+ ± 0\.\d+ +0\.\d+ ± 0\.\d+$", queued, re.MULTILINE)
    model, models = "data/model.safetensors", set()
    for seed in (1, 2):
        host.run("dvc", "exp", "apply", f"seed-{seed}")
        queue.run("dvc", "exp", "apply", f"queued-{seed}")
        assert host.params()["train"]["seed"] == queue.params()["train"]["seed"] == seed
        assert host.read(model) == queue.read(model)
        models.add(host.read(model))
    assert len(models) == 2


@pytest.mark.docs
def test_branches_that_both_trained_merge(finished: Project) -> None:
    """As docs/sharing.md says, each command of it."""
    (commands,) = blocks(section(ROOT / "docs/sharing.md", "Branches that both trained"), "sh")
    finished.run("git", "switch", "--quiet", "--create", "other")
    for branch, param in (("other", {"batch_size": 40}), ("main", {"momentum": 0.5})):
        finished.run("git", "switch", "--quiet", branch)
        finished.run("dvc", "checkout")
        text = (finished.root / "params.yaml").read_text()
        for name, value in param.items():
            text = re.sub(rf"{name}: \S+", f"{name}: {value}", text)
        (finished.root / "params.yaml").write_text(text)
        finished.repro()
        commit(finished, f"Train on {branch}")
    finished.run("bash", "-c", commands.replace("\n", "; "))
    train = finished.params()["train"]
    assert (train["batch_size"], train["momentum"]) == (40, 0.5)
    assert finished.run("git", "status", "--porcelain") == ""
    assert len(finished.run("git", "show", "--no-patch", "--format=%P", "HEAD").split()) == 2
    assert finished.repro() == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub("```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if re.match("https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        titles = re.findall("^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in anchors, link
    tracked = subprocess.check_output(["git", "ls-files", "-co"], cwd=ROOT, text=True).split()
    for path in re.findall(r"`((?:stages|tools|tests|docs|\.ci)/[\w./]*\w)`", text):
        assert any(name == path or name.startswith(f"{path}/") for name in tracked), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_stay_short(page: Path) -> None:
    text = page.read_text()
    assert len(text.splitlines()) <= (150 if page == README else 200)
    assert page != README or len(text.split()) <= 900


def test_every_page_is_linked() -> None:
    linked = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)#]+)", page.read_text())
        if not re.match("https?://", link)
    }
    pictures = (ROOT / "docs/pictures").glob("*.[ps][nv]g")
    assert linked >= {path.resolve() for path in (*PAGES[1:], *pictures)}


def test_locked_mlx_is_the_one_of_the_cuda_line() -> None:
    (version,) = re.findall(r"mlx\[cuda13\]==([0-9.]+)", (ROOT / "docs/experiments.md").read_text())
    assert f"\nmlx=={version} ;" in (ROOT / "stages/requirements.txt").read_text()


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: help (.*)$", makefile, re.MULTILINE)
    printed = subprocess.check_output(["make", "help"], cwd=ROOT, text=True)
    assert re.findall(r"^make (\w+) ", printed, re.MULTILINE) == targets.split()


def test_upgrades_of_what_no_stage_imports_rerun_nothing() -> None:
    locked = re.findall(r"^([\w-]+)==", (ROOT / "stages/requirements.txt").read_text(), re.M)
    modules = set()
    for path in (ROOT / "stages").rglob("*.py"):
        modules |= set(re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.M))
    imported = modules - sys.stdlib_module_names - {"stages"}
    assert {"numpy", "mlx"} <= imported
    names = {"yaml": "pyyaml", "PIL": "pillow"}
    assert {names.get(module, module) for module in imported} <= set(locked)
    assert not {"pytest", "hypothesis", "dvc"} & set(locked)


@pytest.mark.parametrize("python", ["", "no-such-python", "./old-python"])
def test_no_python_that_will_do(python: str, tmp_path: Path) -> None:
    project = clone(tmp_path)
    (tmp_path / "old-python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "old-python").chmod(0o755)
    printed = project.run("make", "repro", f"PYTHON={python}", ok=False)
    assert "error: no Python 3.11 to 3.14" in printed
    assert "install one (apt install python3 python3-venv, brew install python@3.14)" in printed
    assert not (tmp_path / ".venv").exists()
