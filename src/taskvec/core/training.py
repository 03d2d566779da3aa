"""The one training loop: AdamW, linear warm-up, cosine to zero, clipped gradient norm (paper, appendix C)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.core.cuda_steps import WARM, GraphedStep, aside, deterministic, tolerant
from taskvec.core.errors import TaskvecError
from taskvec.core.progress import Progress, no_progress

Batch = TypeVar("Batch")
FETCH = 50
"""Steps between two looks at the losses on a GPU: each waits until it has done all that it was given."""


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


class DivergedError(TaskvecError):
    """A training met a loss of NaN or infinity; ``losses`` has those of all steps until then."""

    losses: tuple[float, ...] = ()

    def mended_by(self, fix: str) -> DivergedError:
        """Return the error with another advice."""
        error = DivergedError(self.problem, fix)
        error.losses = self.losses
        return error


def make_optimizer(groups: Sequence[Group], schedule: Schedule) -> torch.optim.AdamW:
    """Return AdamW with weight decay on all parameters, as in the paper's code.

    On a GPU it is one kernel, and its learning rates are tensors there, which a captured step reads anew.
    """
    device = device_of(groups)
    on_gpu = device.type == "cuda"
    rates = [group.learning_rate for group in groups]
    settings = [
        {"params": list(group.parameters), "lr": torch.tensor(rate, device=device) if on_gpu else rate}
        for group, rate in zip(groups, rates, strict=True)
    ]
    return torch.optim.AdamW(settings, weight_decay=schedule.weight_decay, fused=on_gpu or None)


def device_of(groups: Sequence[Group]) -> torch.device:
    """Return the device of the parameters, which is one."""
    return next(parameter.device for group in groups for parameter in group.parameters)


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
    finite: bool = False,
    graph: bool = False,
) -> list[float]:
    """Minimise ``loss`` over ``batches`` and return the loss of every step (mean over accumulated batches).

    ``batches`` must yield ``schedule.accumulate`` batches a step. ``after_step(step)`` runs after each update (a
    teacher's moving average, a log). A run that is resumed or cut short gives its ``optimizer`` and the ``steps`` of
    the schedule to take; by default a new optimizer takes all. Where losses must be ``finite``, another raises
    ``DivergedError``; not where several problems share a loop, of which one may diverge without the others.

    On a GPU losses stay there and are fetched every ``FETCH`` steps; nothing else waits for it. With a ``graph`` it
    takes a step as one CUDA graph: batches are then nested tuples of tensors there, of which alone the loss depends,
    and of the same shapes every time (``cuda_steps.GraphedStep``).
    """
    optimizer = optimizer or make_optimizer(groups, schedule)
    wanted = range(schedule.steps) if steps is None else steps
    stream, device = iter(batches), device_of(groups)
    graph = graph and device.type == "cuda" and len(wanted) > 4 * WARM
    losses, history = Losses(wanted, schedule, groups, finite), after_step or no_history
    with deterministic(device), aside(device) if graph else contextlib.nullcontext():
        take = tolerant(partial(take_step, groups, loss, schedule, optimizer), optimizer)
        take = GraphedStep(take, optimizer) if graph else take
        for step in wanted:
            set_rates(optimizer, groups, schedule.factor(step))
            losses.add(take([next(stream) for _ in range(schedule.accumulate)]))
            history(step)
            if losses.all_fetched():  # on a GPU steps are done then, and not before
                progress((step + 1) / schedule.steps)
        return losses.fetched()


def take_step(
    groups: Sequence[Group],
    loss: Callable[[Batch], Float[Tensor, ""]],
    schedule: Schedule,
    optimizer: torch.optim.AdamW,
    batches: Sequence[Batch],
) -> Float[Tensor, ""]:
    """Take one step on the accumulated batches and return their mean loss, on the device."""
    total = torch.zeros((), device=device_of(groups))
    for batch in batches:
        value = loss(batch) / schedule.accumulate
        value.backward()  # type: ignore[no-untyped-call]
        total = total + value.detach()
    for group in groups:
        torch.nn.utils.clip_grad_norm_(group.parameters, schedule.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def set_rates(optimizer: torch.optim.AdamW, groups: Sequence[Group], factor: float) -> None:
    """Set every group's learning rate to a share of its peak."""
    for settings, group in zip(optimizer.param_groups, groups, strict=True):
        if isinstance(settings["lr"], Tensor):
            settings["lr"].fill_(group.learning_rate * factor)
        else:
            settings["lr"] = group.learning_rate * factor


class Losses:
    """The losses of a training: those of the last steps on its device, those before them fetched and checked."""

    def __init__(self, steps: range, schedule: Schedule, groups: Sequence[Group], finite: bool) -> None:
        """Make room for the steps that are taken."""
        device = device_of(groups)
        self.steps, self.schedule, self.groups, self.finite = steps, schedule, groups, finite
        self.every = FETCH if device.type == "cuda" else 1
        self.recent = torch.zeros(self.every, device=device)
        self.values: list[float] = []
        self.count = 0

    def add(self, loss: Float[Tensor, ""]) -> None:
        """Keep the loss of the next step, and look at all of them where it is time."""
        self.recent[self.count % self.every].copy_(loss, non_blocking=True)
        self.count += 1
        if self.count % self.every == 0:
            self.fetch()

    def fetch(self) -> None:
        """Fetch the losses that are still on the device; raise for one that must be finite and is not."""
        seen = len(self.values)
        self.values += self.recent[: self.count - seen].tolist()
        for place in range(seen, self.count) if self.finite else ():
            if not math.isfinite(self.values[place]):
                raise self.divergence(place)

    def all_fetched(self) -> bool:
        """Return whether no loss is still on the device only."""
        return self.count == len(self.values)

    def divergence(self, place: int) -> DivergedError:
        """Return the error of a loss: which step it was, and the learning rate."""
        rate = ", ".join(f"{group.learning_rate:g}" for group in self.groups)
        error = DivergedError(
            f"training diverged at learning rate {rate}: the loss of step {self.steps[place] + 1} of "
            f"{self.schedule.steps} is {self.values[place]}",
            "lower the learning rate",
        )
        error.losses = tuple(self.values[: place + 1])
        return error

    def fetched(self) -> list[float]:
        """Return all losses."""
        if not self.all_fetched():
            self.fetch()
        return self.values


def no_history(_: int) -> None:
    """Do nothing after a step."""


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
