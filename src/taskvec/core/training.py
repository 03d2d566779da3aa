"""The one training loop: AdamW, linear warm-up, cosine to zero, clipped gradient norm (paper, appendix C)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from taskvec.core.progress import Progress, no_progress

Batch = TypeVar("Batch")
AHEAD = 100
"""Index batches that are drawn and copied to a device at once."""


@dataclass(frozen=True)
class Schedule:
    """The length and regularisation of a training; the peak learning rate belongs to each parameter group."""

    steps: int
    warmup: int = 0
    weight_decay: float = 0.1
    clip: float = 1.0
    accumulate: int = 1

    def factor(self, step: int) -> float:
        """Return the share of the peak learning rate at a step: linear warm-up, then a half cosine to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


@dataclass(frozen=True)
class Group:
    """Parameters that share a peak learning rate and are clipped by their common gradient norm."""

    parameters: Sequence[Tensor]
    learning_rate: float


def make_optimizer(groups: Sequence[Group], schedule: Schedule) -> torch.optim.AdamW:
    """Return AdamW with weight decay on all parameters, as in the paper's code."""
    settings = [{"params": list(group.parameters), "lr": group.learning_rate} for group in groups]
    return torch.optim.AdamW(settings, weight_decay=schedule.weight_decay)


def train(
    groups: Sequence[Group],
    loss: Callable[[Batch], Float[Tensor, ""]],
    batches: Iterable[Batch],
    schedule: Schedule,
    *,
    optimizer: torch.optim.AdamW | None = None,
    steps: range | None = None,
    after_step: Callable[[int], None] | None = None,
    progress: Progress = no_progress,
) -> list[float]:
    """Minimise ``loss`` over ``batches`` and return the loss of every step (mean over accumulated batches).

    ``batches`` must yield ``schedule.accumulate`` batches a step. ``after_step(step)`` runs after each update (a
    teacher's moving average, a log). A run that is resumed or cut short gives its ``optimizer`` and the ``steps`` of
    the schedule to take; by default a new optimizer takes all.
    """
    optimizer = optimizer or make_optimizer(groups, schedule)
    peaks = [group.learning_rate for group in groups]
    stream: Iterator[Batch] = iter(batches)
    losses = []
    for step in range(schedule.steps) if steps is None else steps:
        for settings, peak in zip(optimizer.param_groups, peaks, strict=True):
            settings["lr"] = peak * schedule.factor(step)
        total = torch.zeros(())
        for _ in range(schedule.accumulate):
            value = loss(next(stream)) / schedule.accumulate
            value.backward()  # type: ignore[no-untyped-call]
            total = total + value.detach().cpu()
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group.parameters, schedule.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total))
        if after_step is not None:
            after_step(step)
        progress((step + 1) / schedule.steps)
    return losses


def index_batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield int64 index batches forever: a fresh seeded permutation each epoch, short last batches left out.

    With fewer than ``batch_size`` samples every batch is the whole set, in a new order.
    """
    if count < 1:
        raise ValueError("no samples to draw batches from")
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def uploaded(batches: Iterator[Int64[Tensor, " batch"]], device: torch.device) -> Iterator[Int64[Tensor, " batch"]]:
    """Yield index batches of one size on a device, to which ``AHEAD`` at a time are copied: no step waits for its own.

    They are drawn on the CPU, the same for every device.
    """
    while block := list(itertools.islice(batches, AHEAD)):
        indices = torch.stack(block)
        indices = indices.pin_memory() if device.type == "cuda" else indices
        yield from indices.to(device, non_blocking=True)
