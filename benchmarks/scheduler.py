"""What steps cost beside their work: CPU seconds of the parent process for steps that do nothing, all ready at once.

With ``Inline`` the parent also performs them; an executor that does nothing leaves the scheduler and the store alone.

    python benchmarks/scheduler.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from taskvec.engine.executors import Inline
from taskvec.engine.pipeline import Config, Executor, Finished, Inputs, Job, Step, run, step_type
from taskvec.engine.store import Content, Store

COUNTS = (1_000, 5_000)


class Number(Config):
    number: int


@step_type(1)
def nothing(config: Number, inputs: Inputs, out: Path, progress: Any) -> None:
    """Do nothing."""


class Idle:
    """Says at once of every job that it is done."""

    slots = 1

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def start(self, job: Job, progress: Any, note: Any) -> None:
        self.jobs.append(job)

    def wait(self) -> list[Finished]:
        jobs, self.jobs = self.jobs, []
        return [Finished(job, 0.0, Content({}, {})) for job in jobs]

    def close(self) -> None:
        """Nothing is under way."""


class Silent:
    """Shows nothing."""

    def planned(self, steps: Any) -> None: ...
    def reused(self, step: Step) -> None: ...
    def started(self, step: Step) -> None: ...
    def advanced(self, step: Step, share: float) -> None: ...
    def finished(self, step: Step, seconds: float) -> None: ...
    def note(self, label: str, text: str) -> None: ...


def seconds(count: int, executor: Executor, store: Path) -> float:
    """Return the CPU seconds of a run of so many steps."""
    steps = [Step(f"step {number}", nothing, Number(number=number)) for number in range(count)]
    begin = time.process_time()
    run(steps, Store(store), executor, Silent())
    return time.process_time() - begin


def main() -> None:
    """Print a line for each executor and number of steps: the first run, and one that finds all steps done."""
    seconds(1, Inline(), Path(tempfile.mkdtemp()))  # imports
    print(f"{'executor':<10}{'steps':>7}{'first run':>12}{'all done':>12}")
    for executor in (Inline, Idle):
        for count in COUNTS:
            with tempfile.TemporaryDirectory() as store:
                first, again = (seconds(count, executor(), Path(store)) for _ in range(2))
            print(f"{executor.__name__:<10}{count:>7,}{first:>10.2f} s{again:>10.2f} s")


if __name__ == "__main__":
    main()
