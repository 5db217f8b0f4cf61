from pathlib import Path

import numpy as np
import pytest

from stages.errors import UserError
from stages.files import DamagedError, Split, load_split, save_split
from stages.preprocess import decode_idx, decode_split, hold_out
from tests.conftest import NUM_TRAIN, idx

IMAGES = idx(np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2))
LABELS = idx(np.array([0, 9, 5], np.uint8))


def test_decode() -> None:
    split = decode_split(IMAGES, LABELS, num_classes=10)
    assert split.images.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert split.labels.tolist() == [0, 9, 5]
    assert split.images.dtype == split.labels.dtype == np.uint8


@pytest.mark.parametrize(
    "data",
    [
        b"",
        LABELS,
        b"\0\0\x09\3" + IMAGES[4:],
        b"\1\0\x08\3" + IMAGES[4:],
        IMAGES[:15],
        IMAGES[:-1],
        IMAGES + b"\0",
        b"\0\0\x08\3" + b"\xff" * 12 + b"\0" * 12,
    ],
)
def test_damaged_idx(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"magic number|header|announced"):
        decode_idx(data, ndim=3)


@pytest.mark.parametrize("size", [0, 1, 100, NUM_TRAIN - 1])
def test_hold_out(size: int) -> None:
    images = np.arange(NUM_TRAIN * 2).astype(np.uint8).reshape(NUM_TRAIN, 2)
    split = Split(images, (np.arange(NUM_TRAIN) % 251).astype(np.uint8))
    rest, held_out = hold_out(split, size, seed=0)
    assert (len(rest), len(held_out)) == (NUM_TRAIN - size, size)
    together = sorted([*rest.labels, *held_out.labels])
    assert together == sorted(split.labels)
    assert (hold_out(split, size, seed=0)[1].labels == held_out.labels).all()
    if size == 100:
        assert (hold_out(split, size, seed=1)[1].labels != held_out.labels).any()
    if size == 0:
        assert (rest.images == split.images).all()


def test_a_split_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    split = decode_split(IMAGES, LABELS, num_classes=10)
    for name in ("one.npz", "two.npz"):
        save_split(tmp_path / name, split)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    loaded = load_split(tmp_path / "one.npz")
    assert (loaded.images == split.images).all()
    assert (loaded.labels == split.labels).all()


def test_damaged_splits(tmp_path: Path) -> None:
    path = tmp_path / "split.npz"
    good = Split(np.zeros((3, 4), np.uint8), np.zeros(3, np.uint8))
    save_split(path, good)
    whole = path.read_bytes()
    for damaged in (b"", b"junk", whole[:-30], whole[: len(whole) // 2], whole[:99] + whole[100:]):
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            load_split(path)
    for wrong in (
        Split(good.images, good.labels[:2]),
        Split(good.images.astype(np.float32), good.labels),
        Split(good.images.T, good.labels),
        Split(good.images.ravel(), good.labels),
    ):
        save_split(path, wrong)
        with pytest.raises(DamagedError):
            load_split(path)


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "split.npz"
    good = decode_split(IMAGES, LABELS, num_classes=10)
    save_split(path, good)
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
            assert split.images.tolist() == good.images.tolist()
            assert split.labels.tolist() == good.labels.tolist()


def test_without_dvc_lock_there_is_nothing_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "train")
    save_split(Path("split.npz"), decode_split(IMAGES, LABELS, num_classes=10))
    assert len(load_split(Path("split.npz"))) == 3
