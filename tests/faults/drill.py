"""Kill `dvc repro` at random moments, damage its files, and compare with an undisturbed run.

Usage: python -m tests.faults.drill [KILLS]; 200 by default, about 10 minutes.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle, islice, product
from pathlib import Path

import psutil
from tqdm import tqdm

from tests.conftest import Project, finish
from tests.faults import damage, disk

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
VICTIMS = ("all", "DVC", "the stage")
WORKERS = 2  # projects at a time
TRIES = 50  # to come in time
SITUATIONS = ("cold", "changed", "changed back", "dvc exp run")


def prepare(project: Project, situation: str, seed: int) -> list[str]:
    """Bring about a situation; return the command to run in it."""
    if situation == "cold":
        return ["dvc", "repro", "--force"]
    if situation == "dvc exp run":
        return ["dvc", "exp", "run", "--set-param", f"train.seed={seed}"]
    project.set(seed=seed)
    if situation == "changed back":
        project.repro()
        project.run("git", "checkout", "--quiet", "params.yaml")
    return ["dvc", "repro"]


def processes(group: int) -> Iterator[psutil.Process]:
    """The processes of a group that still run."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def disturb(
    project: Project, command: list[str], sign: signal.Signals, victim: str, seconds: float
) -> tuple[bool, str]:
    """Run a command, signal one or all of its processes after `seconds`; return its output.

    And whether it was disturbed: it may have ended before, or there was no stage to kill.
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
        stages = [process.pid for process in processes(run.pid) if process.pid != run.pid]
        hit = run.returncode is None and (victim != "the stage" or bool(stages))
        if hit and victim == "all":
            os.killpg(run.pid, sign)
        elif hit:
            os.kill(run.pid if victim == "DVC" else stages[-1], sign)
        run.wait(60)
        while list(processes(run.pid)):  # a stage without its DVC goes on to its end
            time.sleep(0.01)
        log.seek(0)
        return hit, log.read()


def drill(project: Project, kills: int, seed: int) -> Counter[str]:
    """Disturb `project`, which has finished a run, so many times.

    Returns how often what was hit; raises `AssertionError` for any lost or wrong result.
    """
    undisturbed = project.results()
    chance = random.Random(seed)
    started = time.monotonic()
    project.run("dvc", "repro", "--force")
    duration = time.monotonic() - started
    hits: Counter[str] = Counter()
    cases = [
        case
        for case in product(SITUATIONS, VICTIMS, SIGNALS)
        if case[:2] != ("changed back", "the stage")  # which comes from the cache
    ]
    chance.shuffle(cases)
    for situation, victim, sign in tqdm(
        list(islice(cycle(cases), kills)), mininterval=30, miniters=1
    ):
        for _ in range(TRIES):
            command = prepare(project, situation, chance.randrange(1, 10_000))
            share = 0.3 if situation == "changed back" else 1
            seconds = chance.uniform(0.2, share * duration)
            hit, printed = disturb(project, command, sign, victim, seconds)
            lock = project.root / ".git/index.lock"  # of a killed Git, which says to remove it
            hits["left behind, as Git says: .git/index.lock"] += lock.exists()
            lock.unlink(missing_ok=True)
            project.run("git", "reset", "--quiet")  # what a killed `dvc exp run` may have staged
            project.run("git", "checkout", "--quiet", "params.yaml")
            if hit:
                break
        else:
            raise AssertionError((situation, victim, sign, printed))
        if sign != signal.SIGKILL and victim != "DVC":
            # Before main, while it starts, Python itself may tell of the interruption.
            assert not re.search(r'stages/\w+\.py", line \d+, in main', printed), printed
        stages = re.findall("Running stage '(.*)'", printed)
        fixed = damage.make(project)
        (project.root / damage.CHECKPOINT).unlink(missing_ok=True)  # of other params
        assert project.results() == undisturbed, (situation, victim, sign, printed, fixed)
        assert project.run("git", "status", "--porcelain") == ""
        hits[f"kills in {stages[-1] if stages else 'DVC before a stage'}"] += 1
        hits[f"kills of {victim} by {sign.name}"] += 1
        hits["trainings resumed"] += "resumed after epoch" in fixed
        for name in ("rwlock", "dvc.lock", ".tmp", ".part"):
            hits[f"left behind and repaired: {name}"] += bool(
                re.search(rf"^not as .*{re.escape(name)}(,|$)", fixed, re.MULTILINE)
            )
    return hits


def main() -> None:
    from tests.mnist import running_mirror, small_project  # gone where fetch is

    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with (
        running_mirror() as mirror,
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        projects = [small_project(Path(folder, str(n)), mirror) for n in range(WORKERS)]
        for project in projects:
            project.set(num_epochs=15)
            finish(project)
        shares = [len(range(n, kills, WORKERS)) for n in range(WORKERS)]
        hits = sum(pool.map(drill, projects, shares, range(WORKERS)), Counter[str]())
        for hit, count in sorted(hits.items()):
            print(f"{count:4} {hit}", flush=True)
        parts = [list(damage.damages(project))[n::WORKERS] for n, project in enumerate(projects)]
        list(pool.map(damage.check_all, projects, parts))
        print(f"{sum(map(len, parts)):4} damaged files, each refused or made good", flush=True)
        small = Path(folder, "small")
        small.mkdir()
        try:
            with disk.mounted(small, "-t", "tmpfs", "-o", "size=30m", "tmpfs"):
                root = shutil.copytree(project.root, small / "project", symlinks=True)
                cases = disk.main(Project(root, project.extra))
            print(f"{cases:4} runs on a full or read-only disk", flush=True)
        except disk.CannotMountError as error:
            print(f"no full or read-only disk: {error}", flush=True)
    print("nothing lost, nothing wrong")


if __name__ == "__main__":
    main()
