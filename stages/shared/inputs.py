"""Notice when params, code or data change while a stage runs.

DVC reads params.yaml and the deps again when a command has ended. Without a check, an edit during
a run would be recorded in dvc.lock together with the results of the old values.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from stages import CODE_STATS, file_stats
from stages.shared.dvc_lock import digest, recorded_digests
from stages.shared.errors import UserError
from stages.shared.params import read_sections


class Inputs:
    """The params and deps that dvc.yaml lists for this stage, as they are now.

    Create it before the stage reads anything. `resumes` is whether a rerun with the old values
    continues this run. Raises `UserError` if params.yaml is malformed, or if code was edited while
    Python imported it.
    """

    def __init__(self, *, resumes: bool = False) -> None:
        self.resumes = resumes
        self.is_noted = False  # whether `note_change` has printed its line
        definition = stage_definition()
        keys_of_files = param_files(definition)
        self.params = [Params(path, keys) for path, keys in keys_of_files if is_yaml(path)]
        # Params in another format, such as JSON, are compared by content, as code is.
        paths = [path for path, _ in keys_of_files if not is_yaml(path)]
        paths += map(Path, definition.get("deps", []))
        paths = [path for path in paths if path.exists()]
        recorded = recorded_digests(paths)
        self.files = [File(path, recorded.get(path)) for path in paths]
        for file in self.files:
            if CODE_STATS.get(file.path.resolve(), file.stats) != file.stats:
                raise UserError(f"{file.path}: changed while the stage started; rerun")

    def change(self) -> str | None:
        """Describe the first param or dep that has changed; None if all are as they were."""
        changes = [params.change() for params in self.params]
        changes += [file.change() for file in self.files]
        return next(filter(None, changes), None)

    def check_unchanged(self) -> None:
        """Raise `UserError` if a param or a dep has changed, so that DVC records nothing."""
        if change := self.change():
            raise UserError(f"{change} during the run, so nothing is recorded; {self.remedy()}")

    def note_change(self) -> None:
        """Print a note if a param or a dep has changed, once per run.

        Raises `UserError` at once if it is data, because the network may have seen some of it.
        """
        if any(file.is_data and file.change() for file in self.files):
            self.check_unchanged()
        change = None if self.is_noted else self.change()
        if change:
            print(f"note: {change}; at its end, {self.remedy()}", flush=True)
            self.is_noted = True

    def remedy(self) -> str:
        """Return the remedy for a change."""
        if self.resumes:
            return "set it back and rerun to finish this run at once, or rerun for the new value"
        return "rerun for the new value"


class Params:
    """Params of a YAML file as they are now. `keys` selects sections or full names; None: all."""

    def __init__(self, path: Path, keys: list[str] | None) -> None:
        self.path, self.keys = path, keys
        self.values = self.read()

    def read(self) -> dict[str, Any]:
        """Return the values by their full names."""
        values = flatten(read_sections(self.path))
        if self.keys is None:
            return values
        prefixes = tuple(f"{key}." for key in self.keys)
        return {name: value for name, value in values.items() if f"{name}.".startswith(prefixes)}

    def change(self) -> str | None:
        """Describe the first param that has changed; None if there is none."""
        try:
            now = self.read()
        except UserError as error:  # such as half an edit
            return f"{error} (changed)"
        for name in self.values | now:
            old, new = (str(values.get(name, "missing")) for values in (self.values, now))
            if old != new:
                return f"{self.path}: {name} changed from {old:.60} to {new:.60}"
        return None


class File:
    """A file or a folder as it is now. `recorded` is its MD5 if DVC has recorded it: it is data."""

    def __init__(self, path: Path, recorded: str | None) -> None:
        self.path = path
        self.is_data = recorded is not None
        self.md5 = recorded or digest(path)
        self.stats = stats_of(path)

    def change(self) -> str | None:
        """Describe the change; None if the content is the same.

        Data are hashed only if a size, a time or an inode differs. Code is small.
        """
        try:
            stats = stats_of(self.path)
            if self.is_data and stats == self.stats:
                return None
            md5 = digest(self.path)
        except FileNotFoundError:
            stats, md5 = None, "missing"
        if md5 == self.md5:
            self.stats = stats  # such a file is not hashed again at the next check
            return None
        return f"{self.path}: its MD5 changed from {self.md5:.8} to {md5:.8}"


def stats_of(path: Path) -> Any:
    """Return size, time of the last change and inode of a file, or of each file in a folder."""
    if path.is_dir():
        return {file: stats_of(file) for file in path.rglob("*") if file.is_file()}
    return file_stats(path)


def stage_name() -> str:
    """Return the name of the running stage in dvc.yaml, also if DVC did not start it."""
    if address := os.environ.get("DVC_STAGE"):  # such as dvc.yaml:train@3 for a matrix
        return address.rpartition(":")[2].partition("@")[0]
    spec = sys.modules["__main__"].__spec__
    return spec.name.rpartition(".")[2] if spec else ""


def stage_definition() -> dict[str, Any]:
    """Return the entry of the running stage in dvc.yaml; nothing if there is none."""
    with suppress(AttributeError, LookupError, OSError, TypeError, ValueError):
        entry = msgspec.yaml.decode(Path("dvc.yaml").read_bytes())["stages"][stage_name()]
        return dict(entry.get("do", entry))  # "do" holds the template of a foreach stage
    return {}


def param_files(definition: dict[str, Any]) -> list[tuple[Path, list[str] | None]]:
    """Return the files with params of a stage, and which params; None stands for all."""
    files: list[tuple[Path, list[str] | None]] = []
    for entry in definition.get("params", []):
        keys_of = entry if isinstance(entry, dict) else {"params.yaml": [entry]}
        files += [(Path(name), keys) for name, keys in keys_of.items()]
    return files


def is_yaml(path: Path) -> bool:
    """Return whether a file has the name of a YAML file."""
    return path.suffix in (".yaml", ".yml")


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their full names, such as train.seed."""
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.")
    return flat
