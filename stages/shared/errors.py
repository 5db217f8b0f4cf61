"""Errors that the user can fix. `stages.shared.cli` prints them as one line."""

from pathlib import Path


class UserError(Exception):
    """A mistake that the user can fix, as one line: file or key, problem, remedy."""


class DamagedError(UserError):
    """A file whose content is not what it should be."""

    def __init__(self, path: Path, problem: str | Exception) -> None:
        line = " ".join(str(problem).split())
        super().__init__(f"{path}: damaged ({line:.200}); repair it with `make repro`")
