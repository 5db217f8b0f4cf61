"""That a file appears whole or not at all, whatever stands in the way."""

import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest

from stages.shared.data import load_split, save_split
from stages.shared.errors import UserError
from stages.shared.files import atomic_write, save_csv, save_json
from stages.shared.model_file import load_model, save_arrays
from tests.conftest import SMALL

WRITERS: list[Callable[[Path], None]] = [
    lambda path: save_split(path, SMALL["train"]),
    lambda path: save_csv(path, ["number"], [[number] for number in range(9999)]),
    lambda path: save_json(path, list(range(9999))),
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
    with full_disk(), pytest.raises(UserError) as error:
        write(path)
    assert str(error.value) == f"{path}: cannot be written (File too large); fix that and rerun"
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


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("before")
    (tmp_path / ".file.part").symlink_to(precious)
    (tmp_path / "file").symlink_to(precious)
    save_json(tmp_path / "file", 1)
    assert precious.read_text() == "before"
    assert (tmp_path / "file").read_text() == "1\n"
    assert not (tmp_path / "file").is_symlink()


def test_csv(tmp_path: Path) -> None:
    save_csv(tmp_path / "file", ("a", "b"), [(1, 0.123456789), (None, 'x"')])
    assert (tmp_path / "file").read_text() == 'a,b\n1,0.123457\n,"x"""\n'


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that anybody may enter, as only its owner may tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        Path(folder).chmod(0o755)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Be nobody for a while if this is root, who may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_read_only_folder(open_folder: Path) -> None:
    path = open_folder / "file"
    path.write_text("before")
    open_folder.chmod(0o555)
    with ordinary_user(), pytest.raises(UserError, match="Permission denied"):
        save_csv(path, ["number"], [])
    assert path.read_text() == "before"
    assert [left.name for left in open_folder.iterdir()] == ["file"]


@pytest.mark.parametrize("read", [load_split, load_model])
def test_a_file_that_may_not_be_read(read: Callable[[Path], object], open_folder: Path) -> None:
    path = open_folder / "file"
    path.write_text("secret")
    path.chmod(0)
    with ordinary_user(), pytest.raises(PermissionError):  # of which a stage makes one line
        read(path)
