"""Model files: they rebuild the model, and damage is always noticed."""

import json
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stages.model import Model, ModelParams
from stages.shared.errors import UserError
from stages.shared.model_file import (
    Metadata,
    flat_parameters,
    load_arrays,
    load_model,
    save_arrays,
    save_model,
)
from stages.shared.params import read_params
from tests.conftest import ROOT, small_split
from tests.faults.hostile import JSON, damaged, refused

PARAMS = read_params("model", ModelParams, ROOT / "params.yaml")
SHAPE = (16, 20)  # large enough for a few poolings
METADATA = Metadata(PARAMS, SHAPE, ("a", "b"))
PIXELS = mx.random.uniform(shape=(2, *SHAPE))


def same_model(model: Model, other: Model) -> bool:
    model.eval()
    other.eval()
    return bool(mx.array_equal(model(PIXELS), other(PIXELS)))


@pytest.fixture(scope="module")
def saved(folder: Path) -> tuple[Model, Path]:
    """A model and its file."""
    model = METADATA.build()
    path = folder / "whole.safetensors"
    save_model(path, model, METADATA)
    return model, path


def test_model_file_rebuilds_the_model(saved: tuple[Model, Path]) -> None:
    model, path = saved
    loaded, metadata = load_model(path)
    assert metadata == METADATA
    assert same_model(loaded, model)


def test_mlx_reads_parameters_and_metadata(saved: tuple[Model, Path]) -> None:
    model, path = saved
    other = METADATA.build()
    other.load_weights(str(path))
    assert same_model(other, model)
    loaded: Any = mx.load(str(path), return_metadata=True)
    _, entries = loaded
    assert entries.pop("sha256")
    assert {key: json.loads(value) for key, value in entries.items()} == {
        "params": msgspec.to_builtins(PARAMS),
        "image_shape": list(SHAPE),
        "class_names": ["a", "b"],
        "preprocessing": "",
    }


def test_model_of_a_gpu_names_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    metadata = msgspec.structs.replace(METADATA, backend=("mlx 1", "Device(gpu, 0)"))
    save_model(path, metadata.build(), metadata)
    assert load_model(path)[1] == metadata


def rewrite(path: Path, source: Path, **changes: Any) -> None:
    """Write the model at `source` with changed metadata and the digest that belongs to them."""
    arrays, entries = load_arrays(source)
    save_arrays(path, arrays, {**entries, **changes})


def write_safetensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_wrong_file_is_an_error_with_its_reason(saved: tuple[Model, Path], tmp_path: Path) -> None:
    _, whole = saved
    path = tmp_path / "model.safetensors"

    def check_error(pattern: str) -> None:
        with pytest.raises(UserError) as error:
            load_model(path)
        assert re.fullmatch(f"{path}: {pattern}", str(error.value))

    check_error("not found; .*`dvc repro`")
    path.write_bytes(b"junk")
    check_error(r"damaged \(.*header.*\); .*`make repro`")
    mx.save_safetensors(str(path), {"weight": mx.zeros(3)})
    check_error(r"damaged \(SHA-256 mismatch: expected '', got '[0-9a-f]{64}'\); .*`make repro`")
    entry = {"dtype": "U8", "shape": [999], "data_offsets": [0, 999]}
    write_safetensors(path, {str(number): entry for number in range(99)}, bytes(999))
    check_error(r"damaged \(arrays overlap: 98,901 bytes in a file of [67],\d{3}\); .*`make repro`")
    rewrite(path, whole, image_shape=[20])
    check_error(r"does not fit .*code \(.*`\$\.image_shape`\); .*`dvc repro`")
    rewrite(path, whole, params={})
    check_error(r"does not fit .*code \(.*missing.*`\$\.params`\); .*`dvc repro`")
    rewrite(path, whole, image_form="mnist")  # of an older version
    check_error(r"does not fit .*code \(.*image_form.*\); .*`dvc repro`")
    save_arrays(path, {"other": mx.zeros(3)}, msgspec.to_builtins(METADATA))
    check_error(r"does not fit .*code \(.*other.*\); .*`dvc repro`")


def test_split_of_other_images_or_classes_is_refused() -> None:
    METADATA.check_compatible(Path("same.npz"), small_split(4, SHAPE, ("a", "b")))
    many = tuple(f"{number} bottles of beer on the wall" for number in range(99))
    for shape, names, shown in (
        ((5, 4), ("a", "b"), "a, b"),
        ((4, 5, 3), ("a", "b"), "a, b"),
        (SHAPE, ("b", "a"), "b, a"),
        (SHAPE, many, "0 bottles of beer"),
    ):
        with pytest.raises(UserError, match=r"^other\.npz: .*one data set") as error:
            METADATA.check_compatible(Path("other.npz"), small_split(4, shape, names))
        assert all(part in str(error.value) for part in (f"{shape}", shown, f"{SHAPE}", "a, b"))
        assert len(str(error.value)) < 300


def check_damaged(path: Path, data: bytes, model: Model) -> None:
    """Load a model file with damaged bytes, which is an error, or gives the model."""
    path.write_bytes(data)
    with refused():
        loaded, metadata = load_model(path)
        assert metadata == METADATA
        assert same_model(loaded, model)


def test_any_flipped_bit_is_an_error_or_harmless(saved: tuple[Model, Path], tmp_path: Path) -> None:
    """Flip each bit of the header, and of both ends of the arrays, which are long."""
    model, path = saved
    whole = path.read_bytes()
    header_size = 8 + int.from_bytes(whole[:8], "little")
    for index in (*range(header_size + 20), *range(len(whole) - 20, len(whole))):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[index] ^= 1 << bit
            check_damaged(tmp_path / "model.safetensors", bytes(flipped), model)


SHAPES = st.lists(st.integers(-1, 9) | st.integers(0, 2**40), max_size=4)
NAMES = st.lists(st.text(max_size=3), max_size=4)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"class_names": ["a", "a"]}, "2 class names"),
        ({"class_names": ["a", "b\x1b"]}, r"b\\x1b.*rename"),
        ({"class_names": ["a", "</script><script>"]}, "script.*rename"),
        ({"image_shape": [4, 5, 3, 2]}, "image_shape"),
    ],
)
def test_metadata_that_no_tool_can_use(
    changes: dict[str, Any], problem: str, saved: tuple[Model, Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    rewrite(path, saved[1], **changes)
    with pytest.raises(UserError, match=f"^{path}: .*{problem}.*`dvc repro`"):
        load_model(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    model = METADATA.build()
    arrays = flat_parameters(model)
    name = max(arrays)
    arrays[name] = mx.full(arrays[name].shape, value)
    path = tmp_path / "model.safetensors"
    save_arrays(path, arrays, msgspec.to_builtins(METADATA))
    with pytest.raises(UserError, match=f"^{path}: {re.escape(name)} .*not finite.*`dvc repro`"):
        load_model(path)


def test_other_preprocessing_is_refused() -> None:
    split = replace(small_split(4, SHAPE, ("a", "b")), preprocessing="mnist")
    with pytest.raises(UserError, match=r"^test\.npz: preprocessing is 'mnist', .* ''"):
        METADATA.check_compatible(Path("test.npz"), split)


@given(
    st.fixed_dictionaries(
        {"image_shape": SHAPES | JSON, "class_names": NAMES | JSON},
        optional={"params": JSON, "other": JSON},
    )
)
@example({"image_shape": [2**31 - 1, 2**31 - 1], "class_names": ["a", "b"]})
@example({"image_shape": list(SHAPE), "class_names": ["a"] * 256})
def test_any_metadata(folder: Path, saved: tuple[Model, Path], changes: dict[str, Any]) -> None:
    path = folder / "model.safetensors"
    rewrite(path, saved[1], **changes)
    with refused():
        _, metadata = load_model(path)
        assert len(metadata.class_names) == 2
        assert metadata.params == PARAMS


TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BOOL", "F16", "C64", "F99"]),
        "shape": st.lists(st.integers(-2, 9) | st.integers(-(2**65), 2**65), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 20) | st.integers(0, 2**65), max_size=3),
    }
)


@given(header=st.dictionaries(st.text(max_size=3), TENSOR | JSON, max_size=3), data=st.binary())
@example({str(n): {"dtype": "U8", "shape": [99], "data_offsets": [0, 99]} for n in range(99)}, b"")
@example({"a": {"dtype": "U8", "shape": [-1, -1], "data_offsets": [0, 1]}}, b"1")
def test_any_header(folder: Path, header: dict[str, Any], data: bytes) -> None:
    path = folder / "header.safetensors"
    write_safetensors(path, header, data)
    with refused():
        load_model(path)
        raise AssertionError("a model without a digest was loaded")


@given(data=st.data())
def test_damaged_bytes(folder: Path, saved: tuple[Model, Path], data: st.DataObject) -> None:
    model, path = saved
    check_damaged(folder / "damaged", data.draw(st.binary() | damaged(path.read_bytes())), model)
