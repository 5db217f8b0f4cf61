"""A split: what it may hold, and that no wrong byte of its file goes unnoticed."""

import pickle
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stages.shared.data import PART, Split, load_split, save_split, shuffled_indices
from stages.shared.errors import UserError
from tests.conftest import small_split
from tests.faults.hostile import Payload, archive, damaged, npy, refused

IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
LABELS = np.array([1, 0], np.uint8)
SPLIT = Split(IMAGES, LABELS, ("no", "yés"), "a form")


def same(one: Split, other: Split) -> bool:
    return (
        np.array_equal(one.images, other.images)
        and np.array_equal(one.labels, other.labels)
        and one.class_names == other.class_names
        and one.preprocessing == other.preprocessing
    )


@pytest.mark.parametrize("image_shape", [(28, 28), (1, 1), (32, 20, 3), (5, 7, 1)])
@pytest.mark.parametrize("count", [0, 1, 30])
def test_a_split_comes_back_as_it_was(
    image_shape: tuple[int, ...], count: int, tmp_path: Path
) -> None:
    names = tuple(f"class {number}" for number in range(256))
    split = small_split(count, image_shape, names)
    for name in ("one.npz", "two.npz"):
        save_split(tmp_path / name, split)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    loaded = load_split(tmp_path / "one.npz", may_be_empty=True)
    assert same(loaded, split)
    assert loaded.image_shape == image_shape


@given(
    count=st.integers(1, 300),
    group=st.integers(1, 100),  # examples
    block=st.integers(1, 10),
    seed=st.integers(0, 9),
)
@example(count=1, group=1, block=1, seed=0)
def test_random_order(count: int, group: int, block: int, seed: int) -> None:
    split = small_split(count, (5, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.shared.data.GROUP", group * 10)
        patch.setattr("stages.shared.data.BLOCK", block * 10)
        order = shuffled_indices(split, np.random.default_rng(seed))
    assert np.array_equal(np.sort(order), np.arange(count))
    if count <= group:
        assert np.array_equal(order, np.random.default_rng(seed).permutation(count))
        return
    for start in range(0, count, group):  # a group is read from whole blocks, but for its ends
        part = order[start : start + group]
        assert len(np.unique(part // block)) <= len(part) // block + 3


def test_numpy_reads_and_writes_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "split.npz"
    monkeypatch.setattr("stages.shared.data.PART", 15)  # bytes, more than one image has
    save_split(path, SPLIT, np.array([1, 0, 1]))
    with np.load(path) as arrays:
        again = {name: arrays[name] for name in arrays}
    np.savez(tmp_path / "by_numpy.npz", **again)
    assert path.read_bytes() == (tmp_path / "by_numpy.npz").read_bytes()
    chosen = SPLIT[[1, 0, 1]]
    assert same(load_split(path), chosen)
    again["images"] = np.asfortranarray(again["images"])  # as a transposed array is
    np.savez(path, **again)
    assert same(load_split(path), chosen)
    del again["preprocessing"]  # which nobody with arrays of their own needs
    np.savez(path, **again)
    assert same(load_split(path), replace(chosen, preprocessing=""))


def test_only_parts_of_a_split_are_in_memory(tmp_path: Path) -> None:
    images = np.zeros((20, 1000, 1000), np.uint8)
    split = Split(images, np.zeros(20, np.uint8), ("a",))
    tracemalloc.start()
    save_split(tmp_path / "split.npz", split, np.arange(20))
    loaded = load_split(tmp_path / "split.npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert same(loaded, split)
    assert peak < 3 * PART < images.nbytes


def test_indexing_chooses_examples() -> None:
    assert same(SPLIT[::-1], Split(IMAGES[::-1], LABELS[::-1], SPLIT.class_names, "a form"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"images": IMAGES.reshape(2, 12)},
            "images are uint8 (2, 12), must be uint8 (N, rows, columns) or"
            " (N, rows, columns, channels)",
        ),
        (
            {"images": IMAGES / 255},
            "images are float64 (2, 3, 4), must be uint8 (N, rows, columns) or"
            " (N, rows, columns, channels)",
        ),
        (
            {"labels": LABELS.astype(int)},
            "labels are int64 (2,), must be uint8 (2,) as there are 2 images",
        ),
        (
            {"labels": LABELS[:1]},
            "labels are uint8 (1,), must be uint8 (2,) as there are 2 images",
        ),
        ({"class_names": np.array(["no"])}, "a label is 1, but there are 1 class names"),
        (
            {"class_names": np.array(["no", "no"])},
            "there are 2 class names, must be 1 to 256 different ones",
        ),
        (
            {"class_names": np.arange(257).astype(str)},
            "there are 257 class names, must be 1 to 256 different ones",
        ),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "has no examples; it needs some"),
    ],
)
def test_arrays_that_are_not_a_split(
    arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]],
    message: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "split.npz"
    good = {"images": IMAGES, "labels": LABELS, "class_names": np.array(SPLIT.class_names)}
    np.savez(path, **{**good, **arrays})  # type: ignore[arg-type]
    with pytest.raises(UserError) as error:
        load_split(path)
    assert str(error.value) == f"{path}: {message}"


def test_files_that_are_not_a_split(tmp_path: Path) -> None:
    path = tmp_path / "split.npz"

    def message() -> str:
        with pytest.raises(UserError) as error:
            load_split(path)
        assert str(path) in str(error.value)
        return str(error.value).replace(str(path), "FILE")

    assert message() == "FILE: not found; make it with `dvc repro`"
    path.write_bytes(b"")
    assert message() == "FILE: damaged (File is not a zip file); repair it with `make repro`"
    np.savez(path, images=IMAGES, labels=LABELS)
    assert message() == "FILE: has no class_names.npy; it must hold images, labels, class_names"
    np.savez_compressed(path, images=IMAGES, labels=LABELS, class_names=np.array(["a", "b"]))
    assert message() == "FILE: is compressed; write it with np.savez"
    save_split(path, SPLIT)
    path.write_bytes(path.read_bytes().replace(IMAGES.tobytes(), IMAGES[::-1].tobytes()))
    checksum = "images.npy: its checksum is not the one it names"
    assert message() == f"FILE: damaged ({checksum}); repair it with `make repro`"
    np.savez(path, images=IMAGES, labels=LABELS, class_names=np.array([None]))
    assert re.fullmatch(
        r"FILE: damaged \(class_names\.npy: \d+ bytes are not an array of object \(1,\)\); fix it"
        " with `make repro`",
        message(),
    )


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "split.npz"
    save_split(path, SPLIT)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            split = load_split(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        else:  # a bit that says nothing, as of the archive's dates
            assert same(split, SPLIT)


HEADERS = st.fixed_dictionaries(
    {
        "descr": st.sampled_from(["|u1", "<u8", "|O", "<U9", "<U0", "|V9", "<f4", "|S0", "junk"]),
        "fortran_order": st.booleans(),
        "shape": st.lists(st.integers(-2, 9) | st.integers(), max_size=3).map(tuple),
    }
)
NPY = st.builds(npy, HEADERS | st.text(), st.binary())
LABEL = npy({"descr": "|u1", "fortran_order": False, "shape": (1,)}, b"\0")
NAME = npy({"descr": "<U1", "fortran_order": False, "shape": (1,)}, b"a\0\0\0")


@given(
    images=NPY,
    labels=st.just(LABEL) | NPY,
    class_names=st.just(NAME) | NPY,
    preprocessing=st.just(NAME) | NPY,
)
@example(
    npy({"descr": "|u1", "fortran_order": False, "shape": (1, 1, 1 << 40)}, b""), LABEL, NAME, NAME
)
@example(
    npy({"descr": "|S0", "fortran_order": True, "shape": (1 << 13, 1 << 13)}, b""),
    LABEL,
    NAME,
    NAME,
)
@example(
    npy({"descr": "|O", "fortran_order": False, "shape": ()}, pickle.dumps(Payload())),
    LABEL,
    NAME,
    NAME,
)
@example(pickle.dumps(Payload()), LABEL, NAME, NAME)
def test_any_arrays(
    folder: Path, images: bytes, labels: bytes, class_names: bytes, preprocessing: bytes
) -> None:
    path = folder / "split.npz"
    arrays = {"images": images, "labels": labels, "class_names": class_names}
    path.write_bytes(archive(**arrays, preprocessing=preprocessing))
    with refused():
        split = load_split(path)
        assert split.images.dtype == split.labels.dtype == np.uint8
        assert len(split.images) == len(split.labels) > 0
    assert not Path("executed").exists()


@given(data=st.data())
def test_damaged_bytes(data: st.DataObject, folder: Path) -> None:
    path = folder / "damaged.npz"
    save_split(path, SPLIT)
    path.write_bytes(data.draw(st.binary() | damaged(path.read_bytes())))
    with refused():
        assert same(load_split(path), SPLIT)


def test_a_bomb(folder: Path) -> None:
    path = folder / "bomb.npz"
    zeros = np.zeros((100_000, 100, 10), np.uint8)
    np.savez_compressed(path, images=zeros, labels=zeros[:, 0, 0], class_names=np.array(["a"]))
    assert path.stat().st_size < 1_000_000
    with refused():
        load_split(path)
        raise AssertionError("it was loaded")
