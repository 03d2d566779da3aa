"""Progress of a run: a bar with the time left on a terminal, one line a step elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from taskvec.core.formatting import duration_text
from taskvec.core.notes import printable
from taskvec.engine.pipeline import Step
from taskvec.report.texts import one_line, shorten

FIRST = 0.02
"""Share of the work before which there is no estimate of the time left."""


class Left(ProgressColumn):
    """The time that is left, from the share done so far."""

    def render(self, task: Task) -> Text:
        """Show the estimate, once there is one."""
        left = task.fields.get("left")
        return Text("" if left is None else f"about {duration_text(left)} left", style="cyan")


class Terminal:
    """Shows a run: what is done, what is under way, and about how long the rest takes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.begin, self.base = 0.0, -1.0
        self.total, self.count, self.number = 0.0, 0, 0
        self.reused_cost, self.cost = 0.0, 0.0
        self.shares: dict[Step, float] = {}
        what = TextColumn(
            "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
        )
        columns = (BarColumn(20), what, TimeElapsedColumn(), Left(table_column=Column(no_wrap=True, min_width=22)))
        self.bar = Progress(*columns, console=console, transient=True, expand=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("starting")

    def planned(self, steps: Sequence[Step]) -> None:
        """Take the whole list of steps."""
        self.total, self.count = sum(step.cost for step in steps), len(steps)
        self.bar.start()

    def reused(self, step: Step) -> None:
        """Count a step that was done before."""
        self.reused_cost += step.cost
        self.number += 1
        self._show()

    def started(self, step: Step) -> None:
        """Name a step that begins."""
        self.shares[step] = 0.0
        self._show()

    def advanced(self, step: Step, share: float) -> None:
        """Move the bar within a step."""
        if step in self.shares:
            self.shares[step] = share
            self._measure_from(time.monotonic(), self.done())
            self._show()

    def finished(self, step: Step, seconds: float) -> None:
        """Count a step that was done now; without a terminal, write a line."""
        self._measure_from(time.monotonic() - seconds, 0.0)
        self.shares.pop(step, None)
        self.cost += step.cost
        self.number += 1
        self._show()
        if not self.console.is_terminal:
            self._say(step.label, seconds)

    def _say(self, label: str, seconds: float) -> None:
        """Write one line, which fits a terminal's width: names that are too long lose their middle."""
        left = self.left() if self.number < self.count else None
        count, took = f"[{self.number}/{self.count}] ", f": {seconds:.1f} s"
        took += "" if left is None else f", about {duration_text(left)} left"
        name = shorten(one_line(label), self.console.width - len(count) - len(took))
        self.console.print(count + name + took, markup=False, highlight=False, soft_wrap=True)

    def note(self, label: str, text: str) -> None:
        """Write what a step has to tell."""
        whole = not self.console.is_terminal
        self.console.print(printable(f"{label}: {text}"), markup=False, highlight=False, soft_wrap=whole)

    def _measure_from(self, begin: float, base: float) -> None:
        """Take the first sign of progress as the start: what came before, such as starting workers, is no measure."""
        if self.base < 0:
            self.begin, self.base = begin, base

    def done(self) -> float:
        """Return the cost that was done now, of steps under way their share."""
        return self.cost + sum(step.cost * share for step, share in self.shares.items())

    def left(self) -> float | None:
        """Return the seconds left, from the cost done now and the time it took; None before anything is done."""
        ahead, moved = self.total - self.reused_cost, self.done() - self.base
        elapsed = time.monotonic() - self.begin
        if self.base < 0 or elapsed < 3 or moved < FIRST * ahead:
            return None
        return elapsed * (ahead - self.done()) / moved

    def close(self) -> None:
        """Take the bar away."""
        self.bar.stop()

    def _show(self) -> None:
        under_way = ", ".join(one_line(step.label) for step in self.shares)
        done = self.reused_cost + self.done()
        text = f"{self.number}/{self.count} {under_way[:70]}"
        self.bar.update(self.task, total=max(self.total, 1), completed=done, description=text, left=self.left())


@contextmanager
def passes(title: str, console: Console) -> Iterator[Callable[[int, float], None]]:
    """Show passes over files, one bar with an estimate of the time left for each; nothing without a terminal.

    What it yields is told the pass (from 1) and the share of it that is done.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(20), TimeElapsedColumn(), Left())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, begin, current = bar.add_task(title, total=1.0), time.monotonic(), 1

        def watch(number: int, share: float) -> None:
            nonlocal begin, current
            if number != current:
                begin, current = time.monotonic(), number
            elapsed = time.monotonic() - begin
            left = elapsed * (1 - share) / share if share > FIRST and elapsed > 1 else None
            again = f", pass {number}" if number > 1 else ""
            bar.update(task, completed=share, description=f"{title}{again}", left=left)

        yield watch
