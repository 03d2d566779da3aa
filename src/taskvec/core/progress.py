"""Reports of progress: who does a long piece of work calls one with the share that is done."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1."""


def no_progress(_: float) -> None:
    """Report to nobody."""


def share_of(progress: Progress, start: float, share: float) -> Progress:
    """Return the report of a part of the work, which begins at ``start`` and is a ``share`` of the whole."""
    return lambda done: progress(start + share * done)
