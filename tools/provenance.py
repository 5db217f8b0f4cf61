"""Show where a file came from: the commits whose dvc.lock records it, its params and its inputs.

The file is an output of the pipeline, or a copy of one under any name.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from stages.shared.cli import argument_parser, run
from stages.shared.dvc_lock import Stage, digest, stages_of
from stages.shared.errors import UserError, escape


def git(*arguments: str) -> str:
    """Return the output of a Git command. Raise `UserError` if it fails."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, encoding="utf-8", errors="surrogateescape"
        )
    except FileNotFoundError:
        raise UserError("git: not found; install Git") from None
    if done.returncode:
        problem = " ".join(done.stderr.split())
        remedy = "unset GIT_DIR" if "GIT_DIR" in os.environ else "run in a clone, or `git init`"
        if "safe.directory" in problem:  # of another user; Git itself names the remedy
            raise UserError(f".git: {problem:.600}")
        raise UserError(f".git: {problem:.200}; {remedy}")
    return done.stdout


def history() -> Iterator[tuple[str, str]]:
    """Yield each commit that changed dvc.lock, on any branch, the newest first.

    A commit is a line with its hash, date and subject, and the text of its dvc.lock.
    """
    without_applied_experiments = "--exclude=refs/exps/apply/*"
    log = ["log", without_applied_experiments, "--all", "--full-history", "--format=%H %cs %s"]
    for line in git(*log, "--", "dvc.lock").splitlines():
        commit, _, rest = line.partition(" ")
        if git("ls-tree", commit, "dvc.lock"):  # the commit did not delete it
            yield f"{commit[:10]} {rest}", git("show", f"{commit}:./dvc.lock")


def format_origin(output: str, name: str, stage: Stage) -> tuple[str, ...]:
    """Format one origin as printable lines: an output, then the params and inputs of its stage."""
    inputs = [dep for dep in stage.deps if not dep.path.startswith("stages/")]  # data, not code
    return (
        f"{output}, made by {name}",
        *(f"  param   {param}: {value}" for param, value in stage.named_params().items()),
        *(f"  from    {dep.path} {dep.md5}" for dep in inputs),
    )


def origins_in(lock: str, md5: str) -> list[tuple[str, ...]]:
    """Return the origins, as lines, of a file with this digest in the text of a dvc.lock."""
    stages = stages_of(lock) if md5 in lock else {}  # to parse every dvc.lock would be slow
    return [
        format_origin(out.path, name, stage)
        for name, stage in stages.items()
        for out in stage.outs
        if out.md5 == md5
    ]


def main(file: Path) -> None:
    if not file.exists():
        raise UserError(f"{file}: not found; name an output of the pipeline or a copy of one")
    md5 = digest(file)
    found: dict[tuple[str, ...], list[str]] = {}  # the commits per origin
    for commit, lock in history():
        for origin in origins_in(lock, md5):
            found.setdefault(origin, []).append(commit)
    if not found:
        problem = "unknown, because no commit's dvc.lock records it"
        raise UserError(f"{file}: {problem}; commit dvc.lock if this clone made it")
    for (output, *details), commits in found.items():
        lines = [output, *(f"  commit  {commit}" for commit in commits), *details]
        print(*map(escape, lines), sep="\n")


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("file", metavar="FILE", type=Path)
    run(main, parser)
