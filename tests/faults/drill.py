"""Kill `dvc repro` at random moments, damage its files, fill its disk, and check the results.

Usage: python -m tests.faults.drill [KILLS]. The default of 200 kills takes about 10 minutes.
"""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import cycle, islice, product
from pathlib import Path

import psutil
from tqdm import tqdm

from tests.conftest import STAGES, Project, clone_with_small_data, commit, finish
from tests.faults import damage, disk

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
VICTIMS = ("all", "DVC", "the stage")
SITUATIONS = ("cold", "changed", "changed back", "dvc exp run")
OWN_FILE = "notes/todo.txt"
CASES = [
    (situation, victim, sent)
    for situation, victim, sent in product(SITUATIONS, VICTIMS, SIGNALS)
    if (situation, victim) != ("changed back", "the stage")  # DVC takes it from its cache
]
WORKERS = 2  # projects at the same time
MAX_ATTEMPTS = 50  # to send a signal before the run ends


def prepare(project: Project, situation: str, seed: int) -> list[str]:
    """Bring the project into a situation. Return the command to kill in it."""
    if situation == "cold":
        return ["dvc", "repro", "--force"]
    if situation == "dvc exp run":
        return ["dvc", "exp", "run", "--set-param", f"train.seed={seed}"]
    project.set(seed=seed)
    if situation == "changed back":
        project.repro()
        project.run("git", "checkout", "--quiet", "params.yaml")
    return ["dvc", "repro"]


def running_processes(group: int) -> Iterator[psutil.Process]:
    """Yield the processes of a process group that still run."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def run_and_kill(
    project: Project, command: list[str], victim: str, sent: signal.Signals, seconds: float
) -> tuple[bool, str]:
    """Run a command and send a signal to `victim` after `seconds`.

    Return whether the signal was sent, and the output. It is not sent if the command has ended,
    or if the stage is the victim and none runs.
    """
    with tempfile.TemporaryFile("w+") as log:
        run = subprocess.Popen(
            command,
            cwd=project.root,
            env=project.environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with suppress(subprocess.TimeoutExpired):
            run.wait(seconds)
        stages = [process.pid for process in running_processes(run.pid) if process.pid != run.pid]
        killed = run.returncode is None and (victim != "the stage" or bool(stages))
        if killed and victim == "all":
            os.killpg(run.pid, sent)
        elif killed:
            os.kill(run.pid if victim == "DVC" else stages[-1], sent)
        run.wait(60)
        while list(running_processes(run.pid)):  # a stage continues when only DVC is killed
            time.sleep(0.01)
        log.seek(0)
        return killed, log.read()


def clean_up(project: Project) -> bool:
    """Clean up after a kill as in docs/reliability.md. Return whether Git's lock was left."""
    lock = project.root / ".git/index.lock"
    was_left = lock.exists()
    lock.unlink(missing_ok=True)
    project.run("git", "reset", "--quiet")  # a killed `dvc exp run` may have staged its params
    project.run("git", "checkout", "--quiet", "params.yaml")
    return was_left


def check_kills(project: Project, kills: int, seed: int) -> Counter[str]:
    """Kill as many runs of `project`, which has finished one, and check the results after each.

    Return what was killed and repaired, with counts. Raise `AssertionError` for a lost or wrong
    result.
    """
    before = project.results()
    rng = random.Random(seed)
    start = time.monotonic()
    project.run("dvc", "repro", "--force")
    duration = time.monotonic() - start
    counts: Counter[str] = Counter()
    cases = rng.sample(CASES, len(CASES))
    for case in tqdm(list(islice(cycle(cases), kills)), mininterval=30, miniters=1):
        situation, victim, sent = case
        for _ in range(MAX_ATTEMPTS):
            command = prepare(project, situation, rng.randrange(1, 10_000))
            seconds = rng.uniform(0.2, duration * (0.3 if situation == "changed back" else 1))
            killed, printed = run_and_kill(project, command, victim, sent, seconds)
            counts["left behind, as Git says: .git/index.lock"] += clean_up(project)
            if killed:
                break
        else:
            raise AssertionError((case, printed))
        if sent != signal.SIGKILL and victim != "DVC":
            # Python itself may print a traceback while it starts, before `main`.
            assert not re.search(r'stages/\w+\.py", line \d+, in main', printed), printed
        repaired = damage.make_repro(project)
        (project.root / damage.CHECKPOINT).unlink(missing_ok=True)  # of other params
        assert project.results() == before, (case, printed, repaired)
        assert project.run("git", "status", "--porcelain") == ""
        stages = re.findall("Running stage '(.*)'", printed)
        counts[f"kills in {stages[-1] if stages else 'DVC before a stage'}"] += 1
        counts[f"kills of {victim} by {sent.name}"] += 1
        counts["trainings resumed"] += "resumed after epoch" in repaired
        for name in ("rwlock", "dvc.lock", ".tmp", ".part"):
            counts[f"left behind and repaired: {name}"] += bool(
                re.search(rf"^repaired .*{re.escape(name)}(,|$)", repaired, re.MULTILINE)
            )
    return counts


def add_own_stage(project: Project) -> None:
    """Add a stage with a working directory, and a user's folder at the path in dvc.lock."""
    for folder in ("report", "notes"):
        (project.root / folder).mkdir()
    (project.root / OWN_FILE).write_bytes(b"mine")
    deps = ("--name=report", "--wdir=report", "--deps=../metrics/accuracy.json", "--outs=notes")
    project.run("dvc", "stage", "add", *deps, "cp ../metrics/accuracy.json notes")


@contextmanager
def small_projects(folder: Path) -> Iterator[list[Project]]:
    """Clone this repository WORKERS times to `folder`, with small data."""
    roots = [folder / str(n) for n in range(WORKERS)]
    if "fetch" in STAGES:
        from tests.mnist import running_mirror, small_project

        with running_mirror() as mirror:
            yield [small_project(root, mirror) for root in roots]
    else:  # in a copy with other data
        yield [clone_with_small_data(root) for root in roots]


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with (
        tempfile.TemporaryDirectory() as folder,
        small_projects(Path(folder)) as projects,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        for project in projects:
            project.set(num_epochs=15)
            commit(project, "Set params")
            add_own_stage(project)
            finish(project)
        shares = [len(range(n, kills, WORKERS)) for n in range(WORKERS)]
        counts = sum(pool.map(check_kills, projects, shares, range(WORKERS)), Counter[str]())
        for name, count in sorted(counts.items()):
            print(f"{count:4} {name}", flush=True)
        damages = list(damage.all_damages(projects[0]))
        parts = [damages[n::WORKERS] for n in range(WORKERS)]
        list(pool.map(damage.check_repairs, projects, parts))
        print(f"{len(damages):4} damaged files, each refused or repaired", flush=True)
        try:
            with disk.on_small_disk(projects[0], Path(folder, "disk")) as project:
                runs = disk.check_all(project)
            print(f"{runs:4} runs on a full or read-only disk", flush=True)
        except disk.CannotMountError as error:
            print(f"no full or read-only disk: {error}", flush=True)
        assert all(project.read(OWN_FILE) == b"mine" for project in projects)
    print("nothing lost, nothing wrong")


if __name__ == "__main__":
    main()
