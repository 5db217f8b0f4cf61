"""Training in several processes: bitwise identical to one, and how it ends.

The tests with several processes need Open MPI (docs/scale.md): `.venv/bin/python -m pytest -m mpi`.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import psutil
import pytest
from mlx.utils import tree_flatten, tree_map

from stages.shared.data import save_split
from stages.shared.distributed import (
    RANK_AND_SIZE,
    Ranks,
    Shards,
    first_difference,
    first_error,
    rank_and_size,
)
from stages.train import loss_fn
from tests.conftest import STAGES, Project, commit, small_split

PIXELS = mx.array(np.random.default_rng(0).normal(size=(70, 9)).astype(np.float32))
LABELS = mx.array(np.random.default_rng(1).integers(0, 3, 70))


def equal(one: Any, other: Any) -> bool:
    pairs: Any = zip(tree_flatten(one), tree_flatten(other), strict=True)
    return all(mx.array_equal(a, b) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("count", [70, 4, 3, 1])
def test_shards_are_added_as_a_tree(count: int) -> None:
    """70 examples are split into 18, 18, 18 and 16, and 3 examples into 1, 1, 1 and 0."""
    model = nn.Linear(9, 3)
    pixels, labels = PIXELS[:count], LABELS[:count]
    shards = Shards(4, Ranks())
    shards.seed(0)
    found = shards.value_and_grad(model, loss_fn)(model, pixels, labels)

    def weighted_loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> Any:
        return loss_fn(model, x, y) * (len(y) / count)

    terms = []
    for part in np.array_split(np.arange(4 * -(-count // 4)), 4):
        index = mx.array(part[part < count])
        if index.size:
            term = nn.value_and_grad(model, weighted_loss_fn)(model, pixels[index], labels[index])
            terms.append(term)
        else:
            terms.append(tree_map(mx.zeros_like, terms[0]))
    left, right = tree_map(mx.add, *terms[:2]), tree_map(mx.add, *terms[2:])
    assert equal(found, tree_map(mx.add, left, right))
    if count == 70:
        in_sequence = tree_map(mx.add, tree_map(mx.add, left, terms[2]), terms[3])
        assert not equal(found, in_sequence)


def test_shards_compute_the_mean_over_the_minibatch() -> None:
    model = nn.Linear(9, 3)
    shards = Shards(8, Ranks())
    loss, grads = shards.value_and_grad(model, loss_fn)(model, PIXELS, LABELS)
    expected_loss, expected_grads = nn.value_and_grad(model, loss_fn)(model, PIXELS, LABELS)
    assert mx.allclose(loss, expected_loss)
    for name, grad in grads.items():
        assert mx.allclose(grad, expected_grads[name], atol=1e-6)


def test_each_shard_of_each_step_has_its_own_random_numbers() -> None:
    model = nn.Linear(9, 3)

    def sample(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        samples.append(mx.random.uniform().item())
        return loss_fn(model, x, y)

    shards = Shards(4, Ranks())
    step = shards.value_and_grad(model, sample)
    runs = []
    for seed in (0, 0, 1):
        samples: list[Any] = []
        shards.seed(seed)
        for _ in range(3):
            step(model, PIXELS, LABELS)
        assert len(set(samples)) == len(samples) == 3 * 4
        runs.append(samples)
    assert runs[0] == runs[1]
    assert not set(runs[0]) & set(runs[2])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"LAUNCHER": "mpirun -np 4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
            (3, 4),
        ),
        ({"LAUNCHER": "srun -n 2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),
        ({"LAUNCHER": "nice"}, (0, 1)),
        ({"LAUNCHER": "", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, (0, 1)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (0, 1)),  # `srun --pty bash`
    ],
)
def test_several_processes_take_a_launcher(
    environment: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for names in RANK_AND_SIZE:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("LAUNCHER", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank_and_size() == expected


def test_first_error_names_its_host_unless_all_have_it() -> None:
    good, bad = {"host": "a", "code": "1"}, {"host": "b", "error": "file: missing; make it"}
    assert first_error([good, good]) is None
    assert first_error([good, bad]) == "file: missing; make it (on b)"
    assert first_error([bad, bad]) == "file: missing; make it"


def test_first_difference_names_the_fact_and_both_hosts() -> None:
    one, two = {"host": "a", "code": "1", "data": "2"}, {"host": "b", "code": "1", "data": "3"}
    assert first_difference([one, {**one, "host": "b"}]) is None
    line = first_difference([one, two])
    assert line
    assert re.search(r"data differs .*\ba\b.*\bb\b.*; .*rerun", line)


@pytest.fixture
def project(finished: Project) -> Project:
    """One whose last minibatch leaves 3 of 8 shards empty."""
    assert shutil.which("mpirun", path=finished.environment()["PATH"]), "docs/scale.md installs it"
    if os.geteuid() == 0:
        finished.extra |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if "dropout" in finished.params()["model"]:  # the user's network may have none
        finished.set("model", dropout=0.2)
    finished.set("augment", shift=1, elastic=0.5)
    finished.set(batch_size=33, shards=8, num_epochs=3, momentum=0.5)
    (finished.root / "metrics/history.csv").unlink()
    return finished


def mpirun(count: int) -> str:
    return f"mpirun --timeout 60 --oversubscribe -np {count}"


COMMAND = shlex.split(STAGES["train"]["cmd"])


def train(project: Project, launcher: str, ok: bool = True, **extra: str) -> str:
    """Run the stage as dvc.yaml does, with a launcher; return what is printed."""
    extra = {**project.extra, "LAUNCHER": launcher, **extra}
    return Project(project.root, extra).run(*COMMAND, ok=ok)


def bits(project: Project) -> dict[str, bytes]:
    names = ("data/model.safetensors", "metrics/history.csv", "metrics/training.json")
    return {name: project.read(name) for name in names}


def processes(project: Project) -> list[psutil.Process]:
    """Those that run in its folder or beside it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(project.root.parent):
                found.append(process)
    return found


def check_no_process_is_left(project: Project) -> None:
    psutil.wait_procs(processes(project), timeout=10)
    assert not processes(project)


def check_end(project: Project, printed: str, pattern: str) -> None:
    """Training ended in one line of ours, which matches `pattern`, and no process is left."""
    # mpirun can leave a line without its end, and zeros.
    ours = re.findall(r"^[ \0]*((?:error:|interrupted|Traceback).*)", printed, re.MULTILINE)
    assert len(ours) == 1, printed
    assert re.match(pattern, ours[0]), ours[0]
    check_no_process_is_left(project)


@pytest.mark.mpi
def test_any_number_of_processes_gives_the_same_bits(project: Project) -> None:
    project.repro()
    expected = bits(project), project.read("dvc.lock"), project.run("git", "status", "--porcelain")
    for count in (2, 4):
        printed = Project(project.root, {**project.extra, "LAUNCHER": mpirun(count)}).run(
            "dvc", "repro", "--force", "--single-item", "train"
        )
        assert len(re.findall(r"^epoch .* examples/s$", printed, re.MULTILINE)) == 3
        found = bits(project), project.read("dvc.lock"), project.run("git", "status", "--porcelain")
        assert found == expected
    project.set(shards=4)
    train(project, mpirun(2))
    assert bits(project) != expected[0]


@contextmanager
def long_training(project: Project, count: int) -> Iterator[subprocess.Popen[str]]:
    """Train in so many processes, and wait until that is on its way."""
    with subprocess.Popen(
        COMMAND,
        cwd=project.root,
        env={**project.environment(), "LAUNCHER": mpirun(count)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        while not (project.root / "data/checkpoint.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.01)
        yield process


@pytest.mark.mpi
@pytest.mark.parametrize(("victim", "count", "then"), [(0, 2, 1), (1, 2, 4), (3, 4, 2)])
def test_killed_rank_ends_all_and_the_rerun_resumes(
    victim: int, count: int, then: int, project: Project
) -> None:
    project.set(num_epochs=40)
    train(project, "")
    expected = bits(project)
    with long_training(project, count) as process:
        for found in processes(project):
            if found.environ().get("PMIX_RANK") == str(victim):
                found.kill()
        printed, _ = process.communicate()
    assert process.returncode
    check_no_process_is_left(project)
    printed = train(project, mpirun(then) if then > 1 else "")
    assert re.search(r"^resumed after epoch \d+,", printed, re.MULTILINE)
    assert bits(project) == expected


@pytest.mark.mpi
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interruption_ends_all_processes(sign: signal.Signals, project: Project) -> None:
    """By Ctrl-C, which reaches the whole process group, or of the launcher alone."""
    project.set(num_epochs=200)
    with long_training(project, 2) as process:
        if sign == signal.SIGINT:
            os.killpg(process.pid, sign)
        else:
            process.send_signal(sign)
        printed, _ = process.communicate()
    assert "Traceback" not in printed
    check_no_process_is_left(project)
    assert (project.root / "data/checkpoint.safetensors").exists()


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("params", "launcher", "extra", "pattern"),
    [
        (
            {"shards": 2},
            mpirun(4),
            {},
            r"params\.yaml: train\.shards is 2, .* 4 .*at most 2",
        ),
        ({}, mpirun(3), {}, r"params\.yaml: train\.shards is 8, .* 3 processes .*at most 8"),
        ({"momentum": 2}, mpirun(2), {}, r"params\.yaml: train\.momentum is 2, must be .*0\.999"),
        ({}, mpirun(2), {"MLX_MPI_LIBNAME": "nowhere.so"}, "LAUNCHER: .*Open MPI.*docs/scale.md"),
        (
            {},
            "nice",
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},  # srun without --mpi=pmix
            "LAUNCHER: started 2 processes, .* 1 .*mpirun .* srun --mpi=pmix",
        ),
    ],
)
def test_mistake_is_one_line(
    params: dict[str, Any], launcher: str, extra: dict[str, str], pattern: str, project: Project
) -> None:
    project.set(**params)
    before = project.results()
    printed = train(project, launcher, ok=False, **extra)
    check_end(project, printed, f"error: {pattern}")
    assert project.results() == before


@pytest.mark.mpi
@pytest.mark.parametrize("launcher", ["no-such-program -n 2", "true"])
def test_failing_launcher_fails_the_stage(launcher: str, project: Project) -> None:
    """It is missing, or it ends early, as mpirun can after a host has died."""
    failing = Project(project.root, {**project.extra, "LAUNCHER": launcher})
    printed = failing.run("dvc", "repro", ok=False)
    assert "no-such-program" in printed or "does not exist" in printed
    assert "Traceback" not in printed
    assert project.run("git", "diff", "--name-only", "dvc.lock") == ""


@pytest.mark.mpi
@pytest.mark.skipif(not shutil.which("srun"), reason="needs Slurm, with a node of two cores")
def test_slurm(project: Project) -> None:
    srun = "srun -n 2 --mpi=pmix --kill-on-bad-exit"
    train(project, "")
    expected = bits(project)
    train(project, srun)
    assert bits(project) == expected
    project.set(shards=1)
    pattern = r"error: params\.yaml: train\.shards is 1, .* 2 processes"
    check_end(project, train(project, srun, ok=False), pattern)


@pytest.mark.mpi
def test_divergence_ends_all(project: Project) -> None:
    with (project.root / "stages/shared/metrics.py").open("a") as file:
        file.write("normalize = lambda images: images.astype(mx.float32) * mx.nan\n")
    pattern = r"error: params\.yaml: .*epoch 1 \(loss nan\); .*train\.learning_rate"
    check_end(project, train(project, mpirun(2), ok=False), pattern)


@pytest.mark.mpi
def test_file_that_rank_0_cannot_write_ends_all(project: Project) -> None:
    (project.root / "metrics/history.csv").mkdir()
    pattern = r"error: metrics/history\.csv: .*Is a directory"
    check_end(project, train(project, mpirun(2), ok=False), pattern)


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_bug_in_one_rank_ends_all_with_its_traceback(rank: int, project: Project) -> None:
    bug = "import os, time\n\n\ndef predict(*_):\n    os.environ['PMIX_RANK'] == '{}' and 1 / 0\n"
    with (project.root / "stages/shared/metrics.py").open("a") as file:
        file.write(f"{bug.format(rank)}    time.sleep(60)\n")
    printed = train(project, mpirun(2), ok=False)
    assert printed.count("ZeroDivisionError: division by zero") == 1
    check_end(project, printed, r"Traceback \(most recent call last\):")


@dataclass
class Hosts:
    """Two folders that stand for two hosts. The launcher runs one process in each."""

    first: Project
    second: Project
    launcher: str


@pytest.fixture
def hosts(project: Project) -> Hosts:
    commit(project, "Train long")
    second = project.clone(project.root.parent / "second")
    for path in project.root.glob("data/*.npz"):
        shutil.copy(path, second.root / "data")
    script = project.root.parent / "host"
    script.write_text(
        f'#!/bin/sh\n[ $PMIX_RANK = 1 ] && cd {second.root}\nexec "$@"\n',
    )
    script.chmod(0o755)
    return Hosts(project, second, f"{mpirun(2)} {script}")


def edit_code(project: Project) -> None:
    with (project.root / "stages/model.py").open("a") as file:
        file.write("# a comment\n")


def swap_data(project: Project) -> None:
    save_split(project.root / "data/train.npz", small_split(500, seed=9))


HOST = re.escape(os.uname().nodename)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            lambda project: (project.root / "data/train.npz").unlink(),
            rf"error: data/train\.npz: not found; .*\(on {HOST}\)",
        ),
        (edit_code, rf"error: LAUNCHER: code or packages differs .*{HOST}.*{HOST}; .*rerun"),
        (lambda project: project.set(seed=9), r"error: LAUNCHER: params\.yaml differs"),
        (swap_data, "error: LAUNCHER: the data differs"),
        (
            lambda project: (project.root / "data/checkpoint.safetensors").write_bytes(b""),
            "error: LAUNCHER: the checkpoint differs",
        ),
    ],
)
def test_difference_between_hosts_is_one_line(
    change: Callable[[Project], object], pattern: str, hosts: Hosts
) -> None:
    change(hosts.second)
    before = hosts.first.results()
    printed = train(hosts.first, hosts.launcher, ok=False)
    check_end(hosts.first, printed, pattern)
    assert hosts.first.results() == before


@pytest.mark.mpi
def test_other_kernels_on_another_host_are_one_line(hosts: Hosts) -> None:
    """As another kind of CPU would use."""
    script = hosts.first.root.parent / "host"
    script.write_text(
        script.read_text().replace("&& cd", "&& export OPENBLAS_CORETYPE=Nehalem && cd")
    )
    pattern = "error: LAUNCHER: OpenBLAS differs"
    check_end(hosts.first, train(hosts.first, hosts.launcher, ok=False), pattern)


@pytest.mark.mpi
def test_only_the_first_host_gets_results(hosts: Hosts) -> None:
    before = hosts.second.results()
    train(hosts.first, hosts.launcher)
    assert hosts.second.results() == before
    results = bits(hosts.first)
    train(hosts.first, "")
    assert bits(hosts.first) == results
