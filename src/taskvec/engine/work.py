"""What steps take: images passed, FLOPs, linear heads, images decoded, bytes written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Work:
    """What some steps take: images passed forward, images trained on, FLOPs of each, work of the CPU, bytes written.

    ``updates`` are passes forward and back of a batch, ``head_steps`` optimiser steps of linear heads and
    ``head_flops`` their FLOPs; ``photographs`` are decoded, and ``drawings`` are small images, drawn or decoded.
    """

    forward: float = 0
    trained: float = 0
    forward_flops: float = 0
    training_flops: float = 0
    updates: float = 0
    head_steps: float = 0
    head_flops: float = 0
    photographs: float = 0
    drawings: float = 0
    disk: float = 0

    def __add__(self, other: Work) -> Work:
        """Add up field by field."""
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def flops(self) -> float:
        """Return all FLOPs."""
        return self.forward_flops + self.training_flops + self.head_flops


LITTLE = Work(disk=1e3)
"""The work of a step that only chooses among numbers."""


def total(works: Iterable[Work]) -> Work:
    """Add up."""
    return sum(works, Work())
