"""`tools.provenance`, in clones with a history."""

import json
import sys
from pathlib import Path

import pytest

from stages.shared.dvc_lock import digest, parse_lock
from stages.shared.errors import UserError
from tests.conftest import Project, commit
from tools.provenance import main, origins_in

MODEL = "data/model.safetensors"


def head(project: Project) -> str:
    return project.run("git", "show", "--no-patch", "--format=%h %cs %s", "--abbrev=10").strip()


def output_of(project: Project, file: str, ok: bool = True) -> list[str]:
    return project.run("python", "-m", "tools.provenance", file, ok=ok).splitlines()


def expected_output(project: Project, stage: str, commits: list[str]) -> list[str]:
    """Return the lines that the tool should print about the first output of a stage."""
    recorded = parse_lock(project.read("dvc.lock"))[stage]
    sections = recorded.params.get("params.yaml", {})
    params = [(name, *item) for name in sections for item in project.params()[name].items()]
    inputs = [dep.path for dep in recorded.deps if not dep.path.startswith("stages/")]
    return [
        f"{recorded.outs[0].path}, made by {stage}",
        *(f"  commit  {line}" for line in commits),
        *(f"  param   {section}.{key}: {value}" for section, key, value in params),
        *(f"  from    {path} {digest(project.root / path)}" for path in inputs),
    ]


def test_copy_of_an_output_is_found_in_all_branches(finished: Project, tmp_path: Path) -> None:
    copy = tmp_path / "copy.bin"
    copy.write_bytes(finished.read(MODEL))
    first = expected_output(finished, "train", [head(finished)])
    assert len(first) > 10
    assert output_of(finished, str(copy)) == first
    finished.run("git", "switch", "--quiet", "--create", "other")
    finished.set(momentum=0.5)
    finished.repro()
    (line,) = output_of(finished, MODEL, ok=False)
    assert line.startswith(f"error: {MODEL}: unknown")
    assert "commit dvc.lock" in line
    commit(finished, "Another experiment")
    second = expected_output(finished, "train", [head(finished)])
    assert output_of(finished, MODEL) == second
    assert second != first
    finished.run("git", "switch", "--quiet", "main")
    assert output_of(finished, MODEL) == second
    assert output_of(finished, str(copy)) == first


def test_commits_with_the_same_origin_are_listed_together(finished: Project) -> None:
    """Only a comment in the code of a stage changed, so its inputs are the same."""
    early = head(finished)
    with (finished.root / "stages/evaluate.py").open("a") as file:
        file.write("# a comment\n")
    finished.repro()
    commit(finished, "Add a comment")
    # DVC keeps such a commit when an experiment is applied.
    applied = finished.run("git", "commit-tree", "HEAD^{tree}", "-p", "HEAD~1", "-m", "exp-apply")
    finished.run("git", "update-ref", "refs/exps/apply/stash", applied.strip())
    expected = expected_output(finished, "evaluate", [head(finished), early])
    assert output_of(finished, "metrics/accuracy.json") == expected


def test_other_files_are_unknown(finished: Project) -> None:
    (line,) = output_of(finished, "README.md", ok=False)
    assert line.startswith("error: README.md: unknown")
    (line,) = output_of(finished, "missing", ok=False)
    assert line.startswith("error: missing: not found; name an output")


def test_folder_outside_git_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    Path("file").touch()
    with pytest.raises(UserError, match=r"^\.git: .*not a git repository.*; .*`git init`$"):
        main(Path("file"))


def test_missing_git_is_one_line(finished: Project) -> None:
    project = finished.with_variables(PATH=str(Path(sys.executable).parent))
    line = project.run("python", "-m", "tools.provenance", MODEL, ok=False)
    assert line == "error: git: not found; install Git\n"


def test_origin_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("any")
    md5 = digest(tmp_path)
    stage = {"params": {"other.yaml": {"flat.key": 3}}, "outs": [{"path": "raw", "md5": md5}]}
    lock = json.dumps({"schema": "2.0", "stages": {"fetch": stage}})
    assert origins_in(lock, md5) == [("raw, made by fetch", "  param   flat.key: 3")]
