"""Time by the wall and by the CPU, without what was paused for."""

from __future__ import annotations

import pytest

from equilibrium_mcore.training import stopwatch
from equilibrium_mcore.training.stopwatch import Spent, Stopwatch


def test_laps_leave_out_their_own_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"wall": 100.0, "cpu": 7.0}

    def passes(wall: float, cpu: float) -> None:
        clock["wall"] += wall
        clock["cpu"] += cpu

    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(stopwatch.time, "process_time", lambda: clock["cpu"])
    watch = Stopwatch()
    passes(2.0, 1.0)
    with watch.pause():
        passes(16.0, 8.0)
    with watch.pause():
        passes(32.0, 0.5)
    passes(4.0, 3.0)
    assert watch.lap() == Spent(6.0, 4.0)
    passes(0.5, 0.25)
    assert watch.lap() == Spent(0.5, 0.25)  # the pauses were of the lap before
