"""IDX files as splits, what is refused, and the whole pipeline on small data sets."""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages import preprocess
from stages.fetch import DATASETS
from stages.preprocess import RAW, decode_idx, hold_out, read_raw
from stages.shared.data import load_split
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
CLASS_NAMES, IMAGE_FORM = "class_names.json", "preprocessing.json"
ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def array(*shape: int) -> NDArray[np.uint8]:
    return np.ones(shape, np.uint8)


@pytest.mark.parametrize("shape", [(5,), (3, 8, 8), (2, 4, 5, 3), (0, 2, 2), ()])
def test_idx(shape: tuple[int, ...]) -> None:
    expected = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    decoded = decode_idx(idx(expected))
    assert decoded.shape == shape
    assert decoded.dtype == np.uint8
    assert (decoded == expected).all()


@given(data=st.binary() | damaged(idx(ARRAY)) | st.binary().map(lambda end: b"\0\0\x08" + end))
def test_any_bytes(data: bytes) -> None:
    with refused(ValueError):  # which `read_raw` turns into the line
        assert idx(decode_idx(data)) == data


@given(names=JSON.map(json.dumps) | st.text(), form=JSON.map(json.dumps) | st.text())
def test_any_class_names_and_form(names: str, form: str, folder: Path) -> None:
    (folder / TEST_IMAGES).write_bytes(idx(array(1, 2, 3)))
    (folder / TEST_LABELS).write_bytes(idx(array(1)))
    (folder / CLASS_NAMES).write_text(names)
    (folder / IMAGE_FORM).write_text(form)
    with refused():
        assert len(read_raw(folder, "t10k").class_names) > 1


@pytest.mark.parametrize("size", [0, 1, 100, 249, 250])
def test_hold_out(size: int) -> None:
    rest, held_out = hold_out(250, size, seed=0)
    assert (len(rest), len(held_out)) == (250 - size, size)
    for part in (rest, held_out):
        assert (np.diff(part) > 0).all()
    assert sorted([*rest, *held_out]) == list(range(250))
    assert (hold_out(250, size, seed=0)[1] == held_out).all()
    if size == 100:
        assert (hold_out(250, size, seed=1)[1] != held_out).any()


@pytest.fixture
def raw(tmp_path: Path) -> Project:
    """A folder with params.yaml and data/raw/, whose files DVC does not know."""
    names = json.dumps(DATASETS["mnist"].class_names)
    write_files(tmp_path / RAW, {**SMALL, CLASS_NAMES: names.encode(), IMAGE_FORM: b'"mnist"'})
    (tmp_path / "params.yaml").write_text("preprocess: {validation_size: 100, seed: 0}")
    return Project(tmp_path, {})


def test_main(
    raw: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(raw.root)
    preprocess.main()
    splits = [load_split(Path(f"data/{name}.npz")) for name in ("train", "validation", "test")]
    labelled = read_raw(RAW, "train")
    for split, chosen in zip(splits[:2], hold_out(len(labelled), 100, seed=0), strict=True):
        assert (split.images == labelled.images[chosen]).all()
        assert (split.labels == labelled.labels[chosen]).all()
    assert (splits[2].images == decode_idx(SMALL[TEST_IMAGES])).all()
    assert (splits[2].labels == decode_idx(SMALL[TEST_LABELS])).all()
    assert {split.class_names for split in splits} == {DATASETS["mnist"].class_names}
    assert {split.preprocessing for split in splits} == {"mnist"}
    assert capsys.readouterr().out.splitlines() == [
        "data/train.npz: 500 examples",
        "data/validation.npz: 100 examples",
        "data/test.npz: 200 examples",
    ]


def damage(problem: str) -> str:
    return f"FILE: damaged ({problem}); repair it with `make repro`"


# A file in data/raw, what it holds instead, and what is said of it.
MISTAKES: list[tuple[str, bytes | None, str]] = [
    (IMAGES, None, "FILE: not found; get it with `dvc repro fetch`"),
    (TEST_LABELS, None, "FILE: not found; get it with `dvc repro fetch`"),
    (CLASS_NAMES, None, "FILE: not found; get it with `dvc repro fetch`"),
    (IMAGES, b"", damage("cannot mmap an empty file")),
    (LABELS, b"junk", damage("its magic number is 6a756e6b, not 000008 and the dimensions")),
    (IMAGES, b"\0\0\x08\x03junk", damage("8 bytes are too few for its header")),
    (
        TEST_IMAGES,
        idx(array(1, 2, 3)) + b"!",
        damage("it has 7 bytes of data where 1 x 2 x 3 were announced"),
    ),
    (
        TEST_IMAGES,
        b"\0\0\x08\x03" + b"\xff" * 12,
        damage("it has 0 bytes of data where 4294967295 x 4294967295 x 4294967295 were announced"),
    ),
    (
        IMAGES,
        idx(array(600, 64)),
        "data/raw/train-*: images are uint8 (600, 64), must be uint8 (N, rows, columns) or"
        " (N, rows, columns, channels)",
    ),
    (
        LABELS,
        idx(array(599)),
        "data/raw/train-*: labels are uint8 (599,), must be uint8 (600,) as there are 600 images",
    ),
    (
        TEST_LABELS,
        idx(np.full(200, 10, np.uint8)),
        "data/raw/t10k-*: a label is 10, but there are 10 class names",
    ),
    (
        CLASS_NAMES,
        b'["0"]',
        "data/raw/train-*: a label is 9, but there are 1 class names",
    ),
    (
        CLASS_NAMES,
        b"[]",
        "data/raw/train-*: there are 0 class names, must be 1 to 256 different ones",
    ),
    (CLASS_NAMES, b"3", damage("'int' object is not iterable")),
    (IMAGE_FORM, b"junk", damage("Expecting value: line 1 column 1 (char 0)")),
    (CLASS_NAMES, b"junk", damage("Expecting value: line 1 column 1 (char 0)")),
    (
        "../../params.yaml",
        b"preprocess: {validation_size: 600, seed: 0}",
        "params.yaml: preprocess.validation_size is 600, must be less than the 600 training"
        " examples",
    ),
]


@pytest.mark.parametrize(("file", "data", "line"), MISTAKES)
def test_mistake(
    file: str, data: bytes | None, line: str, raw: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = raw.root / RAW / file
    path.unlink() if data is None else path.write_bytes(data)
    expected = f"error: {line.replace('FILE', f'data/raw/{file}')}"
    assert error_of(preprocess.main, raw, monkeypatch) == expected


@pytest.fixture(scope="module")
def mirror() -> Iterator[Mirror]:
    with running_mirror() as mirror:
        yield mirror


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, mirror: Mirror) -> Project:
    """A clone in which `dvc repro` has run on the small data set, with its results committed."""
    project = small_project(tmp_path_factory.mktemp("small"), mirror)
    finish(project)
    return project


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes((data[-1] ^ 1,))


@pytest.mark.parametrize("name", [*SMALL, CLASS_NAMES, IMAGE_FORM])
@pytest.mark.parametrize("wrong", [flip, lambda data: data[:-1], lambda _: SMALL[TEST_LABELS] * 2])
def test_damage_is_refused_when_dvc_runs_the_stage(
    wrong: Callable[[bytes], bytes], name: str, small: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small.root / RAW / name
    whole = path.read_bytes()
    monkeypatch.setenv("DVC_STAGE", "preprocess")
    try:
        path.chmod(0o644)
        path.write_bytes(wrong(whole))
        line = error_of(preprocess.main, small, monkeypatch)
    finally:
        path.write_bytes(whole)
    assert line.startswith("error: data/raw: damaged")
    assert all(part in line for part in ("dvc.lock", "`make repro`"))


def test_a_cold_run(small: Project, mirror: Mirror) -> None:
    assert {f"/mnist/{name}.gz" for name in SMALL} <= set(mirror.asked)
    assert small.run("git", "status", "--porcelain") == ""


def test_a_fresh_clone_gets_the_committed_results(small: Project, tmp_path: Path) -> None:
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


def test_a_rerun_of_fetch_needs_no_network(copy: Project) -> None:
    with (copy.root / "stages/shared/files.py").open("a") as file:
        file.write("# a comment\n")
    before = copy.results()
    no_network = {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    offline = Project(copy.root, {**copy.extra, **no_network})
    assert "from .downloads/mnist" in offline.run("dvc", "repro", "fetch")
    lock = Path("dvc.lock")
    assert {**copy.results(), lock: b""} == {**before, lock: b""}


def test_another_data_set_is_one_word(copy: Project) -> None:
    copy.set("fetch", dataset="fashion-mnist")
    assert copy.repro() == list(STAGES)
    rows = csv.DictReader(copy.read("metrics/confusion.csv").decode().splitlines())
    assert {row["actual"] for row in rows} == set(DATASETS["fashion-mnist"].class_names)
    assert load_model(copy.root / "data/model.safetensors")[1].preprocessing == ""


def test_a_data_set_of_ones_own_is_one_entry(copy: Project) -> None:
    files = {
        IMAGES: idx(array(300, 5, 7, 3)),
        LABELS: idx(array(300)),
        TEST_IMAGES: idx(array(20, 5, 7, 3)),
        TEST_LABELS: idx(array(20)),
    }
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
