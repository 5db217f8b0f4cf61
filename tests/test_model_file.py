"""A model file: it rebuilds the model, and no wrong byte of it goes unnoticed."""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from stages.model import Model, ModelParams
from stages.shared.data import Split
from stages.shared.errors import UserError
from stages.shared.model_file import Metadata, load_model, save_arrays, save_model
from stages.shared.params import read_params
from tests.conftest import ROOT, small_split
from tests.faults.hostile import JSON, damaged, refused

PARAMS = read_params("model", ModelParams, ROOT / "params.yaml")
METADATA = Metadata(PARAMS, (4, 5), ("a", "b"), "a form")
PIXELS = mx.random.uniform(shape=(2, 4, 5))


def logits(model: Model) -> mx.array:
    model.eval()
    return model(PIXELS)


@pytest.fixture(scope="module")
def saved(folder: Path) -> tuple[Model, Path]:
    model = METADATA.build()
    path = folder / "whole.safetensors"
    save_model(path, model, METADATA)
    return model, path


def test_a_model_file_rebuilds_the_model(saved: tuple[Model, Path]) -> None:
    model, path = saved
    loaded, metadata = load_model(path)
    assert metadata == METADATA
    assert mx.array_equal(logits(loaded), logits(model))


def test_it_holds_the_parameters_as_mlx_has_them(saved: tuple[Model, Path]) -> None:
    model, path = saved
    by_mlx: Any = mx.load(str(path), return_metadata=True)
    arrays, entries = by_mlx
    expected = dict(tree_flatten(model.parameters()))
    assert arrays.keys() == expected.keys()
    assert all(mx.array_equal(arrays[name], expected[name]) for name in arrays)
    assert json.loads(entries["params"]) == msgspec.to_builtins(PARAMS)
    assert json.loads(entries["image_shape"]) == [4, 5]
    assert json.loads(entries["class_names"]) == ["a", "b"]
    assert json.loads(entries["preprocessing"]) == "a form"
    again = METADATA.build()
    again.load_weights(str(path))
    assert mx.array_equal(logits(again), logits(model))


def rewrite(path: Path, source: Path, **changes: Any) -> None:
    """Write the model at `source` with other metadata to `path`, with a true digest."""
    loaded: Any = mx.load(str(source), return_metadata=True)
    arrays, entries = loaded
    kept = {key: json.loads(value) for key, value in entries.items() if key != "sha256"}
    save_arrays(path, arrays, {**kept, **changes})


def test_mistakes(saved: tuple[Model, Path], tmp_path: Path) -> None:
    _, whole = saved
    path = tmp_path / "model.safetensors"

    def message() -> str:
        with pytest.raises(UserError) as error:
            load_model(path)
        return str(error.value).replace(str(path), "FILE")

    assert message() == "FILE: not found; make it with `dvc repro`"
    path.write_bytes(b"junk")
    assert message() == (
        "FILE: damaged ([load] Failed to read from python stream); repair it with `make repro`"
    )
    mx.save_safetensors(str(path), {"weight": mx.zeros(3)})
    assert message() == (
        "FILE: damaged (its SHA-256 is not the one it names); repair it with `make repro`"
    )
    entry = {"dtype": "U8", "shape": [999], "data_offsets": [0, 999]}
    header = json.dumps({str(number): entry for number in range(99)}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(999))
    assert message() == "FILE: damaged (its arrays overlap); repair it with `make repro`"
    rewrite(path, whole, image_shape=[20])
    assert message().endswith(" - at `$.image_shape`); repair it with `make repro`")
    rewrite(path, whole, params={})
    assert message().endswith(" - at `$.params`); repair it with `make repro`")  # are missing
    save_arrays(path, {"other": mx.zeros(3)}, msgspec.to_builtins(METADATA))
    assert message().startswith("FILE: damaged (")


def test_data_of_another_kind_is_refused() -> None:
    METADATA.check_compatible(Path("same.npz"), small_split(4, (4, 5), ("a", "b")))
    for shape, names in (((5, 4), ("a", "b")), ((4, 5, 3), ("a", "b")), ((4, 5), ("b", "a"))):
        with pytest.raises(UserError) as error:
            METADATA.check_compatible(Path("other.npz"), small_split(4, shape, names))
        assert str(error.value) == (
            f"other.npz: has images {shape} and classes {', '.join(names)}, but the network is for"
            " (4, 5) and a, b; make the splits from one data set"
        )


def test_long_lists_of_classes_are_cut_short() -> None:
    names = tuple(f"{number} bottles of beer on the wall" for number in range(99))
    split = Split(np.zeros((0, 4, 5), np.uint8), np.zeros(0, np.uint8), names)
    with pytest.raises(UserError, match=r"classes 0 bottles.*, \.\.\. \(99\), but") as error:
        METADATA.check_compatible(Path("other.npz"), split)
    assert len(str(error.value)) < 300


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    """In the header and at both ends of the data, which is long."""
    path = tmp_path / "model.safetensors"
    model = METADATA.build()
    save_model(path, model, METADATA)
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(size + 20), *range(len(whole) - 20, len(whole))]
    for bit in (8 * place + bit for place in places for bit in range(8)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            loaded, metadata = load_model(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert metadata == METADATA
            assert mx.array_equal(logits(loaded), logits(model))


SHAPES = st.lists(st.integers(-1, 9) | st.integers(0, 2**40), max_size=4)
NAMES = st.lists(st.text(max_size=3), max_size=4)


@given(params=JSON, image_shape=SHAPES | JSON, class_names=NAMES | JSON, other=JSON)
@example(None, [2**31 - 1, 2**31 - 1], ["a", "b"], None)
@example(None, [4, 5], ["a"] * 256, None)
def test_any_metadata(
    folder: Path,
    saved: tuple[Model, Path],
    params: Any,
    image_shape: Any,
    class_names: Any,
    other: Any,
) -> None:
    path = folder / "model.safetensors"
    changes = {"image_shape": image_shape, "class_names": class_names}
    changes |= {"params": params} if params is not None else {}
    changes |= {"other": other} if other else {}
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
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    with refused():
        load_model(path)
        raise AssertionError("a model without a digest was loaded")


@given(data=st.data())
def test_damaged_bytes(folder: Path, saved: tuple[Model, Path], data: st.DataObject) -> None:
    path = folder / "damaged.safetensors"
    model, whole = saved
    path.write_bytes(data.draw(st.binary() | damaged(whole.read_bytes())))
    with refused():
        loaded, metadata = load_model(path)
        assert metadata == METADATA
        assert mx.array_equal(logits(loaded), logits(model))
