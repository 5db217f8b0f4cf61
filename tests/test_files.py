"""That a file appears whole or not at all, whatever stands in the way."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from stages.errors import UserError
from stages.files import Split, atomic_write, save_csv, save_split
from stages.model import save_arrays

WRITERS: list[Callable[[Path], None]] = [
    lambda path: save_split(path, Split(np.zeros((99, 99), np.uint8), np.zeros(99, np.uint8))),
    lambda path: save_csv(path, ["number"], [[number] for number in range(9999)]),
    lambda path: save_arrays(path, {"weight": mx.zeros((99, 99))}, {}),
]


@contextmanager
def full_disk() -> Iterator[None]:
    """Let this process write no more than 1000 bytes of a file, its own log included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", WRITERS)
def test_a_failing_write_leaves_what_was_there(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with (
        full_disk(),
        pytest.raises(UserError, match=rf"^{path}: cannot be written \(File too large\); mend"),
    ):
        write(path)
    assert path.read_text() == "before"
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


def test_a_bug_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"half")
        1 / 0  # noqa: B018
    assert path.read_text() == "before"
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


def test_the_folder_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    with pytest.raises(UserError, match=r"cannot be written \(.*\); mend that"):
        save_csv(tmp_path / "file" / "below", ["number"], [])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\); mend that"):
        save_csv(tmp_path / "file", ["number"], [])
    tmp_path.chmod(0o700)
