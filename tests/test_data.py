"""A split: its allowed content, and the detection of each wrong byte of its file."""

import pickle
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages.shared.data import WRITE_BYTES, Split, load_split, save_split, shuffled_indices
from stages.shared.errors import UserError
from tests.conftest import small_split
from tests.faults.hostile import Payload, archive, damaged, npy, refused

IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
LABELS = np.array([1, 0], np.uint8)
SPLIT = Split(IMAGES, LABELS, ("no", "yés"), "mnist")


def array(descr: str, shape: tuple[int, ...], data: bytes, fortran_order: bool = False) -> bytes:
    return npy({"descr": descr, "fortran_order": fortran_order, "shape": shape}, data)


LABEL, NAME = array("|u1", (1,), b"\0"), array("<U1", (1,), b"a\0\0\0")


def same(one: Split, other: Split) -> bool:
    return (
        np.array_equal(one.images, other.images)
        and np.array_equal(one.labels, other.labels)
        and one.class_names == other.class_names
        and one.preprocessing == other.preprocessing
    )


@pytest.mark.parametrize("image_shape", [(28, 28), (1, 1), (32, 20, 3), (5, 7, 1)])
@pytest.mark.parametrize("count", [0, 1, 30])
def test_saved_split_loads_unchanged(
    image_shape: tuple[int, ...], count: int, tmp_path: Path
) -> None:
    class_names = tuple(f"class {number}" for number in range(256))
    split = small_split(count, image_shape, class_names)
    for name in ("one.npz", "two.npz"):
        save_split(tmp_path / name, split)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    loaded = load_split(tmp_path / "one.npz", may_be_empty=True)
    assert same(loaded, split)
    assert loaded.image_shape == image_shape


@given(
    count=st.integers(1, 300),
    group_size=st.integers(1, 100),  # examples
    block_size=st.integers(1, 10),
    seed=st.integers(0, 9),
)
@example(count=1, group_size=1, block_size=1, seed=0)
def test_indices_are_shuffled_in_groups_of_blocks(
    count: int, group_size: int, block_size: int, seed: int
) -> None:
    split = small_split(count, (5, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.shared.data.GROUP_BYTES", group_size * 10)
        patch.setattr("stages.shared.data.BLOCK_BYTES", block_size * 10)
        indices = shuffled_indices(split, np.random.default_rng(seed))
    assert np.array_equal(np.sort(indices), np.arange(count))
    if count <= group_size:
        assert np.array_equal(indices, np.random.default_rng(seed).permutation(count))
        return
    for start in range(0, count, group_size):
        group = indices[start : start + group_size]
        blocks = np.unique(group // block_size)
        assert len(blocks) <= len(group) // block_size + 3  # the first and last can be incomplete


def test_files_are_interchangeable_with_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "split.npz"
    monkeypatch.setattr("stages.shared.data.WRITE_BYTES", 15)  # one image of 12 bytes at a time
    save_split(path, SPLIT, np.array([1, 0, 1]))
    with np.load(path) as file:
        arrays = dict(file)
    expected = SPLIT[[1, 0, 1]]
    assert same(load_split(path), expected)
    arrays["images"] = np.asfortranarray(arrays["images"])  # the order of a transposed array
    np.savez(path, **arrays)
    loaded = load_split(path)
    assert same(loaded, expected)
    assert loaded.images.flags.c_contiguous
    del arrays["preprocessing"]  # optional
    np.savez(path, **arrays)
    assert same(load_split(path, random_access=True), replace(expected, preprocessing=""))


def test_saving_and_loading_take_little_memory(tmp_path: Path) -> None:
    images = np.zeros((20, 1000, 1000), np.uint8)
    images[:, 0] = 2
    split = Split(images, np.zeros(20, np.uint8), ("a",))
    tracemalloc.start()
    save_split(tmp_path / "split.npz", split, np.arange(20))
    loaded = load_split(tmp_path / "split.npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert same(loaded, split)
    assert peak < 3 * WRITE_BYTES < images.nbytes


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"images": IMAGES.reshape(2, 12)}, r"images .*uint8 \(2, 12\).*uint8 \(N, rows, columns"),
        ({"images": IMAGES[:, :0]}, r"images .*uint8 \(2, 0, 4\).*uint8 \(N, rows, columns"),
        ({"images": IMAGES / 255}, r"images .*float64 \(2, 3, 4\).*uint8 \(N, rows, columns"),
        ({"labels": LABELS.astype(int)}, r"labels .*int64 \(2,\).*uint8 \(2,\)"),
        ({"labels": LABELS[:1]}, r"labels .*\(1,\).*\(2,\)"),
        ({"class_names": np.array(["no"])}, "label .*1.* 1 class names"),
        ({"class_names": np.array(["no", "no"])}, "2 class names.* 1 to 256 different"),
        ({"class_names": np.arange(257).astype(str)}, "257 class names.* 1 to 256 different"),
        ({"class_names": np.array([None])}, r"class_names\.npy .*object.*\.astype\(str\)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "no examples"),
    ],
)
def test_invalid_arrays_are_rejected(arrays: dict[str, Any], problem: str, tmp_path: Path) -> None:
    valid = {"images": IMAGES, "labels": LABELS, "class_names": np.array(SPLIT.class_names)}
    np.savez(tmp_path / "split.npz", **{**valid, **arrays})
    with pytest.raises(UserError, match=rf"/split\.npz: .*{problem}"):
        load_split(tmp_path / "split.npz")


def test_invalid_files_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "split.npz"

    def check_error(pattern: str) -> None:
        with pytest.raises(UserError, match=rf"^{path}: {pattern}"):
            load_split(path)

    check_error("not found.*dvc repro")
    path.touch()
    check_error("damaged .*make repro")
    np.savez(path, images=IMAGES, labels=LABELS)
    check_error(r"has no class_names\.npy; add")
    too_many_bytes = array("|u1", (1, 1, 1), b"12")
    path.write_bytes(archive(images=too_many_bytes, labels=LABEL, class_names=NAME))
    check_error(r"damaged \(.*2 into shape \(1,1,1\).*make repro")
    save_split(path, SPLIT)
    path.write_bytes(path.read_bytes().replace(IMAGES.tobytes(), IMAGES[::-1].tobytes()))
    check_error(r"damaged \(images\.npy: CRC .*make repro")


def test_compressed_file_is_rejected_before_it_takes_memory(folder: Path) -> None:
    path = folder / "compressed.npz"
    zeros = np.zeros((100_000, 100, 10), np.uint8)
    np.savez_compressed(path, images=zeros, labels=zeros[:, 0, 0], class_names=np.array(["a"]))
    assert path.stat().st_size < 1_000_000
    with refused(), pytest.raises(UserError, match=r"/compressed\.npz: .*compressed.*np\.savez"):
        load_split(path)


def test_every_flipped_bit_is_rejected_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "split.npz"
    save_split(path, SPLIT)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with refused():  # or the bit has no meaning, for example in a date of the ZIP directory
            assert same(load_split(path), SPLIT)


HEADERS = st.fixed_dictionaries(
    {
        "descr": st.sampled_from(["|u1", "<u8", "|O", "<U9", "<U0", "|V9", "<f4", "|S0", "junk"]),
        "fortran_order": st.booleans(),
        "shape": st.lists(st.integers(-2, 9) | st.integers(), max_size=3).map(tuple),
    }
)
NPY = st.builds(npy, HEADERS | st.text(), st.binary())


@given(
    images=NPY,
    labels=st.just(LABEL) | NPY,
    class_names=st.just(NAME) | NPY,
    preprocessing=st.just(NAME) | NPY,
)
@example(array("|u1", (1, 1, 1 << 40), b""), LABEL, NAME, NAME)
@example(array("|S0", (1 << 13, 1 << 13), b"", fortran_order=True), LABEL, NAME, NAME)
@example(array("|O", (), pickle.dumps(Payload())), LABEL, NAME, NAME)
@example(pickle.dumps(Payload()), LABEL, NAME, NAME)
@example(array("|u1", (1, 1, 1), b"\0"), LABEL, array("<U1", (1,), b"\xff" * 4), NAME)
def test_arbitrary_arrays_are_rejected_or_a_split(
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
def test_arbitrary_damage_is_rejected_or_harmless(data: st.DataObject, folder: Path) -> None:
    path = folder / "damaged.npz"
    save_split(path, SPLIT)
    path.write_bytes(data.draw(st.binary() | damaged(path.read_bytes())))
    with refused():
        assert same(load_split(path), SPLIT)


@pytest.mark.parametrize("value", [0, 1, 255])
def test_images_without_contrast_are_rejected(value: int, tmp_path: Path) -> None:
    """Numbers from 0 to 1 that were cast to uint8 are 0, pictures of 16 bits can become white."""
    split = small_split(300)
    images = np.full_like(split.images, value)
    images[::20] = split.images[::20]
    path = tmp_path / "split.npz"
    save_split(path, replace(split, images=images))
    with pytest.raises(UserError, match=rf"^{path}: .* single value; .*255"):
        load_split(path)
    images[::2] = split.images[::2]
    save_split(path, replace(split, images=images))
    load_split(path)
    save_split(path, replace(split, images=split.images // 128))  # only 0 and 1
    with pytest.raises(UserError, match=rf"^{path}: .* above 1; .*255"):
        load_split(path)


@pytest.mark.parametrize("names", [("a", " "), ("a", "b\n"), ("a", "\udcff"), ("a", "</script>")])
def test_class_names_that_cannot_be_printed_are_rejected(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"class name .*rename"):
        small_split(9, class_names=names)


def test_labels_from_1_are_explained() -> None:
    split = small_split(9)
    with pytest.raises(ValueError, match=r"label is 3, .*3 class names.*subtract 1"):
        replace(split, labels=split.labels + np.uint8(1))


def test_zip_headers_do_not_depend_on_the_version_of_python(tmp_path: Path) -> None:
    """Python before 3.11.4 writes other ZIP64 headers, so there must be none in a small file."""
    path = tmp_path / "split.npz"
    save_split(path, SPLIT)
    with zipfile.ZipFile(path) as archive:
        assert [member.extra for member in archive.infolist()] == [b""] * 4
        assert all(member.extract_version == 20 for member in archive.infolist())


@pytest.mark.parametrize(
    ("name", "convert", "remedy"),
    [
        ("images", lambda images: images.astype(np.float32) / 255, "scale them to 0 to 255"),
        ("images", lambda images: images.astype(np.int64), "convert them"),
        ("images", lambda images: images.reshape(len(images), -1), ".reshape(-1, rows, columns)"),
        ("labels", lambda labels: labels.astype(np.int32), ".astype(np.uint8)"),  # as in QMNIST
        ("labels", lambda labels: labels.astype(str), "np.unique(labels, return_inverse=True)"),
        ("labels", lambda labels: labels[:, None], ".ravel()"),
        ("labels", lambda labels: np.eye(3)[labels], ".argmax(axis=1)"),
    ],
)
def test_other_types_come_with_a_remedy(
    name: str, convert: Callable[[NDArray[Any]], NDArray[Any]], remedy: str
) -> None:
    split = small_split(9)
    with pytest.raises(ValueError, match=f"{name} are .*{re.escape(remedy)}"):
        arrays: dict[str, Any] = {name: convert(getattr(split, name))}
        replace(split, **arrays)
