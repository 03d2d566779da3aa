"""Timing that the benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the least CPU seconds of some runs."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def clock(device: str) -> float:
    """Return the time in seconds when a GPU is done with what it was given; for a CPU the seconds of its cores."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def device_seconds(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Return the least seconds of some runs on a device, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        begin = clock(device)
        work()
        times.append(clock(device) - begin)
    return min(times[1:])


class EnoughError(Exception):
    """Ends a training of which enough steps were timed."""


def step_seconds(
    train: Callable[[Callable[[float], None]], object], steps: int, first: int, last: int, device: str
) -> float:
    """Return the seconds of a step of a training between two of its steps; the training ends after the last one.

    The training is given a function to tell which share of its ``steps`` is done: after every step, or after some as on
    a GPU. It is timed from the first time on that it tells of ``first`` steps or more, and likewise to the last.
    """
    marks: list[tuple[int, float]] = []

    def progress(share: float) -> None:
        step = round(share * steps)
        if step < (last if marks else first):
            return
        marks.append((step, clock(device)))
        if len(marks) == 2:
            raise EnoughError

    try:
        train(progress)
    except EnoughError:
        (begin, started), (end, stopped) = marks
        return (stopped - started) / (end - begin)
    raise RuntimeError(f"a training of fewer than {last} steps")
