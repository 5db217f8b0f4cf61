"""The errors that end a stage in one line, for they are for its user to fix."""

from pathlib import Path


class UserError(Exception):
    """A mistake that the user can fix, told in one line: file or key, problem, remedy."""


class DamagedError(UserError):
    """A file that has other bytes than it should."""

    def __init__(self, path: Path, problem: str | Exception) -> None:
        line = " ".join(str(problem).split())
        super().__init__(f"{path}: damaged ({line:.200}); fix it with `make verify`")
