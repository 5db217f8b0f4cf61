"""The recipes of docs/, each followed as printed in a fresh clone with small data."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from stages.shared.data import Split, load_split
from stages.shared.model_file import load_arrays
from tests.conftest import ROOT, Project, clone, commit, error_of, small_split
from tests.docs.test_docs import section, walk

pytestmark = pytest.mark.docs
# Of the tests that a copy keeps all are collected, and these run: the quick ones, and what touches
# the network.
KEPT = (
    "code_deps or one_way or plain_loop or learning_rate_of or without_mistakes or each_class"
    " or lead_somewhere or test_seeds or the_last_bits_alone"
)


def page(name: str, title: str = "") -> str:
    """A page of docs/, or the section of it with this title."""
    path = ROOT / "docs" / name
    return section(path, title) if title else path.read_text()


def edit_params(text: str, sentence: str, block: str) -> str:
    """Do with the text of params.yaml what a sentence of a recipe says."""
    names = re.findall("`([a-z]+)`", sentence)
    if "add to the section" in sentence:
        assert text.count(f"{names[0]}:\n") == 1
        return text.replace(f"{names[0]}:\n", block)
    for name in names:  # replace or delete
        text, count = re.subn(rf"^{name}:\n(?:(?: .*)?\n)*", "", text, flags=re.MULTILINE)
        assert count == 1, name
    return block + text


def follow(project: Project, text: str, before: str = "") -> None:
    """Do all that `text` says, in its order; its scripts run after the lines `before`."""
    steps = re.findall(
        r"^(?!```)(\S.*)\n(?:\n```(diff|python|sh|yaml)\n((?:.*\n)*?)```$)?", text, re.MULTILINE
    )
    for sentence, kind, block in steps:
        if sentence.startswith("In `params.yaml`, "):
            path = project.root / "params.yaml"
            path.write_text(edit_params(path.read_text(), sentence, block))
        elif kind == "sh":
            project.run("bash", "-euc", block)
        elif kind == "diff":
            (project.root / ".git/recipe.diff").write_text(block)
            project.run("git", "apply", ".git/recipe.diff")
        elif new := re.search(r"`(\w+\.py)` in the folder `(\w+)`", sentence):
            (project.root / new[2] / new[1]).write_text(block)
        elif kind == "python":
            project.run("python", "-c", before + block)


def touched(project: Project) -> set[str]:
    """The files that differ from the last commit, but for the two with stages and params in them
    and what `dvc repro` writes.
    """
    lines = project.run("git", "status", "--porcelain", "--untracked-files=all").splitlines()
    assert all(line[:2] in (" M", "??", "M ", "A ") for line in lines), lines
    names = {line[3:] for line in lines}
    return {name for name in names if not name.startswith(("dvc.", "metrics/", "params.yaml"))}


def check_what_stays(project: Project, name: str) -> None:
    """Do what a page says last; all tests that are left still load, and the quick ones pass."""
    follow(project, page(name, "And then"))
    printed = project.run("python", "-m", "pytest", "-q", "-x", "-n0", "-k", KEPT)
    assert re.search(r"^\d{2,} passed, \d+ deselected", printed, re.MULTILINE), printed


def load(project: Project, file: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the clone, beside those of the same name that the tests import."""
    spec = importlib.util.spec_from_file_location(f"clone_{Path(file).stem}", project.root / file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path: Path) -> Project:
    """A fresh clone, committed, whose params suit small data."""
    project = clone(tmp_path)
    small = {
        "batch_size": 16,
        "shards": 1,
        "num_epochs": 5,
        "learning_rate": 0.1,
        "momentum": 0,
        "threads": 1,
    }
    project.set(**small, learning_rate_schedule="constant", device="cpu")
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
    return [
        (split.class_names[label], image.tobytes())
        for image, label in zip(split.images, split.labels, strict=True)
    ]


def test_pictures(copy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = copy.root / "data/letters"
    names = ("a", "a b", "c", "d", "e", "f")
    split = small_split(200, (32, 20, 3), names)
    save_pictures(letters, split)
    (letters / "c/.DS_Store").write_text("not a picture, but of macOS")
    follow(copy, page("own-data.md").partition("\n## ")[0])
    assert copy.run("git", "diff", "--numstat", "dvc.yaml").startswith("0\t")
    follow(copy, page("own-data.md", "A folder of pictures"))
    assert touched(copy) == {"stages/letters.py", "data/letters.dvc"}
    assert copy.repro() == ["letters", "train", "evaluate"]
    assert accuracy(copy) > 0.6
    found = {
        name: load_split(copy.root / f"data/{name}.npz") for name in ("train", "validation", "test")
    }
    assert [len(part) for part in found.values()] == [160, 20, 20]
    assert sorted(pair for part in found.values() for pair in examples(part)) == sorted(
        examples(split)
    )

    stage = load(copy, "stages/letters.py", monkeypatch)
    before = copy.results()
    monkeypatch.chdir(copy.root)
    stage.main()
    assert copy.results() == before
    (letters / "f/zz.png").write_text("not a picture")
    assert error_of(stage.main, copy, monkeypatch) == (
        "error: data/letters/f/zz.png: not a picture (UnidentifiedImageError); remove or replace it"
    )
    Image.new("RGB", (32, 20)).save(letters / "f/zz.png")
    assert error_of(stage.main, copy, monkeypatch) == (
        "error: data/letters/f/zz.png: is not 20 x 32 like the others; resize it"
    )
    Image.new("L", (20, 32)).save(letters / "f/zz.png")
    assert stage.read_pictures(letters).images.shape == (201, 32, 20, 3)
    monkeypatch.setattr(stage, "MODE", "L")
    assert stage.read_pictures(letters).images.shape == (201, 32, 20)
    (letters / "empty").mkdir()
    assert error_of(stage.main, copy, monkeypatch) == (
        "error: data/letters/empty: has no pictures; put some there or delete it"
    )
    shutil.rmtree(letters)
    assert error_of(stage.main, copy, monkeypatch) == (
        "error: data/letters: has 0 folders; make 1 to 256, one for each class"
    )
    check_what_stays(copy, "own-data.md")


def test_arrays(copy: Project) -> None:
    split = small_split(200, (8, 8))
    np.savez(copy.root / "data/own", images=split.images, labels=split.labels)
    before = "import numpy\nown = numpy.load('data/own.npz')\nimages, labels = own.values()\n"
    follow(copy, page("own-data.md").partition("\n## ")[0])
    follow(copy, page("own-data.md", "Arrays that you already have"), before)
    assert touched(copy) == {f"data/{name}.npz.dvc" for name in ("train", "validation", "test")}
    assert copy.repro() == ["train", "evaluate"]
    assert load_split(copy.root / "data/test.npz").images.shape == (20, 8, 8)
    assert accuracy(copy) > 0.8
    check_what_stays(copy, "own-data.md")


def test_network(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(finished, page("own-network.md").partition("\n## ")[0])
    assert touched(finished) == {"stages/model.py"}
    assert finished.repro() == ["train", "evaluate"]
    assert accuracy(finished) > 0.5
    weights, _ = load_arrays(finished.root / "data/model.safetensors")
    assert weights["convolutions.0.weight"].shape == (8, 3, 3, 1)

    module = load(finished, "stages/model.py", monkeypatch)
    for image_shape in ((4, 4), (28, 28), (5, 31), (32, 20, 3)):
        model = module.Model(module.ModelParams(num_filters=2, dropout=0.5), image_shape, 7)
        assert model(mx.zeros((3, *image_shape))).shape == (3, 7)
    check_what_stays(finished, "own-network.md")


def test_param_and_metric(finished: Project) -> None:
    follow(finished, page("own-param.md").partition("\n## And then")[0])
    assert touched(finished) == {"stages/train.py", "stages/evaluate.py"}
    assert finished.repro() == ["train", "evaluate"]
    figures = json.loads(finished.read("metrics/accuracy.json"))
    assert figures["accuracy"] < figures["top_2_accuracy"] <= 1
    loss = json.loads(finished.read("metrics/training.json"))["train_loss"]
    finished.set(weight_decay=0.1)
    finished.run("python", "-m", "stages.train")
    assert json.loads(finished.read("metrics/training.json"))["train_loss"] > loss
    check_what_stays(finished, "own-param.md")


@pytest.mark.parametrize("name", ["own-network.md", "own-param.md"])
def test_what_a_recipe_shows(name: str, tmp_path: Path) -> None:
    """On the real data, as it came with this project."""
    project = clone(tmp_path, DATA_MIRROR=str(ROOT / "data/raw"))
    commit(project, "Start")
    project.repro()
    project.run("git", "commit", "--quiet", "--all", "--allow-empty", "--message=Run")
    follow(project, page(name).partition("\n## And then")[0])
    walk(project, page(name))
