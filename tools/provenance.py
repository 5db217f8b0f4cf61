"""Say where a file came from: the commits whose dvc.lock has it, by its digest.

The file is an output of the pipeline, or a copy of one under any name.
"""

import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stages.shared.cli import argument_parser, run
from stages.shared.dvc_lock import digest
from stages.shared.errors import UserError


class Origin(NamedTuple):
    """What made a file: an output of a stage, from params and other files."""

    path: str
    stage: str
    params: dict[str, Any]
    upstream: dict[str, str]  # the digests of what the stage read, but for code


def git(*arguments: str) -> str:
    """What Git prints. Raises `UserError` where there is no repository."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f".git: {' '.join(done.stderr.split()):.200}; run in a clone")
    return done.stdout


def mapping(text: str | bytes) -> dict[str, Any]:
    """The mapping that a YAML text holds; an empty one if it holds anything else."""
    try:
        found = yaml.load(text, yaml.CSafeLoader)
    except (ValueError, yaml.YAMLError):  # as after a conflict
        return {}
    return found if isinstance(found, dict) else {}


def stages_of(lock: str) -> dict[str, dict[str, Any]]:
    """The stages in the text of a dvc.lock; none if it is not whole."""
    stages: dict[str, dict[str, Any]] = mapping(lock).get("stages", {})
    return stages


def params_of(stage: dict[str, Any]) -> dict[str, Any]:
    """The params of a stage in a dvc.lock, by their full names."""
    found: dict[str, Any] = {}
    for sections in stage.get("params", {}).values():
        for section, values in sections.items():
            if isinstance(values, dict):
                found |= {f"{section}.{name}": value for name, value in values.items()}
            else:
                found[section] = values
    return found


def digests_of(parts: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The digests of deps or outs in a dvc.lock, by their paths."""
    return {part["path"]: part.get("md5", "") for part in parts}


def origins(lock: str, md5: str) -> Iterator[Origin]:
    """The outputs with this digest in the text of a dvc.lock."""
    for name, stage in stages_of(lock).items() if md5 in lock else ():
        deps = digests_of(stage.get("deps", ()))
        upstream = {path: md5 for path, md5 in deps.items() if not path.startswith("stages/")}
        for path, found in digests_of(stage.get("outs", ())).items():
            if found == md5:
                yield Origin(path, name, params_of(stage), upstream)


def history() -> Iterator[tuple[str, str]]:
    """The commits of all branches that changed dvc.lock, a line each, with it; the newest first."""
    all_but_dvcs_own = ("--exclude=refs/exps/apply/*", "--all")
    log = git("log", *all_but_dvcs_own, "--full-history", "--format=%H %cs %s", "--", "dvc.lock")
    for line in log.splitlines():
        commit, _, rest = line.partition(" ")
        if git("ls-tree", commit, "dvc.lock"):  # else it was deleted there
            yield f"{commit[:10]} {rest}", git("show", f"{commit}:dvc.lock")


def error_of(origin: Origin, commits: list[str]) -> Iterator[str]:
    """The lines about a file."""
    yield f"{origin.path}, made by {origin.stage}"
    yield from (f"  commit  {commit}" for commit in commits)
    yield from (f"  param   {name}: {value}" for name, value in origin.params.items())
    yield from (f"  from    {path} {md5}" for path, md5 in origin.upstream.items())


def main(file: Path) -> None:
    if not file.exists():
        raise UserError(f"{file}: not found; name an output of the pipeline or a copy of one")
    md5 = digest(file)
    found: list[tuple[Origin, list[str]]] = []
    for commit, lock in history():
        for origin in origins(lock, md5):
            known = [commits for other, commits in found if other == origin]
            if known:
                known[0].append(commit)
            else:
                found.append((origin, [commit]))
    if not found:
        raise UserError(f"{file}: unknown: made from uncommitted changes, or elsewhere")
    for origin, commits in found:
        print(*error_of(origin, commits), sep="\n")


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("file", metavar="FILE", type=Path)
    run(main, parser)
