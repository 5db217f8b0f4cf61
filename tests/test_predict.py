"""The command line that classifies pictures."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from stages.model import ModelParams
from stages.shared.data import load_split
from stages.shared.errors import UserError
from stages.shared.model_file import Metadata, save_model
from stages.shared.params import read_params
from tests.conftest import ROOT, SMALL, Project
from tools.predict import load, main

PARAMS = read_params("model", ModelParams, ROOT / "params.yaml")
DIGITS = Metadata(PARAMS, (28, 28), tuple("0123456789"), "mnist")


def test_predictions_are_those_of_evaluate(finished: Project, tmp_path: Path) -> None:
    test = load_split(finished.root / "data/test.npz")
    names = [str(tmp_path / f"{number}.png") for number in range(len(test))]
    for name, image in zip(names, test.images, strict=True):
        Image.fromarray(image).save(name)
    lines = finished.run("python", "-m", "tools.predict", "--json", *names).splitlines()
    answers = [json.loads(line) for line in lines]
    rows = csv.DictReader(finished.read("metrics/confusion.csv").decode().splitlines())
    assert [answer["class"] for answer in answers] == [row["predicted"] for row in rows]
    assert [answer["file"] for answer in answers] == names
    for answer in answers:
        ranking = [answer, *answer["runners_up"]]
        assert {entry["class"] for entry in ranking} == set(test.class_names)
        probabilities = [entry["probability"] for entry in ranking]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder with two pictures and a model with random weights; return its path."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("other.safetensors"), DIGITS.build(), DIGITS)
    picture = Image.new("L", (280, 200), 255)
    ImageDraw.Draw(picture).line([(60, 40), (60, 160), (100, 160)], 0, 16)
    for name in ("a.png", "a longer name.png"):
        picture.save(name)
    return Path("other.safetensors")


def test_unreadable_files_are_reported_and_the_others_classified(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.png").write_bytes(b"junk")
    Path("folder").mkdir()
    names = ["a.png", "bad.png", "no\nsuch", "folder", "a longer name.png"]
    with pytest.raises(SystemExit) as stop:
        main(names, model, as_json=False)
    assert stop.value.code == 1
    printed = capsys.readouterr()
    errors = [
        r"bad\.png: .*decoded.*; .*PNG",
        r"no\\nsuch: No such file.*",
        "folder: Is a directory",
    ]
    for line, pattern in zip(printed.err.splitlines(), errors, strict=True):
        assert re.fullmatch(f"error: {pattern}", line)
    assert re.fullmatch(r"a\.png .*\na longer name\.png .*\n", printed.out)


def test_no_readable_file_gives_no_output(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (True, False):
        with pytest.raises(SystemExit):
            main(["missing"], model, as_json)
    assert capsys.readouterr().out == ""


def test_table_is_aligned(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["a.png", "a longer name.png"], model, as_json=False)  # the same picture
    short, long = capsys.readouterr().out.splitlines()
    assert short.removeprefix(f"{'a.png':17}") == long.removeprefix("a longer name.png")
    assert re.fullmatch(r"a longer name\.png(  \w+ +\d+\.\d\d%){3}", long)


def test_standard_input(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path("a.png").read_bytes())))
    for name in ("-", "a.png"):  # one by one: last bits may depend on the place in a batch
        main([name], model, as_json=True)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first.pop("file") == "-"
    assert second.pop("file") == "a.png"
    assert first == second


def test_command_line(finished: Project) -> None:
    Image.fromarray(SMALL["test"].images[0]).save(finished.root / "one.png")
    command = ("python", "-m", "tools.predict", "one.png")
    printed = finished.run(*command)
    (finished.root / "data/model.safetensors").rename(finished.root / "mailed.safetensors")
    assert finished.run(*command, "--model", "mailed.safetensors") == printed
    line = finished.run(*command, ok=False)
    assert re.fullmatch(r"error: data/model\.safetensors: not found; .*`dvc repro`\n", line)
    assert finished.run(*command, "--help").count("Proceedings of the IEEE") == 1


def test_early_end_is_orderly(finished: Project) -> None:
    """`mx.load` of a Python file object aborted some processes that ended soon afterwards."""
    for _ in range(5):
        line = finished.run("python", "-m", "tools.predict", "missing.png", ok=False)
        assert re.fullmatch(r"error: missing\.png: .*\n", line)


@pytest.mark.parametrize(("content", "problem"), [(None, "not found"), (b"junk", "damaged")])
def test_unreadable_model_of_another_name(
    content: bytes | None, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: {problem}[^;]*; name another file$"):
        main(["one.png"], path, as_json=False)


@pytest.mark.parametrize(
    ("shape", "preprocessing"), [((28, 28), "emnist"), ((28, 28, 3), "mnist"), ((28, 28, 7), "")]
)
def test_model_of_unsupported_images(
    shape: tuple[int, ...], preprocessing: str, tmp_path: Path
) -> None:
    metadata = Metadata(PARAMS, shape, ("a", "b"), preprocessing)
    save_model(tmp_path / "model", metadata.build(), metadata)
    pattern = rf"/model: .*{re.escape(str(shape))}.*{preprocessing!r}.*; .*pictures\.py"
    with pytest.raises(UserError, match=pattern):
        load(tmp_path / "model")
