"""Merges of a study's files: entries that are read where steps left them, directions that are written as they are made.

Neither the encoders nor the result is in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from taskvec.core.errors import TaskvecError
from taskvec.merging.entries import Entry, array
from taskvec.merging.matching import Matched
from taskvec.merging.on_disk import Streams, carry, check_fit, store, stream
from taskvec.merging.recipes import Recipe
from taskvec.weights.flat import Slot, check_keys, distinct_slots
from taskvec.weights.reader import FLOATS, Checkpoint
from taskvec.weights.writer import Writer, shards


def laid_out(layout: Sequence[Slot], base: Checkpoint, tuned: Sequence[Checkpoint]) -> Matched:
    """Return what happens to every tensor of encoders of one layout; files that have other tensors raise.

    Tied tensors are those of the layout, whatever the files hold under their names.
    """
    wanted = {slot.name: slot.shape for slot in layout}
    for checkpoint in (base, *tuned):
        held = {name: stored.shape for name, stored in checkpoint.tensors.items() if stored.dtype in FLOATS}
        check_keys(held, wanted, f"'{checkpoint.path}'", "run the study again, or restore the file")
    merged = distinct_slots(layout)
    firsts = {slot.start: slot.name for slot in merged}
    tied = {slot.name: firsts[slot.start] for slot in layout if slot.size and slot.name != firsts[slot.start]}
    names = {name: name for name in wanted}
    integers = tuple(name for name in base.tensors if name not in wanted)
    return Matched(tuple(firsts.values()), (), integers, (names,) * len(tuned), ((),) * len(tuned), tied)


def write_direction(recipe: Recipe, streams: Streams, path: Path) -> None:
    """Write a recipe's merged task vector in float32, as the base's file is laid out, with the base's integers.

    Raises for a recipe that gives each task its own, and for NaN and infinity.
    """
    if recipe.per_task:
        raise TaskvecError(f"'{recipe.name}' gives each task its own weights", "choose a method with one result")
    _write(recipe, streams, [path])


def write_transformed(transforms: Recipe, streams: Streams, folder: Path) -> list[Path]:
    """Write the task vectors that transforms make, which are a recipe without its end, into files; return those."""
    paths = [folder / f"{place}.safetensors" for place in range(len(streams.tuned))]
    _write(transforms, streams, paths)
    return paths


def _write(recipe: Recipe, streams: Streams, paths: Sequence[Path]) -> None:
    """Write what a recipe makes of every entry: one result, or one a task to as many paths."""
    with ExitStack() as stack:
        files = [shards(streams.base, "F32", one=path.name) for path in paths]
        writers = [
            stack.enter_context(closing(Writer(path.parent, file))) for path, file in zip(paths, files, strict=True)
        ]
        for writer in writers:
            carry(streams, writer)

        def take(entry: Entry, result: Any) -> None:
            rows = array(result).reshape(len(writers), -1)
            for writer, row in zip(writers, rows, strict=True):
                check_fit(entry.name, row, "F32", "choose another method, or other hyperparameters")
                for name in streams.names_of(entry.name):
                    store(writer, name, entry.start, row, "F32")

        stream(recipe, streams, take)
        for writer in writers:
            writer.finish()
