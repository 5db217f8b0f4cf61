from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from stages.errors import UserError
from stages.params import Choice, Range, read_params

GOOD = """\
fetch:
  dataset: mnist
train:
  hidden_dim: 32
  learning_rate: 0.1
  device: cpu
"""
RATE = "train.learning_rate"
DIM = "train.hidden_dim"


@dataclass(frozen=True)
class Params:
    hidden_dim: Annotated[int, Range(1, 8192)]
    learning_rate: Annotated[float, Range(1e-6, 100.0)]
    device: Annotated[str, Choice(("cpu", "gpu"))]


def read(text: str | bytes, folder: Path) -> Params:
    path = folder / "params.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_params("train", Params, path)


def test_good_params(tmp_path: Path) -> None:
    assert read(GOOD, tmp_path) == Params(32, 0.1, "cpu")


def test_whole_number_is_a_float(tmp_path: Path) -> None:
    rate = read(GOOD.replace("0.1", "1"), tmp_path).learning_rate
    assert (rate, type(rate)) == (1.0, float)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  hidden_dim: 32\n", "", f"{DIM} is missing; it must be a whole number from 1 to 8192"),
        ("hidden_dim:", "hiden_dim:", "train.hiden_dim is unknown; did you mean train.hidden_dim?"),
        (
            "device: cpu",
            "device: cpu\n  x: 1",
            "train.x is unknown; known: hidden_dim, learning",
        ),
        ("train:", "trian:", "trian is unknown; did you mean train?"),
        ("train:", "seed: 0\ntrain:", "seed is unknown; known: fetch, preprocess, train"),
        ("0.1", "1e-1", f"{RATE} is '1e-1', must be a number from 1e-06 to 100.0; write 0.1"),
        ("0.1", "'0.2'", f"{RATE} is '0.2', must be a number from 1e-06 to 100.0; write 0.2"),
        ("32", '"32"', f"{DIM} is '32', must be a whole number from 1 to 8192; write 32"),
        ("32", "32.0", f"{DIM} is 32.0, must be a whole number from 1 to 8192"),
        ("32", "true", f"{DIM} is True, must be a whole number from 1 to 8192"),
        ("32", "", f"{DIM} is None, must be a whole number from 1 to 8192"),
        ("32", "[32]", f"{DIM} is [32], must be a whole number from 1 to 8192"),
        ("32", "0", f"{DIM} is 0, must be a whole number from 1 to 8192"),
        ("32", "8193", f"{DIM} is 8193, must be a whole number from 1 to 8192"),
        ("32", "040", "line 4: 040 is no plain decimal number"),
        ("32", "1:30", "line 4: 1:30 is no plain decimal number"),
        ("0.1", "-0.1", f"{RATE} is -0.1, must be a number from 1e-06 to 100.0"),
        ("0.1", ".nan", f"{RATE} is nan, must be a number from 1e-06 to 100.0"),
        ("0.1", ".inf", f"{RATE} is inf, must be a number from 1e-06 to 100.0"),
        ("0.1", "1" + 400 * "0", f"{RATE} is 1000000000"),
        ("cpu", "tpu", "train.device is 'tpu', must be cpu or gpu"),
        (
            "cpu",
            "cpu\n  device: gpu",
            "train.device stands twice, in lines 6 and 7; keep one of th",
        ),
        ("train:", "fetch: {}\ntrain:", "fetch stands twice, in lines 1 and 3; keep one of them"),
        ("32", "{a: 1, a: 2}", f"{DIM} is {{'a': 2}}, must be"),
        ("32", "[", "line 6: expected"),
        ("32", "\x00", "unacceptable character"),
        (GOOD, "", "the file must hold fetch, preprocess, train"),
        (GOOD, "- 1", "the file must hold fetch, preprocess, train"),
        (GOOD, "train: 3", "train must hold hidden_dim, learning_rate, device"),
        (GOOD, "fetch: {}", f"{DIM} is missing; it must be a whole number from 1 to 8192"),
    ],
)
def test_bad_params(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in GOOD
    with pytest.raises(UserError) as caught:
        read(GOOD.replace(old, new, 1), tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'params.yaml'}: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: not found; run in the folder"):
        read_params("train", Params, tmp_path / "nothing.yaml")
