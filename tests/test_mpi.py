"""Training in several processes: bitwise identical to one, and how it ends.

This needs Open MPI (docs/scale.md): `.venv/bin/python -m pytest -m mpi`.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages.shared.data import save_split
from tests.conftest import STAGES, Project, commit, small_split
from tests.test_distributed import SLURM

pytestmark = pytest.mark.mpi


@pytest.fixture
def project(finished: Project) -> Project:
    """Return `finished` with params that leave 3 of 8 shards of the last minibatch empty."""
    assert shutil.which("mpirun", path=finished.environment()["PATH"]), "docs/scale.md installs it"
    if os.geteuid() == 0:
        finished.extra |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if "dropout" in finished.params()["model"]:  # the network of a copy may have none
        finished.set("model", dropout=0.2)
    finished.set("augment", shift=1, elastic=0.5)
    finished.set(batch_size=33, shards=8, num_epochs=3, momentum=0.5)
    (finished.root / "metrics/history.csv").unlink()
    return finished


def mpirun(count: int) -> str:
    return f"mpirun --timeout 60 --oversubscribe -np {count}"


COMMAND = shlex.split(STAGES["train"]["cmd"])


def train(project: Project, launcher: str = "", prefix: tuple[str, ...] = ()) -> str:
    """Run the stage as DVC does, with this launcher. Return its output."""
    return project.with_variables(LAUNCHER=launcher).run(*prefix, *COMMAND)


def outputs(project: Project) -> dict[str, bytes]:
    names = ("data/model.safetensors", "metrics/history.csv", "metrics/training.json")
    return {name: project.read(name) for name in names}


def processes(project: Project) -> list[psutil.Process]:
    """Return the processes that run in the project's folder or beside it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(project.root.parent):
                found.append(process)
    return found


def check_no_process_is_left(project: Project) -> None:
    psutil.wait_procs(processes(project), timeout=10)
    assert not processes(project)


def check_failure(
    project: Project, launcher: str, pattern: str, prefix: tuple[str, ...] = ()
) -> str:
    """Check that training ends in one line of ours that begins with `pattern`. Return its output.

    It must change no result and leave no process.
    """
    before = project.results()
    printed = project.with_variables(LAUNCHER=launcher).run(*prefix, *COMMAND, ok=False)
    # mpirun can leave a line without its end, and zeros.
    lines = re.findall(r"^[ \0]*((?:error:|interrupted|Traceback).*)", printed, re.MULTILINE)
    assert len(lines) == 1, printed
    assert re.match(pattern, lines[0]), lines[0]
    check_no_process_is_left(project)
    assert project.results() == before
    return printed


@contextmanager
def long_training(
    project: Project, launcher: str, prefix: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Start to train, and wait for the first checkpoint. After the block, check that it failed.

    mpirun can exit with 0 after a host has died. DVC then fails because there is no model.
    """
    model = project.root / "data/model.safetensors"
    model.unlink()
    with subprocess.Popen(
        [*prefix, *COMMAND],
        cwd=project.root,
        env=project.with_variables(LAUNCHER=launcher).environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        while not (project.root / "data/checkpoint.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.01)
        yield process
        printed, _ = process.communicate()
    assert process.returncode or not model.exists(), printed
    assert "Traceback" not in printed


def test_any_number_of_processes_gives_the_same_bits(project: Project) -> None:
    def state() -> Any:
        status = project.run("git", "status", "--porcelain")
        return outputs(project), project.read("dvc.lock"), status

    project.repro()
    expected = state()
    for count in (2, 4):
        several = project.with_variables(LAUNCHER=mpirun(count))
        printed = several.run("dvc", "repro", "--force", "--single-item", "train")
        assert len(re.findall(r"^epoch .* examples/s$", printed, re.MULTILINE)) == 3
        assert state() == expected
    project.set(shards=4)
    train(project, mpirun(2))
    assert outputs(project) != expected[0]


def test_running_statistics_have_the_same_bits(project: Project) -> None:
    """Each process normalises its shards, so all of them must update the running statistics."""
    project.append(
        "stages/model.py",
        "\n\nPlainModel = Model\n\n\nclass Model(PlainModel):\n"
        "    def __init__(self, params, image_shape, num_classes):\n"
        "        super().__init__(params, image_shape, num_classes)\n"
        "        self.norm = nn.BatchNorm(num_classes)\n\n"
        "    def __call__(self, pixels):\n"
        "        return self.norm(super().__call__(pixels))\n",
    )
    project.set(batch_size=64)  # BatchNorm rejects a shard of one example
    train(project)
    expected = outputs(project)
    for count in (2, 4):
        train(project, mpirun(count))
        assert outputs(project) == expected


@pytest.mark.parametrize(
    ("killed_rank", "count", "then"), [(0, 2, ""), (1, 2, mpirun(4)), (3, 4, mpirun(2))]
)
def test_killed_rank_ends_all_and_the_rerun_resumes(
    killed_rank: int, count: int, then: str, project: Project
) -> None:
    project.set(num_epochs=40)
    train(project)
    expected = outputs(project)
    with long_training(project, mpirun(count)):
        for process in processes(project):
            if process.environ().get("PMIX_RANK") == str(killed_rank):
                process.kill()
    check_no_process_is_left(project)
    assert re.search(r"^resumed after epoch \d+,", train(project, then), re.MULTILINE)
    assert outputs(project) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interruption_ends_all_processes(number: signal.Signals, project: Project) -> None:
    """Send Ctrl-C, which reaches the whole process group, or a signal to the launcher alone."""
    project.set(num_epochs=200)
    with long_training(project, mpirun(2)) as process:
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    check_no_process_is_left(project)
    assert (project.root / "data/checkpoint.safetensors").exists()


FIRST_OF_TWO = {**SLURM, "SLURM_PROCID": "0"}  # as srun without --mpi=pmix sets them
# Params, launcher and other environment variables, and the line that training ends with.
MISTAKES = [
    ({"shards": 2}, mpirun(4), {}, r"params\.yaml: train\.shards is 2, .* 4 .*at most 2"),
    ({}, mpirun(3), {}, r"params\.yaml: train\.shards is 8, .* 3 processes .*at most 8"),
    ({"momentum": 2}, mpirun(2), {}, r"params\.yaml: train\.momentum is 2, must be .*0\.999"),
    ({}, mpirun(2), {"MLX_MPI_LIBNAME": "no.so"}, "LAUNCHER: .*Open MPI.*docs/scale.md"),
    ({}, "nice", FIRST_OF_TWO, "LAUNCHER: started 2 processes, .* 1 .*mpirun .* --mpi=pmix"),
]


@pytest.mark.parametrize(("params", "launcher", "variables", "pattern"), MISTAKES)
def test_mistake_is_one_line(
    params: dict[str, Any],
    launcher: str,
    variables: dict[str, str],
    pattern: str,
    project: Project,
) -> None:
    project.set(**params)
    check_failure(project.with_variables(**variables), launcher, f"error: {pattern}")


@pytest.mark.parametrize("launcher", ["no-such-program -n 2", "true"])
def test_missing_or_failing_launcher_fails_the_stage(launcher: str, project: Project) -> None:
    """`true` ends before training, as mpirun can after a host has died."""
    printed = project.with_variables(LAUNCHER=launcher).run("dvc", "repro", ok=False)
    assert "no-such-program" in printed or "does not exist" in printed
    assert "Traceback" not in printed
    assert project.run("git", "diff", "--name-only", "dvc.lock") == ""


@pytest.mark.skipif(not shutil.which("srun"), reason="needs Slurm, with a node of two cores")
def test_slurm_gives_the_same_bits(project: Project) -> None:
    srun = "srun -n 2 --mpi=pmix --kill-on-bad-exit"
    train(project)
    expected = outputs(project)
    train(project, srun)
    assert outputs(project) == expected
    project.set(shards=1)
    check_failure(project, srun, r"error: params\.yaml: train\.shards is 1, .* 2 processes")


METRICS = "stages/shared/metrics.py"


def test_diverging_training_ends_all_processes(project: Project) -> None:
    project.append(METRICS, "normalize = lambda images: images.astype(mx.float32) * mx.nan\n")
    pattern = r"error: params\.yaml: .*epoch 1 \(.*loss nan.*\); .*train\.learning_rate"
    check_failure(project, mpirun(2), pattern)


def test_file_that_rank_0_cannot_write_ends_all_processes(project: Project) -> None:
    (project.root / "metrics/history.csv").mkdir()
    check_failure(project, mpirun(2), r"error: metrics/history\.csv: .*Is a directory")


@pytest.mark.parametrize("rank", [0, 1])
def test_bug_in_one_rank_ends_all_with_its_traceback(rank: int, project: Project) -> None:
    code = "import os, time\n\n\ndef predict(*_):\n    os.environ['PMIX_RANK'] == '{}' and 1 / 0\n"
    project.append(METRICS, f"{code.format(rank)}    time.sleep(60)\n")
    printed = check_failure(project, mpirun(2), r"Traceback \(most recent call last\):")
    assert printed.count("ZeroDivisionError: division by zero") == 1


@pytest.fixture
def second(project: Project) -> Project:
    """Clone the project to a folder that stands for a second host. `launcher` uses both."""
    commit(project, "Train on shards")
    second = project.clone(project.root.parent / "second")
    for path in project.root.glob("data/*.npz"):
        shutil.copy(path, second.root / "data")
    return second


def launcher(second: Project, prepare: str = "") -> str:
    """Return a launcher of two processes, one of them in `second`, after the command `prepare`."""
    script = second.root.parent / "host"
    script.write_text(f'#!/bin/sh\n[ $PMIX_RANK = 1 ] && {prepare} cd {second.root}\nexec "$@"\n')
    script.chmod(0o755)
    return f"{mpirun(2)} {script}"


def delete_data(project: Project) -> None:
    (project.root / "data/train.npz").unlink()


def edit_code(project: Project) -> None:
    project.append("stages/model.py", "# a comment\n")


def edit_params(project: Project) -> None:
    project.set(seed=9)


def swap_data(project: Project) -> None:
    save_split(project.root / "data/train.npz", small_split(500, seed=9))


def write_checkpoint(project: Project) -> None:
    (project.root / "data/checkpoint.safetensors").write_bytes(b"")


HOST = re.escape(os.uname().nodename)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (delete_data, rf"data/train\.npz: not found; .*\(on {HOST}\)"),
        (edit_code, rf"LAUNCHER: code or packages differs .*{HOST}.*{HOST}; .*rerun"),
        (edit_params, r"LAUNCHER: params\.yaml differs"),
        (swap_data, "LAUNCHER: the data differs"),
        (write_checkpoint, "LAUNCHER: the checkpoint differs"),
    ],
)
def test_difference_between_hosts_is_one_line(
    change: Callable[[Project], None], pattern: str, project: Project, second: Project
) -> None:
    change(second)
    check_failure(project, launcher(second), f"error: {pattern}")


def test_other_kernels_on_another_host_are_one_line(project: Project, second: Project) -> None:
    """Let the second process use the kernels of another kind of CPU."""
    other_kernels = launcher(second, "export OPENBLAS_CORETYPE=Nehalem &&")
    check_failure(project, other_kernels, "error: LAUNCHER: OpenBLAS differs")
