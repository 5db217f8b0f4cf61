"""Files are written atomically, and unreadable or unwritable files give clear errors."""

import locale
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
def unchanged_file(folder: Path) -> Iterator[Path]:
    """Yield a file, alone in `folder`; assert afterwards that neither it nor the folder changed."""
    path = folder / "file"
    path.write_text("before")
    yield path
    assert path.read_text() == "before"
    assert list(folder.iterdir()) == [path]


@contextmanager
def full_disk() -> Iterator[None]:
    """Limit every file that this process writes to 1000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", WRITERS)
def test_full_disk_keeps_the_old_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    pattern = r"/file: .*\(File too large\); .*rerun"
    with unchanged_file(tmp_path) as path, full_disk(), pytest.raises(UserError, match=pattern):
        write(path)


def test_exception_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    with unchanged_file(tmp_path) as path, pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"half")
        raise KeyError


def test_symbolic_links_are_replaced_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("before")
    (tmp_path / ".file.part").symlink_to(target)
    (tmp_path / "file").symlink_to(target)
    save_json(tmp_path / "file", 1)
    assert target.read_text() == "before"
    assert (tmp_path / "file").read_text() == "1\n"
    assert not (tmp_path / "file").is_symlink()


def test_csv_format(tmp_path: Path) -> None:
    save_csv(tmp_path / "file", ("a", "b"), [(1, 0.123456789), (None, 'x"')])
    assert (tmp_path / "file").read_text() == 'a,b\n1,0.123457\n,"x"""\n'


def test_csv_is_utf8_in_any_locale(tmp_path: Path) -> None:
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        save_csv(tmp_path / "file", ("yés",), [])
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert (tmp_path / "file").read_bytes() == "yés\n".encode()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; tmp_path is open to its owner only."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        Path(folder).chmod(0o755)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Give up root's right to read and write everything, if this process runs as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_read_only_folder_gives_an_error(open_folder: Path) -> None:
    with unchanged_file(open_folder) as path:
        open_folder.chmod(0o555)
        with ordinary_user(), pytest.raises(UserError, match=r"/file: .*\(Permission denied\)"):
            save_csv(path, ["number"], [])


@pytest.mark.parametrize("read", [load_split, load_model])
def test_unreadable_file_is_not_called_damaged(
    read: Callable[[Path], object], open_folder: Path
) -> None:
    path = open_folder / "file"
    path.write_text("secret")
    path.chmod(0)
    with ordinary_user(), pytest.raises(PermissionError):  # stages.shared.cli prints it as one line
        read(path)
