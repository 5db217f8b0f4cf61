"""IDX files become splits, errors end in one line, and the pipeline runs on small data sets."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages import fetch, preprocess
from stages.fetch import DATASETS
from stages.preprocess import RAW, decode_idx, read_raw, split_indices
from stages.shared.data import load_split
from stages.shared.errors import UserError
from stages.shared.inputs import Inputs
from stages.shared.model_file import load_model
from tests.conftest import STAGES, Project, error_of, finish
from tests.faults.hostile import JSON, damaged, refused
from tests.mnist import (
    FILES,
    Mirror,
    digests,
    idx,
    running_mirror,
    small_project,
    write_files,
)

SMALL = FILES["mnist"]
IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = SMALL
CLASS_NAMES, PREPROCESSING = "class_names.json", "preprocessing.json"
ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def array(*shape: int) -> NDArray[np.uint8]:
    return np.ones(shape, np.uint8)


@pytest.mark.parametrize("shape", [(5,), (3, 8, 8), (2, 4, 5, 3), (0, 2, 2), ()])
def test_idx_file_is_decoded(shape: tuple[int, ...]) -> None:
    expected = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    decoded = decode_idx(idx(expected))
    assert decoded.shape == shape
    assert decoded.dtype == np.uint8
    assert (decoded == expected).all()


@given(data=st.binary() | damaged(idx(ARRAY)) | st.binary().map(lambda end: b"\0\0\x08" + end))
def test_any_bytes(data: bytes) -> None:
    with refused(ValueError):
        assert idx(decode_idx(data)) == data


@given(names=JSON.map(json.dumps) | st.text(), preprocessing=JSON.map(json.dumps) | st.text())
def test_any_json(names: str, preprocessing: str, folder: Path) -> None:
    (folder / TEST_IMAGES).write_bytes(idx(array(1, 2, 3)))
    (folder / TEST_LABELS).write_bytes(idx(array(1)))
    (folder / CLASS_NAMES).write_text(names)
    (folder / PREPROCESSING).write_text(preprocessing)
    with refused():
        assert len(read_raw(folder, "t10k").class_names) > 1


@pytest.mark.parametrize("size", [0, 1, 100, 249, 250])
def test_each_example_is_in_one_split(size: int) -> None:
    train, validation = split_indices(250, size, seed=0)
    assert (len(train), len(validation)) == (250 - size, size)
    for indices in (train, validation):
        assert (np.diff(indices) > 0).all()
    assert sorted([*train, *validation]) == list(range(250))


def test_seed_chooses_the_validation_examples() -> None:
    first, again, other = (split_indices(250, 100, seed)[1] for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


@pytest.fixture
def raw(tmp_path: Path) -> Project:
    """A folder with params.yaml and data/raw/, but without DVC."""
    names = json.dumps(DATASETS["mnist"].class_names)
    write_files(tmp_path / RAW, {**SMALL, CLASS_NAMES: names.encode(), PREPROCESSING: b'"mnist"'})
    (tmp_path / "params.yaml").write_text("preprocess: {validation_size: 100, seed: 0}")
    return Project(tmp_path, {})


def test_splits_contain_the_raw_examples(
    raw: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(raw.root)
    preprocess.main()
    names = ("train", "validation", "test")
    *splits, test = [load_split(Path(f"data/{name}.npz")) for name in names]
    labelled = read_raw(RAW, "train")
    for split, indices in zip(splits, split_indices(len(labelled), 100, seed=0), strict=True):
        assert (split.images == labelled.images[indices]).all()
        assert (split.labels == labelled.labels[indices]).all()
    assert (test.images == decode_idx(SMALL[TEST_IMAGES])).all()
    assert (test.labels == decode_idx(SMALL[TEST_LABELS])).all()
    for split in (*splits, test):
        assert split.class_names == DATASETS["mnist"].class_names
        assert split.preprocessing == "mnist"
    assert "data/train.npz: 500 examples" in capsys.readouterr().out


NOT_FOUND = "FILE: not found; .*`dvc repro fetch`"
TOO_LARGE = r"params\.yaml: preprocess\.validation_size .*600.*less than .*600"


def damage(problem: str) -> str:
    return f"FILE: damaged .*{problem}.*; .*`make repro`"


# A file in data/raw, its new content (None for no file), and a pattern of the error.
MISTAKES: list[tuple[str, bytes | None, str]] = [
    (IMAGES, None, NOT_FOUND),
    (TEST_LABELS, None, NOT_FOUND),
    (CLASS_NAMES, None, NOT_FOUND),
    (IMAGES, b"", damage("empty file")),
    (LABELS, b"junk", damage("6a756e6b, expected 000008")),
    (IMAGES, b"\0\0\x08\x03junk", damage("smaller than requested")),
    (TEST_IMAGES, idx(array(1, 2, 3)) + b"!", damage(r"7 into shape \(1,2,3\)")),
    (TEST_IMAGES, b"\0\0\x08\x02" + b"\xff" * 8, damage(r"0 into shape \(4294967295,4294967295\)")),
    (IMAGES, idx(array(600, 64)), r"data/raw/train-\*: .*\(600, 64\).*must be .*\(N, rows"),
    (TEST_LABELS, idx(np.full(200, 10, np.uint8)), r"data/raw/t10k-\*: .*label .*10"),
    (CLASS_NAMES, b"[]", r"data/raw/train-\*: .*class names"),
    (CLASS_NAMES, b"3", damage("array.*int")),
    (CLASS_NAMES, b'["0", 1]', damage("str.*int")),
    (CLASS_NAMES, b"junk", damage("JSON")),
    (PREPROCESSING, b"junk", damage("JSON")),
    ("../../params.yaml", b"preprocess: {validation_size: 600, seed: 0}", TOO_LARGE),
]


@pytest.mark.parametrize(("file", "data", "pattern"), MISTAKES)
def test_mistake_ends_in_one_line(
    file: str, data: bytes | None, pattern: str, raw: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = raw.root / RAW / file
    path.unlink() if data is None else path.write_bytes(data)
    line = error_of(preprocess.main, raw, monkeypatch)
    assert re.match(f"error: {pattern.replace('FILE', f'data/raw/{file}')}", line)


@pytest.fixture(scope="module")
def mirror() -> Iterator[Mirror]:
    with running_mirror() as mirror:
        yield mirror


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, mirror: Mirror) -> Project:
    """A clone with small data in which `dvc repro` has run and its results are committed."""
    project = small_project(tmp_path_factory.mktemp("small"), mirror)
    finish(project)
    return project


def test_damaged_file_is_detected_when_dvc_runs_the_stage(
    small: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small.root / RAW / CLASS_NAMES
    whole = path.read_bytes()
    monkeypatch.setenv("DVC_STAGE", "preprocess")
    path.chmod(0o644)
    path.write_bytes(whole + b" ")  # still valid JSON
    line = error_of(preprocess.main, small, monkeypatch)
    path.write_bytes(whole)
    assert re.match("error: data/raw/class_names.json: damaged .*dvc.lock.*; .*`make repro`", line)


@pytest.mark.parametrize("stage", ["fetch", "preprocess"])
def test_edit_during_a_run_is_an_error(
    stage: str, small: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = {"fetch": fetch.main, "preprocess": preprocess.main}[stage]
    path = small.root / "stages/shared/files.py"
    whole = path.read_bytes()
    monkeypatch.setenv("DVC_STAGE", stage)
    monkeypatch.setattr(fetch, "DOWNLOADS", small.root / ".downloads")
    check = Inputs.check_unchanged

    def edit_and_check(self: Inputs) -> None:
        path.write_bytes(whole + b"# edited\n")
        check(self)

    monkeypatch.setattr(Inputs, "check_unchanged", edit_and_check)
    monkeypatch.setattr(fetch, "fetch", lambda *_: None)
    line = error_of(main, small, monkeypatch)
    path.write_bytes(whole)
    assert re.match(r"error: stages/shared/files\.py: .*changed.*; rerun", line)


def test_first_run_downloads_all_files(small: Project, mirror: Mirror) -> None:
    assert {f"/mnist/{name}.gz" for name in SMALL} <= set(mirror.requested)
    assert small.run("git", "status", "--porcelain") == ""


def test_fresh_clone_reproduces_the_committed_results(small: Project, tmp_path: Path) -> None:
    fresh = small.clone(tmp_path / "clone")
    assert fresh.repro() == list(STAGES)
    assert fresh.results() == small.results()
    assert fresh.run("git", "status", "--porcelain") == ""
    assert load_model(fresh.root / "data/model.safetensors")[1].preprocessing == "mnist"


@pytest.fixture
def copy(small: Project, tmp_path: Path) -> Iterator[Project]:
    """A copy of `small` to do anything with."""
    root = shutil.copytree(small.root, tmp_path / "copy", symlinks=True)
    yield Project(root, small.extra)
    shutil.rmtree(root)


def test_fashion_mnist_needs_one_changed_param(copy: Project) -> None:
    copy.set("fetch", dataset="fashion-mnist")
    assert copy.repro() == list(STAGES)
    rows = csv.DictReader(copy.read("metrics/confusion.csv").decode().splitlines())
    assert {row["actual"] for row in rows} == set(DATASETS["fashion-mnist"].class_names)
    assert load_model(copy.root / "data/model.safetensors")[1].preprocessing == ""


def test_other_type_is_not_called_damaged(tmp_path: Path) -> None:
    """The labels of QMNIST, for example, are int32."""
    folder = write_files(tmp_path / "raw", SMALL)
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(bytes((0, 0, 0x0C, 1, 0, 0, 0, 1, 0, 0, 0, 5)))
    with pytest.raises(UserError, match=f"^{path}: holds int32, must be unsigned bytes; .*uint8"):
        read_raw(folder, "train")


def test_own_data_set_needs_one_entry(copy: Project) -> None:
    arrays = (array(300, 5, 7, 3), array(300), array(20, 5, 7, 3), array(20))
    for images in arrays[::2]:
        images *= 255
        images[:, 0] = 0
    files = dict(zip(SMALL, map(idx, arrays), strict=True))
    write_files(copy.root / "plants", files)
    script = copy.root / "stages/fetch.py"
    entry = f'"plants": Dataset(("ash", "elm"), {digests(files)}, mirrors=("plants",))'
    code = script.read_text().replace("DATASETS = {", f"DATASETS = {{{entry},", 1)
    script.write_text(code)
    copy.set("fetch", dataset="plants")
    for stage in ("fetch", "preprocess"):
        copy.run("python", "-m", f"stages.{stage}")
    split = load_split(copy.root / "data/train.npz")
    assert split.image_shape == (5, 7, 3)
    assert split.class_names == ("ash", "elm")
