from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from stages.params import Choice, Range, read_params

GOOD = """\
fetch:
  dataset: mnist
train:
  hidden_dim: 32
  learning_rate: 0.1
  device: cpu
"""


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


@pytest.mark.parametrize("text", ["1e-05", "1E-5", "1.0e-5", "0.1e-4", "+1e-05", "0.00001"])
def test_numbers_as_dvc_writes_them(text: str, tmp_path: Path) -> None:
    assert read(GOOD.replace("0.1", text), tmp_path).learning_rate == 1e-5
