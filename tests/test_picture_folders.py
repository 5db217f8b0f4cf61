"""Folders of pictures become splits, whatever layout, sizes and leftovers they have."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.shared.data import Split
from stages.shared.dvc_lock import IGNORED_NAMES, digest
from stages.shared.errors import UserError
from stages.shared.picture_folders import read_splits
from stages.shared.pictures import read_picture
from tests.conftest import ROOT, Project

SHAPE = (12, 16, 3)
CLASSES = ("ant", "bee", "cow")


def write_pictures(
    folder: Path, count: int = 10, seed: int = 0, classes: tuple[str, ...] = CLASSES
) -> None:
    """Write `count` different pictures per class."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (*SHAPE[:2], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03}.png")


def counts(split: Split) -> list[int]:
    return np.bincount(split.labels, minlength=len(split.class_names)).tolist()


def test_held_out_pictures_are_drawn_per_class(tmp_path: Path) -> None:
    write_pictures(tmp_path, 20)
    splits = read_splits(tmp_path, SHAPE)
    assert {name: counts(split) for name, split in splits.items()} == {
        "train": [16, 16, 16],
        "validation": [2, 2, 2],
        "test": [2, 2, 2],
    }
    assert all(split.class_names == CLASSES for split in splits.values())
    images = np.concatenate([split.images for split in splits.values()])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == 60
    again, other = read_splits(tmp_path, SHAPE), read_splits(tmp_path, SHAPE, seed=1)
    assert np.array_equal(again["test"].images, splits["test"].images)
    assert not np.array_equal(other["test"].images, splits["test"].images)


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "valid", "Testing")])
def test_folders_of_splits_are_used_as_splits(names: tuple[str, ...], tmp_path: Path) -> None:
    for seed, name in enumerate(names):
        write_pictures(tmp_path / name, 3 + seed, seed)
    splits = read_splits(tmp_path, SHAPE)
    assert [counts(splits[name]) for name in ("train", "validation", "test")] == [
        [3] * 3,
        [4] * 3,
        [5] * 3,
    ]


def test_missing_validation_folder_is_drawn_from_training(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", 10)
    write_pictures(tmp_path / "test", 4, seed=1)
    splits = read_splits(tmp_path, SHAPE)
    assert [counts(splits[name])[0] for name in ("train", "validation", "test")] == [9, 1, 4]


def test_class_may_be_called_train(tmp_path: Path) -> None:
    write_pictures(tmp_path, 5, classes=("bus", "car", "train"))
    assert read_splits(tmp_path, SHAPE)["test"].class_names == ("bus", "car", "train")


def test_pictures_are_read_as_by_predict(tmp_path: Path) -> None:
    """Turned by EXIF, of 16 bits, transparent, of other sizes."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "train/a"
    folder.mkdir(parents=True)
    Image.fromarray(pixels[..., :3]).save(folder / "1.jpg", exif=exif)
    Image.fromarray(pixels).save(folder / "2.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "3.png")
    shutil.copytree(folder, tmp_path / "train/b")
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    split = read_splits(tmp_path, SHAPE, held_out=0)["test"][:3]
    for path, image in zip(sorted(folder.iterdir()), split.images, strict=True):
        with path.open("rb") as file:
            assert np.array_equal(image, read_picture(file, SHAPE, ""))


def test_hidden_files_and_those_of_file_managers_are_skipped(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    expected = read_splits(tmp_path, SHAPE)
    for folder in (tmp_path, tmp_path / "ant"):
        (folder / ".ipynb_checkpoints").mkdir()
        for name in IGNORED_NAMES:
            (folder / name).touch()
    found = read_splits(tmp_path, SHAPE)
    assert all(np.array_equal(found[name].images, expected[name].images) for name in expected)


def test_dvc_ignores_the_same_files(finished: Project) -> None:
    folder = finished.root / "data/letters"
    write_pictures(folder, 1)
    finished.run("dvc", "add", "data/letters")
    before = finished.read("data/letters.dvc")
    for name in IGNORED_NAMES:
        (folder / "ant" / name).touch()
    assert digest(folder).encode() in before
    assert "up to date" in finished.run("dvc", "status")
    for file in (".dvcignore", ".gitignore"):
        lines = (ROOT / file).read_text().splitlines()
        assert set(IGNORED_NAMES) <= {line.rstrip("/") for line in lines}


def test_class_that_is_missing_in_a_split_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path, 5)
    for path in sorted((tmp_path / "bee").iterdir())[2:]:
        path.unlink()
    splits = read_splits(tmp_path, SHAPE)
    notes = capsys.readouterr().out.splitlines()
    assert [re.sub("(note: ).*(test|validation).*(bee)", r"\1\2 \3", note) for note in notes] == [
        "note: validation bee",
        "note: test bee",
    ]
    assert [counts(split)[1] for split in splits.values()] == [2, 0, 0]


@pytest.mark.parametrize("image_shape", [(32,), (0, 4), (8, 8, 2), "32x24"])
def test_impossible_image_shape_is_an_error(image_shape: Any, tmp_path: Path) -> None:
    write_pictures(tmp_path)
    with pytest.raises(UserError, match=r"image shape .*rows, columns"):
        read_splits(tmp_path, image_shape)


def test_same_image_in_two_splits_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "train", 5)
    write_pictures(tmp_path / "test", 5, seed=1)
    read_splits(tmp_path, SHAPE)
    assert capsys.readouterr().out == ""
    shutil.copy(tmp_path / "train/bee/000.png", tmp_path / "test/bee/copy.png")
    read_splits(tmp_path, SHAPE)
    assert re.fullmatch(r"note: 1 images .*copy\.png.*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("mistake", "pattern"),
    [
        ("touch pictures/x.png", r"pictures/x\.png: .*not in the folder of a class"),
        ("mkdir pictures/empty", "pictures/empty: has no pictures"),
        ("mkdir pictures/ant/more", "pictures/ant/more: is a folder inside.* into pictures"),
        (
            "mkdir wrapper; mv pictures/* wrapper; mv wrapper pictures/all",
            "one folder per class into pictures",
        ),
        ("rm -r pictures/ant pictures/bee", "pictures: has 1 folders"),
        ("rm -r pictures", "pictures: not found"),
        ("echo junk > pictures/ant/x.png", r"pictures/ant/x\.png: cannot be decoded .*delete"),
        (
            "mkdir pictures/train; mv pictures/??? pictures/train; touch pictures/README",
            "pictures/README: .*move.*delete",
        ),
        (
            "mkdir pictures/train pictures/val pictures/valid; mv pictures/[abc]* pictures/train",
            "pictures/train/ant: is a folder inside",
        ),
        ("rm -r pictures/*", "pictures: has 0 folders"),
        (
            "mkdir pictures/train; mv pictures/ant pictures/bee pictures/train; "
            "mkdir pictures/test; mv pictures/cow pictures/test",
            "cow: has no class .*training",
        ),
        ("mv pictures/ant pictures/$(printf 'a\\033')", "class name .*rename"),
    ],
)
def test_mistake_is_an_error_with_a_remedy(
    mistake: str, pattern: str, finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(finished.root / "pictures", 3)
    finished.run("sh", "-c", mistake)
    monkeypatch.chdir(finished.root)
    with pytest.raises(UserError, match=pattern):
        read_splits(Path("pictures"), SHAPE)
