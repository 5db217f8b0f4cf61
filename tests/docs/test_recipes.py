"""The recipes of docs/own-*.md, each followed as printed in a fresh clone with small data."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from stages.shared.data import Split, load_split
from stages.shared.model_file import load_arrays
from tests.conftest import (
    ROOT,
    SMALL,
    Project,
    clone,
    commit,
    error_of,
    finish,
    small_split,
    use_small_data,
)
from tests.docs.pages import DOCS, blocks, check_consoles, follow, introduction, section

pytestmark = pytest.mark.docs
NAMES = ("data", "network", "param", "project")
DATA, NETWORK, PARAM, PROJECT = (DOCS / f"own-{name}.md" for name in NAMES)
DELETE = "3. Delete what describes MNIST"
QUICK = "import or test_params or plain_loop or schedule or each_class"
# It stands for make, which would install the packages, and runs only the quick tests.
FAKE_MAKE = f"""#!/bin/sh
case "$1" in
  lint) ruff check && ruff format --check && mypy ;;
  repro) dvc repro ;;
  test) python -m pytest -q -x -n0 -k '{QUICK}' ;;
esac
"""


def changed_files(project: Project) -> set[str]:
    """Return the files that Git lists as changed or new, without params and DVC's files."""
    lines = project.run("git", "status", "--porcelain", "--untracked-files=all").splitlines()
    assert all(line[:2] in (" M", "??", "M ", "A ") for line in lines), lines
    names = {line[3:] for line in lines}
    return {name for name in names if not name.startswith(("dvc.", "metrics/", "params.yaml"))}


def delete_outdated(project: Project, *changed: str) -> None:
    """Delete the documents, and what own-project.md lists for changed "data" and "network"."""
    documents, data, network = blocks(section(PROJECT, DELETE), "sh")
    project.run("bash", "-euc", documents)
    for name, command in (("data", data), ("network", network)):
        if name in changed:
            project.run("bash", "-euc", command)


def check_remaining_tests(project: Project, *changed: str) -> None:
    """Delete what is outdated. Check that the other tests load and that the quick ones pass."""
    delete_outdated(project, *changed)
    printed = project.run("python", "-m", "pytest", "-q", "-x", "-n0", "-k", QUICK)
    assert re.search(r"^\d{3,} passed, .*\d+ deselected", printed, re.MULTILINE), printed


def load(project: Project, file: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a file of the clone under a new name: the tests have a module of the same name."""
    spec = importlib.util.spec_from_file_location(f"clone_{Path(file).stem}", project.root / file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path: Path) -> Project:
    """Clone this repository, with params that suit small data, and commit it."""
    project = clone(tmp_path)
    project.set(batch_size=16, shards=1, num_epochs=20, learning_rate=0.02, momentum=0, threads=1)
    project.set(learning_rate_schedule="constant", device="cpu")
    project.set("augment", **dict.fromkeys(project.params()["augment"], 0))
    commit(project, "Start")
    return project


def accuracy(project: Project) -> float:
    return float(json.loads(project.read("metrics/accuracy.json"))["accuracy"])


def save_pictures(folder: Path, split: Split) -> None:
    for number, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
        path = folder / split.class_names[label] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def examples(split: Split) -> list[tuple[str, bytes]]:
    """Return the class and the pixels of each image."""
    names = [split.class_names[label] for label in split.labels]
    return [(name, image.tobytes()) for name, image in zip(names, split.images, strict=True)]


def test_folder_of_pictures(copy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = copy.root / "data/letters"
    pictures = small_split(200, (32, 20, 3), ("a", "a b", "c", "d", "e", "f"))
    save_pictures(letters, pictures)
    (letters / "c/.DS_Store").write_text("written by Finder on macOS")
    follow(copy, introduction(DATA))
    assert copy.run("git", "diff", "--numstat", "dvc.yaml").startswith("0\t")  # no line is new
    follow(copy, section(DATA, "A folder of pictures"))
    assert changed_files(copy) == {"stages/letters.py", "data/letters.dvc"}
    assert copy.repro() == ["letters", "train", "evaluate"]
    assert accuracy(copy) > 0.3  # six classes
    splits = [load_split(copy.root / f"data/{name}.npz") for name in SMALL]
    assert sum(map(len, splits)) == len(pictures)
    assert all(set(split.labels) == set(pictures.labels) for split in splits)

    stage = load(copy, "stages/letters.py", monkeypatch)
    before = copy.results()
    monkeypatch.chdir(copy.root)
    stage.main()
    assert copy.results() == before
    (letters / "f/text.png").write_text("not a picture")
    line = error_of(stage.main, copy, monkeypatch)
    assert re.fullmatch(r"error: data/letters/f/text\.png: .*decoded.*; .*delete.*", line)
    check_remaining_tests(copy, "data")


def test_folders_of_splits(copy: Project) -> None:
    """Most published data sets have the layout of torchvision's ImageFolder."""
    for seed, name in enumerate(("train", "val", "test")):
        pictures = small_split(60 + seed, (32, 20, 3), ("a", "b"), seed)
        save_pictures(copy.root / "data/letters" / name, pictures)
    follow(copy, introduction(DATA))
    follow(copy, section(DATA, "A folder of pictures"))
    copy.repro()
    splits = [load_split(copy.root / f"data/{name}.npz") for name in SMALL]
    assert [len(split) for split in splits] == [60, 61, 62]


def test_arrays(copy: Project) -> None:
    split = small_split(200, (8, 8))
    np.savez(copy.root / "data/own", images=split.images, labels=split.labels)
    follow(copy, introduction(DATA))
    before = "import numpy\nown = numpy.load('data/own.npz')\nimages, labels = own.values()\n"
    follow(copy, section(DATA, "Arrays that you already have"), before)
    assert changed_files(copy) == {f"data/{name}.npz.dvc" for name in SMALL}
    assert copy.repro() == ["train", "evaluate"]
    assert load_split(copy.root / "data/test.npz").images.shape == (20, 8, 8)
    assert accuracy(copy) > 0.8
    check_remaining_tests(copy, "data")


def test_network(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(finished, NETWORK.read_text())
    assert changed_files(finished) == {"stages/model.py"}
    assert finished.repro() == ["train", "evaluate"]
    assert accuracy(finished) > 0.5
    weights, _ = load_arrays(finished.root / "data/model.safetensors")
    assert weights["convolutions.0.weight"].shape == (8, 3, 3, 1)

    module = load(finished, "stages/model.py", monkeypatch)
    for image_shape in ((4, 4), (28, 28), (5, 31), (32, 20, 3)):
        model = module.Model(module.ModelParams(num_filters=2, dropout=0.5), image_shape, 7)
        assert model(mx.zeros((3, *image_shape))).shape == (3, 7)
    check_remaining_tests(finished, "network")


def test_param_and_metric(finished: Project) -> None:
    follow(finished, PARAM.read_text())
    assert changed_files(finished) == {"stages/train.py", "stages/evaluate.py"}
    assert finished.repro() == ["train", "evaluate"]
    metrics = json.loads(finished.read("metrics/accuracy.json"))
    assert metrics["accuracy"] < metrics["top_2_accuracy"] <= 1
    loss = json.loads(finished.read("metrics/training.json"))["train_loss"]
    finished.set(weight_decay=0.1)
    finished.run("python", "-m", "stages.train")
    assert json.loads(finished.read("metrics/training.json"))["train_loss"] > loss
    check_remaining_tests(finished)


def test_own_project(copy: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Follow all pages in one copy, run `.ci/run` in a fresh clone of it, take an improvement."""
    pytest.importorskip("mypy", reason="mypy comes with `make lint`")
    folder = tmp_path_factory.mktemp("own")
    first, _ = blocks(section(PROJECT, "1. Copy"), "sh")
    first = first.replace("YOUR_URL", str(folder / "origin")).replace("URL", str(copy.root))
    Project(folder, {}).run("bash", "-euc", first)
    project = Project(folder / "letters", {})
    save_pictures(project.root / "data/letters", small_split(200, (32, 20, 3), ("a", "b", "c")))
    follow(project, introduction(DATA))
    follow(project, section(DATA, "A folder of pictures"))
    follow(project, NETWORK.read_text())
    follow(project, PARAM.read_text())
    delete_outdated(project, "data", "network")
    (project.root / "README.md").write_text("# Letters\n")
    follow(project, section(PROJECT, "5. Commit the first results"))
    assert accuracy(project) > 0.5
    remote = section(PROJECT, "6. Bring the data to CI")
    follow(project, remote.replace("/some/folder", str(folder / "storage")))
    assert project.run("git", "status", "--porcelain") == ""
    run_ci(project.clone(folder / "fresh"), folder / "bin")

    for name in ("README.md", "docs/speed.md", "docs/new.md", "stages/shared/cli.py", "dvc.lock"):
        copy.append(name, "# improved\n")
    commit(copy, "Improve")
    improvements = section(PROJECT, "7. Take later improvements")
    merge, finish_merge = blocks(improvements, "sh")
    project.run("bash", "-euc", merge, ok=False)
    delete_outdated(project, "data", "network")
    (keep,) = re.findall("`(git checkout .*?)`", improvements)
    project.run("bash", "-euc", keep)
    project.run("bash", "-euc", finish_merge)
    assert project.read("stages/shared/cli.py").endswith(b"# improved\n")
    assert project.read("README.md") == b"# Letters\n"
    assert not (project.root / "docs").exists()
    assert project.run("git", "status", "--porcelain") == ""
    assert project.repro() == []


def run_ci(project: Project, programs: Path) -> None:
    """Run `.ci/run` with `FAKE_MAKE`. Skip the tests over MPI and the check of the locks."""
    scripts = {programs / "make": FAKE_MAKE}
    for name in ("python", "uv"):
        scripts[project.root / ".venv/bin" / name] = "#!/bin/sh\n"
    scripts[project.root / ".venv/bin/dvc"] = '#!/bin/sh\nexec dvc "$@"\n'
    for path, content in scripts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)
    search_path = f"{programs}{os.pathsep}{project.environment()['PATH']}"
    printed = project.with_variables(PATH=search_path, CI="").run(".ci/run")
    assert re.search(r"^\d{3,} passed, .*\d+ deselected", printed, re.MULTILINE), printed


def test_improvements_reach_a_copy_made_from_a_template(copy: Project, tmp_path: Path) -> None:
    """A template's copy has the files, but not the history."""
    project = copy.clone(tmp_path / "own")
    project.run("rm", "-rf", ".git")
    commit(project, "Initial commit")
    _, connect = blocks(section(PROJECT, "1. Copy"), "sh")
    project.run("bash", "-euc", connect.replace("URL", str(copy.root)))
    copy.append("stages/shared/cli.py", "# improved\n")
    copy.run("git", "commit", "--quiet", "--all", "--message=Improve")
    merge, _ = blocks(section(PROJECT, "7. Take later improvements"), "sh")
    project.run("bash", "-euc", merge)
    assert project.read("stages/shared/cli.py").endswith(b"# improved\n")
    assert project.run("git", "status", "--porcelain") == ""


@pytest.mark.parametrize("page", [NETWORK, PARAM], ids=lambda page: page.name)
def test_page_shows_what_its_commands_print(page: Path, tmp_path: Path) -> None:
    """Follow the recipe with the real data and this project's params."""
    project = clone(tmp_path, DATA_MIRROR=str(ROOT / "data/raw"))
    commit(project, "Start")
    project.repro()
    project.run("git", "commit", "--quiet", "--all", "--allow-empty", "--message=Run")
    follow(project, page.read_text())
    check_consoles(project, page.read_text(), page)


def test_search_continues_after_a_kill(copy: Project) -> None:
    """Kill it after its first trial. It neither changes params.yaml nor forgets that trial."""
    pytest.importorskip("optuna")
    use_small_data(copy)
    finish(copy)
    (code,) = blocks(section(DOCS / "experiments.md", "Search automatically"), "python")
    (copy.root / "tools/search.py").write_text(code)
    commit(copy, "Add a search")
    command = ["python", "-m", "tools.search", "3"]
    search = subprocess.Popen(
        command, cwd=copy.root, env=copy.environment(), start_new_session=True
    )
    while "search-0" not in copy.run("dvc", "exp", "list", "--name-only"):
        assert search.poll() is None
    os.killpg(search.pid, signal.SIGKILL)
    search.wait()
    printed = copy.run(*command)
    assert copy.run("git", "status", "--porcelain") == ""
    names = set(copy.run("dvc", "exp", "list", "--name-only").split())
    assert names >= {"search-0", "search-2", "search-3"}  # the killed trial may have ended
    best = max(map(float, re.findall(r"finished with value: ([\d.]+)", printed)))
    shown = re.search(r"validation accuracy (0\.\d+)", printed)
    assert shown
    assert float(shown[1]) >= round(best, 4)
    check, baseline = re.findall("^dvc exp run .*", printed, re.MULTILINE)
    assert check.count("-S") > baseline.count("-S") == 1
    for command_line in (check, baseline):
        copy.run(*command_line.split())
