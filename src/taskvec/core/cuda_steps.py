"""What makes steps of training on a GPU repeat their bits and launch at once: determinism, streams, CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.core.errors import first_line
from taskvec.core.notes import note

WARM = 3
"""Steps that are taken one operation at a time before one is captured as a graph."""
FAILED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed: torch 2.11 and before may still ask them about every allocation of pinned memory."""
Step = Callable[[Sequence[Any]], Float[Tensor, ""]]
"""One step of training on the batches it accumulates: it returns the loss, on the device."""


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Let a GPU take algorithms that repeat their bits inside the block; a CPU's do so anyway.

    The switches are those of the process, and are put back.
    """
    if device.type != "cuda":
        yield
        return
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills, searches = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.backends.cudnn.benchmark = False  # it would choose algorithms by their times
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark = fills, searches


def tolerant(step: Step, optimizer: torch.optim.Optimizer) -> Step:
    """Return a step that goes on without determinism, with a note, where an operation has no deterministic form."""

    def taken(batches: Sequence[Any]) -> Float[Tensor, ""]:
        try:
            return step(batches)
        except RuntimeError as error:
            if not torch.are_deterministic_algorithms_enabled() or "deterministic" not in str(error):
                raise
            note(f"training on this GPU does not repeat its last digits: {first_line(error)}")
        torch.use_deterministic_algorithms(False)
        optimizer.zero_grad(set_to_none=True)
        return step(batches)

    return taken


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device on which steps are captured: that is not possible on the default one."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Give a device its work on the side stream in the block: after what it was given before, and before what follows.

    Gradients belong to the stream of the first pass that made them, so that all steps of a training have to share it.
    """
    stream = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """Capture what the block gives to a GPU as a graph; other threads may go on meanwhile.

    A capture that fails raises a RuntimeError. Until torch 2.12 the allocator and the random generator then believe
    that it goes on, and the next capture or dropout would raise: they are told that it has ended.
    """
    pool = torch.cuda.graph_pool_handle()
    try:
        with (
            torch.cuda.stream(stream),  # what fails would stay on it
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            yield
    except RuntimeError:
        FAILED.append(graph)
        with contextlib.suppress(RuntimeError, AttributeError):  # a version that has told the allocator itself
            torch._C._cuda_endAllocateToPool(stream.device.index, pool)
        generator = torch.cuda.default_generators[stream.device.index]
        generator.graphsafe_set_state(generator.clone_state())
        raise


class GraphedStep:
    """A step of training that a GPU takes as one CUDA graph, after a few that it takes one operation at a time.

    A step may depend on nothing but the tensors of its batches, whose shapes stay, and on what steps change in place:
    weights, the optimizer's state, learning rates as tensors, the generator of the device. Without an operation that
    cannot be captured; a step that has one is taken as before, with a note.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """Take a step and the optimizer that it moves."""
        self.step, self.optimizer = step, optimizer
        self.taken = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: Any = None
        self.loss = torch.empty(0)

    def __call__(self, batches: Sequence[Any]) -> Float[Tensor, ""]:
        """Take one step and return its loss, which the next one overwrites."""
        self.taken += 1
        if self.taken == WARM + 1:
            self.capture(batches)
        if self.graph is None:
            return self.step(batches)
        overwrite(self.inputs, batches)
        self.graph.replay()
        return self.loss

    def capture(self, batches: Sequence[Any]) -> None:
        """Capture the step; nothing is computed yet. Other threads may go on, such as one that prepares batches."""
        self.inputs, graph, stream = duplicate(batches), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.let_capture(True)
        try:
            with capturing(graph, stream):
                self.loss = self.step(self.inputs)
            self.graph = graph
        except RuntimeError as error:
            note(f"training goes on without a CUDA graph, one operation at a time: {first_line(error)}")
            self.let_capture(False)
            self.optimizer.zero_grad(set_to_none=True)

    def let_capture(self, can: bool) -> None:
        """Tell the optimizer whether its steps are captured; its state lies on the device in either case."""
        for settings in self.optimizer.param_groups:
            settings["capturable"] = can


def duplicate(batch: Any) -> Any:
    """Return a copy of nested tuples and lists of tensors."""
    return batch.clone() if isinstance(batch, Tensor) else [duplicate(part) for part in batch]


def overwrite(old: Any, new: Any) -> None:
    """Copy nested tuples and lists of tensors into those of another, on their device, without waiting."""
    if isinstance(old, Tensor):
        old.copy_(new, non_blocking=True)
        return
    for before, after in zip(old, new, strict=True):
        overwrite(before, after)
