"""The Makefile, with the packages of the environment that runs the tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, Project, clone


def make_rule(folder: Path, recipe: str) -> None:
    """Write a Makefile with a target `rule` that uses the variables of ours."""
    (folder / "rules.mk").write_text(f"include {ROOT}/Makefile\nrule:\n\t{recipe}\n")


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_time_in_the_future_does_not_install_at_each_call(tmp_path: Path) -> None:
    """The clock of another machine, or of an archive, can be ahead."""
    prerequisite = tmp_path / "requirements.txt"
    prerequisite.touch()
    os.utime(prerequisite, (2**32, 2**32))
    rule = "stamp: requirements.txt\n\t@echo install\n\t$(TOUCH)\n"
    (tmp_path / "rules.mk").write_text(f"include {ROOT}/Makefile\n{rule}")
    project = Project(tmp_path, {})
    assert "install\n" in project.run("make", "-f", "rules.mk", "stamp")
    assert "install" not in project.run("make", "-f", "rules.mk", "stamp")
    os.utime(prerequisite, (2**32 + 9, 2**32 + 9))
    assert "install\n" in project.run("make", "-f", "rules.mk", "stamp")


def test_folder_name_is_not_executed(tmp_path: Path) -> None:
    """A shell would run what is in $(...) or backquotes."""
    folder = tmp_path / 'a $(touch one) `touch two`; "b'
    folder.mkdir()
    make_rule(folder, "@$(IN_VENV) env")
    printed = Project(folder, {}).run("make", "-f", "rules.mk", "rule")
    assert f"PATH={folder}/.venv/bin:" in printed
    assert sorted(path.name for path in folder.iterdir()) == ["rules.mk"]


def test_clone_of_git_for_windows_has_the_same_bytes(finished: Project, tmp_path: Path) -> None:
    options = ("-c", "core.autocrlf=true")
    finished.run("git", *options, "clone", "--quiet", ".", str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone", {})
    clone.run("git", "config", "core.autocrlf", "true")
    for name in ("dvc.lock", ".ci/run", "params.yaml"):
        assert clone.read(name) == finished.read(name)
    assert clone.run("git", "status", "--porcelain") == ""


def locked(name: str) -> dict[str, str]:
    """Return the packages of a lock: the version, the marker and the hashes of each."""
    lock = (ROOT / name).read_text()
    return dict(re.findall(r"^([\w-]+)==(.*\n(?: .*\n)+)", lock, re.MULTILINE))


def test_locks_agree_in_all_but_the_backend_of_mlx() -> None:
    cpu, cuda = locked("requirements.txt"), locked("requirements-cuda13.txt")
    common = cpu.keys() & cuda.keys()
    assert {name: cpu[name] for name in common} == {name: cuda[name] for name in common}
    assert cpu.keys() - common == {"mlx-cpu"}
    added = cuda.keys() - common
    assert "mlx-cuda-13" in added
    for name in added:
        assert name == "mlx-cuda-13" or name.startswith("nvidia-")
        version, _, marker = cuda[name].partition(" ")
        assert name.startswith("nvidia-") or cuda["mlx"].startswith(f"{version} ")
        assert "sys_platform == 'linux'" in marker
        assert "darwin" not in marker
        assert {"x86_64", "aarch64"} <= set(re.findall(r"platform_machine == '(\w+)'", marker))


# It stands for Python. `-m venv` makes an environment in which uv prints its arguments.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *"import platform"*) echo Linux x86_64 ;;
  *"-m venv"*)
    mkdir -p .venv/bin
    rm -rf .venv/*
    [ -z "$VENV_FAILS" ] || exit 1
    mkdir .venv/bin
    cp "$0" .venv/bin/python
    printf '#!/bin/sh\necho uv "$@"\n' > .venv/bin/uv
    chmod +x .venv/bin/uv ;;
esac
"""


@pytest.fixture
def fake(tmp_path: Path) -> Project:
    """Return a folder in which the Makefile installs nothing, but prints what it would."""
    for name in ("Makefile", "requirements.txt", "requirements-cuda13.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".ci").mkdir()
    for name in ("uv.txt", "requirements.txt"):
        (tmp_path / ".ci" / name).touch()
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    return Project(tmp_path, {"PYTHON": "./python", "GPU": "0"})  # as some users set it


def installed(project: Project, *arguments: str, ok: bool | None = True) -> list[str]:
    """Run make. Return the locks that it installed."""
    printed = project.run("make", *arguments, ok=ok)
    return re.findall(r"^uv .* -r (\S+)$", printed, re.MULTILINE)


def test_every_target_keeps_the_chosen_build(fake: Project) -> None:
    assert installed(fake, "setup") == ["requirements.txt"]
    assert installed(fake, "setup", "GPU=cuda13") == ["requirements-cuda13.txt"]
    assert installed(fake, "setup") == installed(fake, "setup", "GPU=cuda13") == []
    os.utime(fake.root / "requirements-cuda13.txt", (2**32, 2**32))  # as after `git pull`
    locks = ["requirements-cuda13.txt", ".ci/requirements.txt"]
    assert installed(fake, ".venv/lint-installed") == locks
    assert installed(fake, "setup", "GPU=") == ["requirements.txt"]
    assert installed(fake, "setup") == installed(fake, "setup", "GPU=") == []


@pytest.mark.parametrize("before", ["cuda13", ""])
def test_next_target_finishes_a_switch_that_failed(before: str, fake: Project) -> None:
    installed(fake, "setup", f"GPU={before}")
    failing = fake.with_variables(VENV_FAILS="1")  # as on Debian without python3-venv
    assert installed(failing, "setup", "GPU=cuda13", "--always-make", ok=False) == []
    assert installed(fake, ".venv/installed") == ["requirements-cuda13.txt"]


@pytest.mark.parametrize("value", ["cuda12", "%", "cuda13 cuda13"])
def test_unknown_build_is_one_line(value: str, fake: Project) -> None:
    line = fake.run("make", "setup", f"GPU={value}", ok=False)
    assert re.fullmatch(rf".*GPU is {value}, .*`make setup GPU=`.*\n", line)
    assert not (fake.root / ".venv").exists()


def test_copy_without_hidden_files_is_one_line(tmp_path: Path) -> None:
    project = clone(tmp_path)
    for hidden in (".ci", ".dvc"):
        shutil.rmtree(tmp_path / hidden)
    printed = project.run("make", "repro", ok=False)
    assert re.search(r"^error: \.ci/uv\.txt: not found; .*hidden", printed, re.MULTILINE)


@pytest.mark.parametrize("character", list(':"$`\\'))
def test_folder_name_that_python_cannot_use_is_one_line(character: str, tmp_path: Path) -> None:
    """Their shells would read such a character in the scripts of .venv."""
    project = clone(tmp_path / f"a{character}b")
    printed = project.run("make", f"PYTHON={sys.executable}", "repro", ok=False)
    (line,) = re.findall("^error: .*$", printed, re.MULTILINE)
    assert str(project.root) in line
    assert not (project.root / ".venv").exists()


INDEX = "https://index.test/"


@pytest.mark.parametrize(
    ("settings", "installer"),
    [
        ({"PIP_CONFIG_FILE": os.devnull}, "uv"),
        ({"PIP_CONFIG_FILE": os.devnull, "PIP_USER": "1"}, "uv"),
        ({"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": INDEX}, "pip"),
        ({"PIP_CONFIG_FILE": "pip.conf"}, "pip"),
    ],
)
def test_pip_installs_if_its_settings_name_a_source(
    settings: dict[str, str], installer: str, tmp_path: Path
) -> None:
    """uv does not read pip's settings, such as the index of a company."""
    write_script(tmp_path / ".venv/bin/uv", "echo uv")
    run_pip = f'[ "$3" = install ] && echo pip || {sys.executable} "$@"'
    write_script(tmp_path / ".venv/bin/python", run_pip)
    make_rule(tmp_path, "@$(INSTALL) -r requirements.txt")
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {INDEX}\n")
    empty = {name: "" for name in os.environ if name.startswith("PIP_")}
    project = Project(tmp_path, {**empty, **settings})
    assert project.run("make", "-f", "rules.mk", "rule") == f"{installer}\n"


def test_pip_installs_into_the_environment(tmp_path: Path) -> None:
    """PIP_USER=1 would install into the home folder, and pip refuses that in an environment."""
    (tmp_path / "none.txt").touch()
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    make_rule(tmp_path, f"@{venv}/bin/python $(PIP_INSTALL) --no-index -r none.txt")
    Project(tmp_path, {"PIP_USER": "1"}).run("make", "-f", "rules.mk", "rule")


def test_makefile_is_for_make_3_81() -> None:
    """macOS has this version. It ignores or misreads what is newer."""
    newer = re.compile(r"^\.ONESHELL|^\w+ *!=|::=|\$\(file |^undefine|--eval|&:", re.MULTILINE)
    assert not newer.search((ROOT / "Makefile").read_text())
    for path in (ROOT / "tests").rglob("*.py"):
        assert path == Path(__file__) or "--eval" not in path.read_text()


def test_scripts_are_for_bash_3_2() -> None:
    """macOS has this version."""
    newer = re.compile(
        r"declare -[Ang]|local -n|mapfile|readarray|coproc|wait -n|\|&|&>>|;;?&\s|\$\{\w+(\^|,|@)"
    )
    for script in (ROOT / ".ci/run", ROOT / ".ci/compare"):
        assert not newer.search(script.read_text())
        subprocess.run(["bash", "-n", script], check=True)


def test_ci_runs_every_platform_with_the_oldest_and_newest_python() -> None:
    (oldest, newest) = re.findall(r"\(3, (\d+)\)", (ROOT / "Makefile").read_text())
    pythons = {f"3.{oldest}", f"3.{int(newest) - 1}"}
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    jobs = workflow["jobs"]["ci"]["strategy"]["matrix"]["include"]
    for platform in ("macos", r"ubuntu(?!.*arm)", r"ubuntu.*arm"):
        matching = [job["python"] for job in jobs if re.match(platform, job["os"])]
        assert matching
        assert pythons == set(matching) or "arm" in platform
