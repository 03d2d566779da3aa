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


def step_seconds(train: Callable[[Callable[[float], None]], object], first: int, last: int, device: str) -> float:
    """Return the seconds of a step of a training between two of its steps; the training ends after the last one.

    The training is given a function to call after every step.
    """
    times: dict[int, float] = {}
    step = 0

    def progress(_: float) -> None:
        nonlocal step
        step += 1
        if step in (first, last):
            times[step] = clock(device)
        if step == last:
            raise EnoughError

    try:
        train(progress)
    except EnoughError:
        return (times[last] - times[first]) / (last - first)
    raise RuntimeError(f"a training of fewer than {last} steps")
