"""The estimate of the time left, and how it is shown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from taskvec import progress
from taskvec.pipeline import Step


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return clock


def test_the_time_left_follows_the_cost_that_is_done(now: list[float]) -> None:
    out = io.StringIO()
    watcher = progress.Terminal(Console(file=out, force_terminal=False, width=200))
    first, second, third, kept = (Step(f"s{i}", "m:f", 1, {}, cost=cost) for i, cost in enumerate((10, 20, 30, 500)))
    watcher.planned([first, second, third, kept])
    watcher.reused(kept)
    now[0] = 100.0  # starting workers takes its time and is no measure of the work
    watcher.started(first)
    assert watcher.left() is None
    now[0] = 110.0
    watcher.finished(first, 10.0)
    assert watcher.left() == pytest.approx(50)
    watcher.started(second)
    now[0] = 120.0
    watcher.advanced(second, 0.5)
    assert watcher.left() == pytest.approx(40)
    watcher.close()
    assert out.getvalue() == "[2/4] s0: 10.0 s, about 50 s left\n"


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "7 s"), (125, "2 min 05 s"), (7505, "2 h 05 min")])
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert progress.clock(seconds) == text
