"""A note when other programs use the cores of training."""

import os
from pathlib import Path

import pytest

from stages.shared import contention
from stages.shared.contention import ContentionMonitor, CoreUse

STAT = """\
cpu  90 90 90 90 90 90 90 90 90 90
cpu0 100 7 20 999 9 3 4 5 0 0
cpu1 200 7 20 999 9 3 4 5 0 0
cpu2 400 7 20 999 9 3 4 5 0 0
intr 1 2 3
"""


def test_core_use_counts_the_cores_of_this_process(tmp_path: Path) -> None:
    """Neither idle time nor that of niced processes, which give way."""
    stat = tmp_path / "stat"
    stat.write_text(STAT)
    use = contention.read_core_use({"cpu0", "cpu2"}, stat)
    assert use
    assert round(use.total * os.sysconf("SC_CLK_TCK")) == 100 + 400 + 2 * (20 + 3 + 4 + 5)
    assert contention.read_core_use({"cpu0"}, tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("threads", "cores", "own", "total", "is_noted"),
    [
        (2, 2, 20, 20.2, False),  # a quiet machine
        (2, 2, 10, 19.9, True),  # each program gets half
        (2, 4, 14, 40, True),
        (2, 16, 20, 120, False),  # busy, with cores left
    ],
)
def test_contention_is_noted_once(
    threads: int,
    cores: int,
    own: float,
    total: float,
    is_noted: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {f"cpu{core}" for core in range(cores)}
    monkeypatch.setattr(contention, "usable_cores", lambda: names)
    times = (CoreUse(wall, wall * own / 10, wall * total / 10) for wall in range(0, 50, 10))
    monkeypatch.setattr(contention, "read_core_use", lambda _: next(times))
    monkeypatch.setattr("time.perf_counter", lambda: 1e9)
    monitor = ContentionMonitor(threads)
    for _ in range(3):
        monitor.check()
    assert capsys.readouterr().out.count("note: other programs use") == is_noted


@pytest.mark.parametrize("threads", [1, 2])
def test_contention_is_measured_only_on_linux_with_threads(
    threads: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.platform", "darwin" if threads > 1 else "linux")
    ContentionMonitor(threads).check()
    assert capsys.readouterr().out == ""
