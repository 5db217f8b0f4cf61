"""Where a file came from, asked in a clone with a history."""

from pathlib import Path

import pytest
import yaml

from stages.shared.errors import UserError
from stages.shared.dvc_lock import digest
from tests.conftest import ROOT, Project, commit
from tools.provenance import Origin, main, origins, params_of, stages_of


def head(project: Project) -> str:
    return project.run("git", "show", "--no-patch", "--format=%h %cs %s", "--abbrev=10").strip()


def asked(project: Project, file: str, ok: bool = True) -> list[str]:
    """What the tool says about a file of any name."""
    return project.run("python", "-m", "tools.provenance", file, ok=ok).splitlines()


def described(project: Project, stage: str, commits: list[str]) -> list[str]:
    """What it should say about the first output of a stage."""
    entry = stages_of(project.read("dvc.lock").decode())[stage]
    params = project.params()
    values = {
        f"{name}.{key}": value
        for name in entry.get("params", {}).get("params.yaml", ())
        for key, value in params[name].items()
    }
    upstream = [dep for dep in entry["deps"] if not dep["path"].startswith("stages/")]
    return [
        f"{entry['outs'][0]['path']}, made by {stage}",
        *(f"  commit  {line}" for line in commits),
        *(f"  param   {name}: {value}" for name, value in values.items()),
        *(f"  from    {dep['path']} {digest(project.root / dep['path'])}" for dep in upstream),
    ]


def test_a_copy_that_somebody_mailed(finished: Project, tmp_path: Path) -> None:
    """It is found under any name, after other experiments, and on another branch."""
    mailed = tmp_path / "mailed.bin"
    mailed.write_bytes(finished.read("data/model.safetensors"))
    first = described(finished, "train", [head(finished)])
    assert len(first) > 10
    assert asked(finished, str(mailed)) == first
    finished.run("git", "switch", "--quiet", "--create", "other")
    finished.set(momentum=0.5)
    finished.repro()
    unknown = "error: data/model.safetensors: unknown: made from uncommitted changes, or elsewhere"
    assert asked(finished, "data/model.safetensors", ok=False) == [unknown]
    commit(finished, "Another experiment")
    second = described(finished, "train", [head(finished)])
    assert asked(finished, "data/model.safetensors") == second
    assert second != first
    finished.run("git", "switch", "--quiet", "main")
    assert asked(finished, "data/model.safetensors") == second
    assert asked(finished, str(mailed)) == first


def test_each_commit_that_has_it_and_each_way_it_was_made(finished: Project) -> None:
    """The figures are the same where a comment in a stage alone has changed."""
    early = head(finished)
    with (finished.root / "stages/evaluate.py").open("a") as file:
        file.write("# a comment\n")
    finished.repro()
    commit(finished, "Say more")
    kept = finished.run("git", "commit-tree", "HEAD^{tree}", "-p", "HEAD~1", "-m", "dvc-exp-apply")
    finished.run("git", "update-ref", "refs/exps/apply/stash", kept.strip())  # as DVC does
    found = described(finished, "evaluate", [head(finished), early])
    assert asked(finished, "metrics/accuracy.json") == found


def test_what_is_no_output(finished: Project) -> None:
    printed = asked(finished, "README.md", ok=False)
    assert printed == ["error: README.md: unknown: made from uncommitted changes, or elsewhere"]
    assert asked(finished, "no", ok=False) == [
        "error: no: not found; name an output of the pipeline or a copy of one"
    ]


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^\.git: .*not a git repository.*; run in a clone$"):
        main(Path("file"))


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/file").write_text("any")
    md5 = digest(tmp_path / "raw")
    stage = {"params": {"other.yaml": {"flat.key": 3}}, "outs": [{"path": "raw", "md5": md5}]}
    lock = yaml.safe_dump({"schema": "2.0", "stages": {"fetch": stage}})
    assert list(origins(lock, md5)) == [Origin("raw", "fetch", {"flat.key": 3}, {})]


def test_a_lock_that_is_not_whole() -> None:
    for text in ("", "- 3", "<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> other\n"):
        assert stages_of(text) == {}


def test_the_params_of_the_committed_lock_have_their_full_names() -> None:
    lock = (ROOT / "dvc.lock").read_text()
    names = {name for stage in stages_of(lock).values() for name in params_of(stage)}
    assert all("." in name for name in names)
