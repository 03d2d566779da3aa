"""Merging in memory: recipes over the flat buffers of a study."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray
from torch import Tensor

from taskvec.core.errors import TaskvecError
from taskvec.merging.entries import Data, Entries, Entry, Kind, Masked, array, describe
from taskvec.merging.registry import ADDITION, Recipe, apply, find_recipe
from taskvec.weights import vectors
from taskvec.weights.flat import Slot, Weights, all_finite, distinct, read, read_metadata, save_tensors, view

DIRECTIONS = "directions.safetensors"
"""The file of a per-task result, where other merges have one direction."""
NO_STATISTICS: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Buffers:
    """The entries of task vectors that lie in flat buffers; tied tensors are one entry, by the first of their names."""

    pretrained: Weights
    vectors: Sequence[Weights]
    seed: int = 0
    statistics: Mapping[str, Tensor] = field(default_factory=lambda: NO_STATISTICS)

    @cached_property
    def kinds(self) -> dict[str, tuple[Kind, float | None]]:
        """What every entry is, and how deep."""
        return describe({slot.name: slot.shape for slot in self.pretrained.layout})

    @cached_property
    def layout(self) -> tuple[Slot, ...]:
        """The entries without twins."""
        return distinct(self.pretrained)

    def __iter__(self) -> Iterator[tuple[Entry, Tensor]]:
        """Yield every entry with its task vectors, one stacked on the other."""
        for slot in self.layout:
            kind, depth = self.kinds[slot.name]
            base = view(self.pretrained.flat, slot)
            statistics = self.statistics.get(slot.name)
            entry = Entry(slot.name, base, kind, depth, self.seed, statistics=statistics)
            yield entry, torch.stack([view(vector.flat, slot) for vector in self.vectors])


@dataclass(frozen=True)
class FiniteEntries:
    """Entries of which none holds NaN or infinity; one that does raises, by name."""

    entries: Entries

    def __iter__(self) -> Iterator[tuple[Entry, Tensor]]:
        """Yield every entry that is in order, or raise."""
        for entry, stack in self.entries:
            if not bool(stack.isfinite().all()):
                raise TaskvecError(
                    f"tensor '{entry.name}' of a task vector holds NaN or infinity",
                    "merge checkpoints that did not diverge",
                )
            yield entry, stack


def merge(
    pretrained: Weights,
    task_vectors: Sequence[Weights],
    scale: float,
    method: str = ADDITION,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Weights:
    """Return theta_pre + scale * direction; the method, or several joined by +, makes it out of the task vectors."""
    return vectors.add(pretrained, merge_vectors(pretrained, task_vectors, method, config, seed), scale)


def merge_vectors(
    pretrained: Weights,
    task_vectors: Sequence[Weights],
    method: str = ADDITION,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Weights:
    """Return the direction of a method, or of several joined by +, with hyperparameters by name."""
    return direction(find_recipe(method, config), Buffers(pretrained, task_vectors, seed))


def direction(recipe: Recipe, entries: Buffers) -> Weights:
    """Return a recipe's merged task vector, in the layout of the pre-trained weights.

    Raises for a recipe that gives each task its own (``task_directions``), and for NaN and infinity.
    """
    if recipe.per_task:
        raise TaskvecError(f"'{recipe.name}' gives each task its own weights", "choose a method with one result")
    merged = torch.zeros_like(entries.pretrained.flat)
    starts = {slot.name: slot for slot in entries.layout}
    for entry, result in apply(recipe, check_entries(recipe, entries)):
        assert isinstance(result, Tensor)
        view(merged, starts[entry.name]).copy_(result)
    return entries.pretrained.with_flat(merged)


@dataclass(frozen=True)
class TaskDirections:
    """What a per-task recipe gives: a common vector, one bit an element and task, one rescale an entry and task."""

    shared: Weights
    masks: UInt8[Tensor, "tasks bytes"]
    rescales: Float32[Tensor, "tasks entries"]
    names: tuple[str, ...]
    """Of the entries, in the order of ``rescales``."""

    def of(self, task: int) -> Weights:
        """Return one task's direction."""
        bits = unpack_bits(self.masks[task], self.shared.flat.numel()).to(self.shared.flat.device)
        flat = self.shared.flat * bits
        entries = {slot.name: slot for slot in self.shared.layout}
        for name, factor in zip(self.names, self.rescales[task], strict=True):
            view(flat, entries[name]).mul_(factor.to(flat.device))
        return self.shared.with_flat(flat)

    @property
    def bytes_per_task(self) -> int:
        """What every task costs in memory beside the common vector and its head."""
        return self.masks.shape[1] + 4 * self.rescales.shape[1]


def task_directions(recipe: Recipe, entries: Buffers) -> TaskDirections:
    """Return the result of a recipe that gives each task its own direction."""
    shared = entries.pretrained.with_flat(torch.zeros_like(entries.pretrained.flat))
    collected = Collected(shared, len(entries.vectors))
    for entry, result in apply(recipe, check_entries(recipe, entries)):
        assert isinstance(result, Masked)
        collected.take(entry, result)
    return collected.directions()


class Collected:
    """A per-task result that is put together of entries, or slices of them, in any order and by any thread."""

    def __init__(self, shared: Weights, tasks: int) -> None:
        """Begin with weights that are zero."""
        self.shared, count = shared, shared.flat.numel()
        self.slots = {slot.name: (place, slot) for place, slot in enumerate(distinct(shared))}
        self.masks = np.zeros((tasks, -(-count // 8)), np.uint8)
        self.rescales = torch.zeros(tasks, len(self.slots))
        self._writing = threading.Lock()

    def take(self, entry: Entry, result: Masked) -> None:
        """Take what a recipe makes of an entry or a slice."""
        place, slot = self.slots[entry.name]
        start, common = slot.start + entry.start, result.common.reshape(-1)
        self.shared.flat[start : start + len(common)] = common
        self.rescales[:, place] = result.rescales.cpu()
        bits = pack_bits(array(result.masks).reshape(len(self.masks), -1), start % 8)
        with self._writing:  # slices share bytes where they meet
            self.masks[:, start // 8 : start // 8 + bits.shape[1]] |= bits

    def directions(self) -> TaskDirections:
        """Return the result, all of which was taken."""
        return TaskDirections(self.shared, torch.from_numpy(self.masks), self.rescales, tuple(self.slots))


def check_entries(recipe: Recipe, entries: Buffers) -> FiniteEntries:
    """Return the entries, of which none may hold NaN; raise where they are not what the recipe needs."""
    for vector in entries.vectors:
        vectors.matching(vector, entries.pretrained)
    recipe.check_tasks(len(entries.vectors))
    if recipe.measures and not entries.statistics:
        needed = " and ".join(sorted(recipe.needs - {"seed"}))
        raise TaskvecError(f"'{recipe.name}' needs {needed}", "merge by it in a study, or choose another method")
    return FiniteEntries(entries)


def measure(recipe: Recipe, data: Data) -> dict[str, Tensor]:
    """Measure on data what the last method of a recipe needs, by entry; nothing for most.

    The vectors of ``data`` are those that it is given: after the transforms.
    """
    statistics: dict[str, Tensor] = {}
    for method, config in recipe.measures:
        module, _, function = method.measure.partition(":")
        statistics |= getattr(importlib.import_module(module), function)(data, config)
    return statistics


def save_directions(result: TaskDirections, path: Path) -> None:
    """Write a per-task result to a safetensors file, as compact as it is in memory."""
    tensors = {"common": result.shared.flat.cpu(), "masks": result.masks, "rescales": result.rescales.contiguous()}
    save_tensors(tensors, path, {"names": json.dumps(result.names)})


def read_directions(path: Path, like: Weights) -> TaskDirections:
    """Read a per-task result for an encoder with the layout of ``like``; one of another encoder is an error."""
    tensors, names = read(path), [slot.name for slot in distinct(like)]
    held = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    size, tasks = like.flat.numel(), len(tensors.get("masks", ()))
    wanted = {
        "common": (torch.float32, (size,)),
        "masks": (torch.uint8, (tasks, -(-size // 8))),
        "rescales": (torch.float32, (tasks, len(names))),
    }
    if held != wanted or read_metadata(path).get("names") != json.dumps(names):
        raise TaskvecError(f"'{path}' holds no directions for this encoder", "restore the file, or make it again")
    if not (all_finite(tensors["common"]) and all_finite(tensors["rescales"])):
        raise TaskvecError(f"'{path}' holds NaN or infinity", "restore the file, or make it again")
    shared = like.with_flat(tensors["common"].to(like.flat.device))
    return TaskDirections(shared, tensors["masks"], tensors["rescales"], tuple(names))


def pack_bits(masks: Bool[ndarray, "tasks count"], skipped: int = 0) -> UInt8[ndarray, "tasks bytes"]:
    """Return the bits of boolean rows, eight a byte, the first in the highest bit after some that are 0."""
    return np.packbits(np.pad(masks, ((0, 0), (skipped, 0))), axis=1)


def unpack_bits(packed: UInt8[Tensor, " bytes"], count: int) -> Bool[Tensor, " count"]:
    """Return the first ``count`` bits of bytes."""
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=count).astype(bool))
