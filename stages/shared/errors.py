"""Errors that the user can fix. `stages.shared.cli` prints them as one line."""

from pathlib import Path


def escape(text: str) -> str:
    """Return `text` with control characters and invalid Unicode escaped, to print it safely."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class UserError(Exception):
    """A mistake that the user can fix, as one line: file or key, problem, remedy."""


class DamagedError(UserError):
    """A file with damaged content. The error names `make repro` as the remedy."""

    def __init__(self, path: Path, problem: str | Exception) -> None:
        line = " ".join(str(problem).split())
        super().__init__(f"{path}: damaged ({line:.200}); repair it with `make repro`")
