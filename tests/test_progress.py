"""The estimate of the time left, and how it is shown."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from taskvec.command import progress
from taskvec.engine.pipeline import Config, Step, step_type


@step_type(1)
def nothing(config: Config, inputs: Any, out: Path, progress: Any) -> None:
    """Do nothing."""


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return clock


def test_the_time_left_follows_the_cost_that_is_done(now: list[float]) -> None:
    out = io.StringIO()
    watcher = progress.Terminal(Console(file=out, force_terminal=False, width=200))
    first, second, third, kept = (
        Step(f"s{i}", nothing, Config(), cost=cost) for i, cost in enumerate((10, 20, 30, 500))
    )
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
    assert progress.duration_text(seconds) == text


def test_lines_of_a_file_fit_80_columns_have_no_colour_and_no_control_characters() -> None:
    out = io.StringIO()
    watcher = progress.Terminal(Console(file=out, force_terminal=False, width=80))
    steps = [
        Step(f"fine-tune [bold]{'x' * 90}\x1b[31m{i} (backbone, aligned, seed 0)", nothing, Config()) for i in (1, 2)
    ]
    watcher.planned(steps)
    for step in steps:
        watcher.started(step)
        watcher.finished(step, 1234.5)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert all(len(line) <= 80 and "\x1b" not in line for line in lines)
    assert lines[0].startswith("[1/2] fine-tune [bold]xxx")
    assert lines[0].endswith("…gned, seed 0): 1234.5 s, about 20 min 35 s left")


def test_there_is_an_estimate_within_the_first_long_step_of_a_resumed_run(now: list[float]) -> None:
    watcher = progress.Terminal(Console(file=io.StringIO(), force_terminal=False, width=80))
    kept, long = Step("kept", nothing, Config(), cost=500), Step("long", nothing, Config(), cost=100)
    watcher.planned([kept, long])
    watcher.reused(kept)
    watcher.started(long)
    now[0] = 20.0  # a worker starts
    watcher.advanced(long, 0.1)
    now[0] = 30.0
    watcher.advanced(long, 0.2)
    assert watcher.left() == pytest.approx(80)
