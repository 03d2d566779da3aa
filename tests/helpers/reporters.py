"""A reporter of runs that prints nothing."""

from __future__ import annotations

from typing import Any

from taskvec.engine.pipeline import Step


class Quiet:
    """Watches and remembers what was run and what was reused."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.kept: list[str] = []
        self.notes: list[str] = []

    def planned(self, steps: Any) -> None: ...
    def started(self, step: Step) -> None: ...
    def advanced(self, step: Step, share: float) -> None: ...

    def note(self, label: str, text: str) -> None:
        self.notes.append(f"{label}: {text}")

    def reused(self, step: Step) -> None:
        self.kept.append(step.label)

    def finished(self, step: Step, seconds: float) -> None:
        self.ran.append(step.label)
