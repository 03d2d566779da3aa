"""Merging of files: recipes over checkpoints that are read and written in slices, never whole models in memory."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Float32
from numpy import ndarray

from taskvec.core.errors import TaskvecError, did_you_mean
from taskvec.core.files import write_json
from taskvec.engine.publishing import check_outside
from taskvec.merging.entries import Entry, Kind, Masked, array, describe
from taskvec.merging.matching import Matched
from taskvec.merging.recipes import prepare
from taskvec.merging.registry import Recipe
from taskvec.weights.header import PICKLES
from taskvec.weights.reader import FLOATS, INDEX, Checkpoint, distinct
from taskvec.weights.writer import LARGEST, Shard, Writer, check_space, narrow, new_folder, peak, shards

if TYPE_CHECKING:  # additions need no torch
    from torch import Tensor

SLICE = 1 << 20
"""Elements of all task vectors together in a slice, for elementwise recipes; a quarter of them for those with torch."""
THREADS = 2
"""Slices that are merged at a time; more threads would wait for Python's lock and for the disk."""
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
BESIDE = (".json", ".txt", ".model", ".jinja")
"""What is copied with a folder: configuration and tokenizers."""

Place = tuple[str, int, int]
"""What is read at once: an entry, its first element and the one after its last."""
Take = Callable[[Entry, Any], None]
"""Is given an entry, or a slice, with what a recipe makes of it; by several threads."""
Watch = Callable[[int, float], None]
"""Is told the pass over the files (from 1) and the share of it that is done."""


def unwatched(number: int, share: float) -> None:
    """Show nothing."""


@dataclass
class Streams:
    """The entries of task vectors that lie in files: ``whole``, or slices of ``slice`` elements of all tasks.

    They are numpy's arrays, or with ``tensors`` torch's, which share their memory, or are copied to a ``device``.
    ``statistics`` are what was measured on data, by entry; ``excludable`` says whether a user may leave tensors out.
    ``passes`` counts how often they were iterated over, and ``moved`` says which checkpoints were seen to differ from
    the base.
    """

    base: Checkpoint
    tuned: Sequence[Checkpoint]
    matched: Matched
    whole: bool = False
    tensors: bool = False
    seed: int = 0
    slice: int = SLICE
    watch: Watch = unwatched
    device: str = "cpu"
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    excludable: bool = True
    passes: int = 0
    moved: Bool[ndarray, " tasks"] = field(init=False)

    def __post_init__(self) -> None:
        """Begin with nothing seen."""
        self.moved = np.zeros(len(self.tuned), bool)

    @classmethod
    def of(
        cls, recipe: Recipe, base: Checkpoint, tuned: Sequence[Checkpoint], matched: Matched, **options: Any
    ) -> Streams:
        """Return the entries as a recipe takes them: in slices if it is elementwise, as arrays if those will do."""
        whole = not recipe.elementwise or bool(recipe.measures)
        tensors = not recipe.arrays or options.get("device", "cpu") != "cpu"
        return cls(base, tuned, matched, whole, tensors, **options)

    @cached_property
    def kinds(self) -> dict[str, tuple[Kind, float | None]]:
        """What every merged entry is, and how deep."""
        return describe({name: self.base.tensors[name].shape for name in (*self.matched.merged, *self.matched.tied)})

    def names_of(self, name: str) -> list[str]:
        """Return a merged entry's name and those of the tensors tied to it."""
        return [name, *self._twins.get(name, ())]

    @cached_property
    def _twins(self) -> dict[str, list[str]]:
        twins: dict[str, list[str]] = {}
        for twin, first in self.matched.tied.items():
            twins.setdefault(first, []).append(twin)
        return twins

    def __iter__(self) -> Iterator[tuple[Entry, Any]]:
        """Yield parts and their vectors in order, as ``read`` gives them."""
        return map(self.read, self.places())

    def each(self, work: Callable[[Place], None]) -> None:
        """Work on all entries in order, or on all their slices by several threads."""
        if self.whole:
            for place in self.places():
                work(place)
        else:
            if self.tensors:
                import torch  # noqa: F401 (not first in a thread: an interruption would wait for it)
            in_threads(work, self.places())

    def places(self) -> Iterator[Place]:
        """Yield what there is to read; this counts as a pass, and a place as done when the next is asked for."""
        self.passes += 1
        sizes = {name: self.base.tensors[name].size for name in self.matched.merged}
        total, done = max(1, sum(sizes.values())), 0
        for name, size in sizes.items():
            step = size if self.whole else max(1, self.slice // (len(self.tuned) * (4 if self.tensors else 1)))
            for start in range(0, size, max(1, step)):
                stop = min(size, start + step)
                yield name, start, stop
                done += stop - start
                self.watch(self.passes, done / total)

    def read(self, place: Place) -> tuple[Entry, Any]:
        """Return a part and its vectors in float32, "tasks *shape" or "tasks slice"; NaN and infinity raise."""
        name, start, stop = place
        wide = self.base.read(name, start, stop)
        stack = np.empty((len(self.tuned), stop - start), np.float32)
        with np.errstate(all="ignore"):
            for checkpoint, names, row in zip(self.tuned, self.matched.sources, stack, strict=True):
                np.subtract(checkpoint.read(names[name], start, stop, row), wide, out=row, casting="same_kind")
                if not peak(row) < np.inf:
                    raise self._infinite(name, start, stop)
            base = wide.astype(np.float32, copy=False)
        if not self.moved.all():
            self.moved[stack.any(axis=1)] = True
        kind, depth = self.kinds[name]
        if self.whole:
            shape = self.base.tensors[name].shape
            base, stack = base.reshape(shape), stack.reshape(len(self.tuned), *shape)
        known = self.statistics.get(name)
        statistics = None if known is None else known.to(self.device)
        return Entry(name, self._lend(base), kind, depth, self.seed, start, statistics=statistics), self._lend(stack)

    def _lend(self, values: Float32[ndarray, "*shape"]) -> Any:
        """Return the array, or a tensor that shares its memory or has a copy of it on the device."""
        if not self.tensors:
            return values
        import torch

        return torch.from_numpy(values).to(self.device)

    def _infinite(self, name: str, start: int, stop: int) -> TaskvecError:
        """Say which file holds what is not finite."""
        fix = "give a checkpoint whose training did not diverge"
        fix += f"; if it is a mask, --exclude '{escape(name)}' carries the base's" if self.excludable else ""
        names = [name, *(source[name] for source in self.matched.sources)]
        for checkpoint, source in zip([self.base, *self.tuned], names, strict=True):
            if not peak(checkpoint.read(source, start, stop)) < np.inf:
                return TaskvecError(f"'{checkpoint.path}': tensor '{source}' holds NaN or infinity", fix)
        return TaskvecError(f"tensor '{name}' differs from the base's by more than float32 holds", fix)


def in_threads(work: Callable[[Place], None], places: Iterable[Place]) -> None:
    """Work on places by several threads, and raise the first error in the places' order."""
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for place in places:
                waiting.append(pool.submit(work, place))
                if len(waiting) > 2 * THREADS:
                    waiting.popleft().result()
            while waiting:
                waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def stream(recipe: Recipe, streams: Streams, take: Take) -> None:
    """Hand on what a recipe makes of every entry, or of every slice: once all global passes are over, in any order."""
    recipe.check_tasks(len(streams.tuned))
    np.empty(4 * SLICE, np.float32)  # freed at once: glibc keeps smaller blocks from now on, which saves page faults
    stages = prepare(recipe, streams)

    def merge(place: Place) -> None:
        entry, result = streams.read(place)
        for stage in stages:
            result = stage(entry, result)
        take(entry, result)

    streams.each(merge)


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Target:
    """Where a result goes: one file, or a folder; ``limit`` is the largest shard in bytes."""

    out: Path
    dtype: str | None = None
    limit: int | None = None

    @property
    def single(self) -> bool:
        """Whether it is one file."""
        return self.out.suffix == ".safetensors"


def plan_target(
    out: Path, dtype: str | None, limit: int | None, inputs: Sequence[Checkpoint], recipe: Recipe
) -> Target:
    """Check where a result is to go, before tensors are read: nothing is overwritten."""
    if dtype is not None and dtype not in DTYPES:
        raise TaskvecError(f"unknown type '{dtype}'", did_you_mean(dtype, DTYPES))
    out = Path(os.path.realpath(out)) if out.name in ("", "..") or out.is_symlink() else out
    target = Target(out, DTYPES[dtype] if dtype else None, limit)
    if os.path.ismount(out):
        raise TaskvecError(f"'{out}' is a mounted disk, which cannot be replaced", "give a folder in it")
    if out.suffix in PICKLES:
        raise TaskvecError(f"'{out}' would be a pickle", "call it .safetensors, or give a folder")
    if target.single and (limit is not None or recipe.per_task):
        why = "shards" if limit is not None else f"'{recipe.name}', which gives each task its own weights,"
        raise TaskvecError(f"'{out}' is one file, and {why} need a folder", "give --out a name without .safetensors")
    if os.path.realpath(out) in {os.path.realpath(file) for checkpoint in inputs for file in checkpoint.files}:
        raise TaskvecError(f"'{out}' is one of the checkpoints that are merged", "choose another --out")
    check_outside(out, [checkpoint.path for checkpoint in inputs])
    check_new(target)
    return target


def check_new(target: Target) -> None:
    """Raise if something is already where a result is to go."""
    out = target.out
    if out.exists() and (target.single or not out.is_dir() or any(out.iterdir())):
        what = "is a folder" if target.single and out.is_dir() else "exists already"
        raise TaskvecError(f"'{out}' {what}", "choose another --out, or remove it")


def merge_files(recipe: Recipe, streams: Streams, scale: float, target: Target) -> list[Path]:
    """Write theta_pre + scale * direction for all tensors; return the results, one a task for per-task recipes.

    Everything is computed in float32 (float64 bases in float64) and stored as the base stores it unless the target says
    otherwise. The results appear whole or not at all.
    """
    layouts = lay_out(recipe, streams, target)
    check_space(target.out, sum(shard.length for layout in layouts for shard in layout))
    with new_folder(target.out) as folder, ExitStack() as stack:
        writers = [stack.enter_context(closing(Writer(folder, layout))) for layout in layouts]
        for layout in layouts:
            _index(folder, streams.base, layout, target)
        for writer in writers:
            carry(streams, writer, target.dtype)

        def move(entry: Entry, result: Any) -> None:
            for task, writer in enumerate(writers):
                direction = result.of(task) if isinstance(result, Masked) else result
                _move(streams, writer, entry, array(direction).reshape(-1), scale, target.dtype)

        stream(recipe, streams, move)
        for writer in writers:
            writer.finish()
        return _publish(folder, streams.base, layouts, target)


def lay_out(recipe: Recipe, streams: Streams, target: Target) -> list[list[Shard]]:
    """Return the files of every result: shards where the base has them or a limit asks for them, else one file."""
    base = streams.base
    if target.single:
        return [shards(base, target.dtype, one=target.out.name)]
    several = base.sharded or target.limit is not None
    names = distinct(one.label.replace("/", "-") for one in streams.tuned) if recipe.per_task else [""]
    if several:
        layout = shards(base, target.dtype, target.limit)
        return [[replace(shard, name=str(Path(name, shard.name))) for shard in layout] for name in names]
    return [shards(base, target.dtype, one=f"{name or base.stem}.safetensors") for name in names]


def carry(streams: Streams, writer: Writer, dtype: str | None = None) -> None:
    """Copy the base's own tensors, byte for byte unless their type changes."""
    base = streams.base
    for name in streams.matched.carried:
        stored = base.tensors[name]
        if dtype in (None, stored.dtype) or stored.dtype not in FLOATS:
            for start, piece in base.pieces(name):
                writer.write(name, start, piece)
        else:
            for start in range(0, stored.size, SLICE):
                values = base.read(name, start, min(stored.size, start + SLICE))
                check_fit(name, values[np.isfinite(values)], str(dtype), "choose a wider --dtype")
                store(writer, name, start, values, str(dtype))


def _move(
    streams: Streams,
    writer: Writer,
    entry: Entry,
    direction: Float32[ndarray, " count"],
    scale: float,
    dtype: str | None,
) -> None:
    """Write base + scale * direction for an entry, a slice at a time; running variances stay >= 0, as in memory."""
    stored = streams.base.tensors[entry.name]
    flat = array(entry.base).reshape(-1)
    for start in range(0, len(direction), SLICE):
        stop, place = min(len(direction), start + SLICE), entry.start + start
        wide = streams.base.read(entry.name, place, entry.start + stop) if stored.dtype == "F64" else flat[start:stop]
        with np.errstate(all="ignore"):
            moved = direction[start:stop].astype(wide.dtype) * scale
            still = moved == 0
            moved += wide
        if entry.name.endswith("running_var"):
            np.maximum(moved, 0, out=moved)
        np.copyto(moved, wide, where=still)  # -0.0 + 0.0 would be 0.0
        check_fit(entry.name, moved, dtype or stored.dtype, "choose a smaller --scale, or a wider --dtype")
        for name in streams.names_of(entry.name):
            store(writer, name, place, moved, dtype or stored.dtype)


def check_fit(name: str, values: Float[ndarray, " count"], dtype: str, fix: str) -> None:
    """Raise for numbers of a result that a type cannot hold, NaN and infinity among them."""
    if not peak(values) < LARGEST[dtype]:
        raise TaskvecError(f"'{name}' of the result holds NaN, infinity or values that {dtype} cannot hold", fix)


def store(writer: Writer, name: str, start: int, values: Float[ndarray, " count"], dtype: str) -> None:
    """Write numbers of a tensor from its element ``start`` on, as a type stores them."""
    with np.errstate(over="ignore"):
        raw = narrow(values, dtype)
    writer.write(name, start * raw.itemsize, raw.view(np.uint8).data)


def _index(folder: Path, base: Checkpoint, layout: Sequence[Shard], target: Target) -> None:
    """Write beside shards which of them holds what; what the base's index says beyond that is kept."""
    if target.single or not (base.sharded or target.limit):
        return
    said = dict((base.index or {}).get("metadata") or {}) | {"total_size": sum(shard.length for shard in layout)}
    places = {name: Path(shard.name).name for shard in layout for name in shard.tensors}
    stem = base.index_name if target.limit is None else f"{base.stem}{INDEX}"
    write_json(folder / Path(layout[0].name).parent / stem, {"metadata": said, "weight_map": places})


def _publish(folder: Path, base: Checkpoint, layouts: Sequence[Sequence[Shard]], target: Target) -> list[Path]:
    """Move finished files to their place: one file, or the whole folder with the base's configuration."""
    if target.single:
        (folder / target.out.name).replace(target.out)
        return [target.out]
    for place in {(folder / layout[0].name).parent for layout in layouts}:
        for beside in sorted(base.path.iterdir()) if base.path.is_dir() else []:
            if beside.suffix in BESIDE and beside.is_file() and not beside.name.endswith(INDEX):
                shutil.copyfile(beside, place / beside.name)
    folder.rename(target.out)
    tops = (Path(layout[0].name).parts for layout in layouts)
    return [target.out / top[0] if len(layouts) > 1 else target.out for top in tops]
