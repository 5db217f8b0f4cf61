"""Hostile input: each file must give the right value or one line, with little memory."""

import io
import resource
import struct
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from stages.shared.errors import UserError

MEMORY = 20_000_000  # bytes that a reader may use for these small files


@contextmanager
def refused(error_class: type[Exception] = UserError) -> Iterator[None]:
    """Check that the block succeeds, or raises an error of one line, with little memory."""
    before = peak_memory()
    try:
        yield
    except error_class as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 1000
    assert peak_memory() - before < MEMORY


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw a copy of `whole` with a few changes of a few bytes each."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = start + draw(st.integers(0, 8))
        data[start:end] = draw(st.binary(max_size=8))
    return bytes(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=9,
)


def archive(**members: bytes) -> bytes:
    """Return an uncompressed zip archive of .npy files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def npy(header: object, data: bytes) -> bytes:
    """Return an .npy file with any header."""
    text = repr(header).encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text) % 2**16) + text + data


class Payload:
    """An object whose pickle creates the folder `executed` when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path("executed"),)
