"""Kill `dvc repro` at random moments, damage its files, and compare with an undisturbed run.

Usage: python -m tests.drill [KILLS], 30 if not told otherwise; about seven minutes.
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
from contextlib import suppress
from pathlib import Path

from tests.conftest import SMALL, Project, clone, finish, running_mirror, shrink
from tests.damage import check, damages


def interrupt(project: Project, sign: signal.Signals, seconds: float) -> str | None:
    """Start `dvc repro --force`, signal all its processes after `seconds`; return its output.

    None says that the run had ended before the signal.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            ["dvc", "repro", "--force"],
            cwd=project.root,
            env=project.environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return None
        os.killpg(process.pid, sign)
        process.wait(30)
        deadline = time.monotonic() + 5
        while has_processes(process.pid):  # an orphan would go on writing
            assert time.monotonic() < deadline
            time.sleep(0.01)
        log.seek(0)
        return log.read()


def has_processes(group: int) -> bool:
    """Whether a process of the group is still there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def mend_lock(project: Project) -> bool:
    """Whether the kill hit DVC as it wrote dvc.lock, in place; if so, take Git's copy of it."""
    torn = subprocess.run(
        ["dvc", "stage", "list"],
        cwd=project.root,
        env=project.environment(),
        capture_output=True,
        check=False,
    ).returncode
    if torn:
        project.run("git", "checkout", "dvc.lock")
    return bool(torn)


def drill(project: Project, kills: int, seed: int) -> Counter[str]:
    """Disturb `project`, which has finished a run, `kills` times with each of two signals.

    Returns how many kills hit which stage; raises `AssertionError` for any lost or wrong result.
    """
    undisturbed = project.results()
    started = time.monotonic()
    project.run("dvc", "repro", "--force")
    duration = time.monotonic() - started
    chance = random.Random(seed)
    hits: Counter[str] = Counter()
    for sign in (signal.SIGKILL, signal.SIGINT) * kills:
        while (printed := interrupt(project, sign, chance.uniform(0.3, duration))) is None:
            pass
        if sign is signal.SIGINT:
            # Before main, while it starts, Python itself may tell of the interruption.
            assert not re.search(r'stages/\w+\.py", line \d+, in main', printed), printed
        stages = re.findall("Running stage '(.*)'", printed)
        hits[f"{sign.name} in {stages[-1] if stages else 'dvc'}"] += 1
        hits["resumed"] += "resumed after epoch" in printed
        hits["dvc.lock torn"] += mend_lock(project)
    project.run("dvc", "repro", "--force")  # else the run-cache might have it all
    assert project.results() == undisturbed
    litter = [path for path in project.root.glob("[dm]*/**/*") if path.name.endswith(".part")]
    assert not litter, litter
    assert not (project.root / "data/checkpoint.safetensors").exists()
    assert project.run("git", "status", "--porcelain") == ""
    assert project.repro() == []
    return hits


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with running_mirror() as mirror, tempfile.TemporaryDirectory() as folder:
        mirror.serve(SMALL["mnist"])
        project = clone(Path(folder), mirror)
        shrink(project)
        project.edit("params.yaml", "num_epochs: 10", "num_epochs: 100")
        finish(project)
        for hit, count in sorted(drill(project, kills, seed=kills).items()):
            print(f"{count:4} {hit}", flush=True)
        for damage in damages():
            check(project, damage)
        print(f"{len(list(damages())):4} damaged files refused and mended")
    print("nothing lost, nothing wrong")


if __name__ == "__main__":
    main()
