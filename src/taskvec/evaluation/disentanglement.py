"""Weight disentanglement error xi of two tasks (paper, section 4.1) or of a set, and the choice of pairs and sets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64, Shaped, UInt8
from torch import Tensor

from taskvec.core.progress import Progress, no_progress
from taskvec.data.uploads import placed
from taskvec.encoders.backbone import Backbone
from taskvec.evaluation import sampling
from taskvec.learning.heads import Head
from taskvec.weights import vectors
from taskvec.weights.flat import Weights

Images = UInt8[np.ndarray, "_ 3 size size"] | UInt8[Tensor, "_ 3 size size"]
Predictions = Shaped[np.ndarray, "points _ ..."]
Draw = Int64[np.ndarray, "_"]
"""Places of the images that are looked at."""
BOX_AXIS = (-0.875, -0.625, -0.375, -0.125, 0.125, 0.375, 0.625, 0.875)
"""Coefficients of points in the box [-1, 1]^T: the middles of eight equal parts, so that every task is added."""


@dataclass(frozen=True)
class Errors:
    """The two terms of xi on a grid: ``first[i, j]`` is task 1's share of changed predictions at scales i and j."""

    scales: tuple[float, ...]
    first: Float64[np.ndarray, "points points"]
    second: Float64[np.ndarray, "points points"]

    def xi(self) -> Float64[np.ndarray, "points points"]:
        """Return the disentanglement error, 0 to 2."""
        total: Float64[np.ndarray, "points points"] = self.first + self.second
        return total


def predictions(backbone: Backbone, head: Head, images: Images) -> Int64[Tensor, " count *patches"]:
    """Return the predicted classes (of every patch, or sectors of angles) at the present weights, on the device."""
    return head.predict(backbone.features(images, per_patch=head.task_type.per_patch))


def single_predictions(
    backbone: Backbone,
    vector: Weights,
    head: Head,
    images: Images,
    scales: Sequence[float],
    progress: Progress = no_progress,
) -> Predictions:
    """Return f(x; theta_pre + l * tau) for every coefficient: they depend on one axis only and serve all pairs.

    They are of the smallest type of integers that holds the classes of the head, and -1 for none.
    """
    images, head, rows = backbone.resident(images), head.on(backbone.device), []
    with backbone.at():
        for index, scale in enumerate(scales):
            vectors.move(backbone.bound, backbone.pretrained, [vector], [scale])
            rows.append(predictions(backbone, head, images))
            progress((index + 1) / len(scales))
    classes = torch.stack(rows).cpu().numpy()
    return classes.astype(smallest_type(int(classes.max(initial=0))))


def smallest_type(largest: int) -> np.dtype[Any]:
    """Return the smallest signed type that holds the integers from -1 to ``largest``."""
    types = (np.dtype(name) for name in ("int8", "int16", "int32", "int64"))
    return next(kind for kind in types if largest <= np.iinfo(kind).max)


@dataclass(frozen=True)
class Compared:
    """What is compared of some tasks: their vectors and heads, images, and predictions for these along each own vector.

    Everything but the encoder's weights lies where passes find it (``compared``).
    """

    task_vectors: Sequence[Weights]
    heads: Sequence[Head]
    images: Sequence[Images]
    singles: Sequence[Int64[Tensor, "points _ ..."]]


def compared(
    backbone: Backbone,
    task_vectors: Sequence[Weights],
    heads: Sequence[Head],
    images: Sequence[Images],
    singles: Sequence[Predictions],
) -> Compared:
    """Put heads, images and predictions where passes find them, once for all points."""
    return Compared(
        task_vectors,
        [head.on(backbone.device) for head in heads],
        [backbone.resident(split) for split in images],
        [torch.from_numpy(rows.astype(np.int64)).to(backbone.device) for rows in singles],
    )


def changes_at(
    backbone: Backbone,
    tasks: Compared,
    places: Sequence[int],
    axis: Sequence[float],
    draws: Sequence[Draw] | None = None,
) -> Int64[Tensor, " tasks"]:
    """Return how many predictions of each task change at a point, on the device; the backbone stays there.

    ``places`` are those of its coefficients on the axis, ``draws`` those of the images that are looked at (all).
    A task to which nothing else is added is compared with itself: nothing changes, and no image passes.
    """
    scales = [axis[place] for place in places]
    vectors.move(backbone.bound, backbone.pretrained, tasks.task_vectors, scales)
    counts = []
    for index, (head, images, singles) in enumerate(zip(tasks.heads, tasks.images, tasks.singles, strict=True)):
        single = singles[places[index]]
        if draws is not None:
            order = placed(draws[index], str(single.device))
            images = images[order] if isinstance(images, Tensor) else images[draws[index]]
            single = single[order]
        alone = not len(images) or not any(scales[:index] + scales[index + 1 :])
        counts.append(single.new_zeros(()) if alone else changed(predictions(backbone, head, images), single))
    return torch.stack(counts)


def changed(merged: Int64[Tensor, " *shape"], single: Int64[Tensor, " *shape"]) -> Int64[Tensor, ""]:
    """Return how many predictions differ from those under a task's own vector, or give no class (-1)."""
    return ((merged != single) | (merged < 0)).sum()


def changes(
    backbone: Backbone,
    tasks: Compared,
    points: Sequence[Sequence[int]],
    axis: Sequence[float],
    draws: Sequence[Sequence[Draw]] | None = None,
    progress: Progress = no_progress,
) -> Int64[np.ndarray, "points tasks"]:
    """Return how many predictions of each task change at each point, which is given by its places on the axis.

    ``draws`` holds for each point which images of each task are looked at there; all where it is left out.
    """
    counts = []
    with backbone.at():
        for index, places in enumerate(points):
            some = None if draws is None else draws[index]
            counts.append(changes_at(backbone, tasks, places, axis, some))
            progress((index + 1) / len(points))
    if not counts:
        return np.zeros((0, len(tasks.heads)), np.int64)
    table: Int64[np.ndarray, "points tasks"] = torch.stack(counts).cpu().numpy()
    return table


def disentanglement(
    backbone: Backbone,
    task_vectors: tuple[Weights, Weights],
    heads: tuple[Head, Head],
    images: tuple[Images, Images],
    scales: Sequence[float],
    singles: tuple[Predictions, Predictions] | None = None,
    progress: Progress = no_progress,
) -> Errors:
    """Measure xi(l1, l2) on a grid; on the axes, where one term compares a model with itself, that term is 0.

    Where the merged model gives no class (NaN scores) the prediction counts as changed. Where a task has a label a
    patch, it is the share of patches that change; an angle changes when it falls into another sector.
    """
    if singles is None:
        first, second = (
            single_predictions(backbone, v, h, x, scales) for v, h, x in zip(task_vectors, heads, images, strict=True)
        )
        singles = first, second
    tasks = compared(backbone, task_vectors, heads, images, singles)
    points = list(itertools.product(range(len(scales)), repeat=2))
    counts = changes(backbone, tasks, points, scales, progress=progress)
    shares = (counts / [rows[0].size for rows in singles]).T.reshape(2, len(scales), len(scales))
    return Errors(tuple(scales), shares[0], shares[1])


def latin_points(axis: int, tasks: int, points: int, seed: int) -> Int64[np.ndarray, "points tasks"]:
    """Return seeded points as places on an axis, on which each task takes all places about equally often."""
    generator = np.random.default_rng(seed)
    columns = [
        np.concatenate([generator.permutation(axis) for _ in range(math.ceil(points / axis))])[:points]
        for _ in range(tasks)
    ]
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class Sampled:
    """A mean with its 95 % half-width, and from how many images of every stratum it is, at most."""

    value: float
    half_width: float
    images: int


def set_error(
    backbone: Backbone,
    task_vectors: Sequence[Weights],
    heads: Sequence[Head],
    images: Sequence[Images],
    singles: Sequence[Predictions],
    axis: Sequence[float],
    points: int,
    seed: int = 0,
    tolerance: float = 0.0,
) -> Sampled:
    """Measure the disentanglement error of T tasks: the mean of xi_T over seeded points.

    xi_T(l) = 2/T sum_t P_t[f(x; theta_pre + l_t tau_t) != f(x; theta_pre + sum_s l_s tau_s)], which is the paper's xi
    for two tasks and within 0 to 2 for any number. Each task's coefficients are those of ``axis`` in turn, for which
    ``singles`` hold its predictions under its own vector.

    Images are drawn anew for every task and point until the half-width is at most ``tolerance`` (of 0 to 2); 0 looks at
    all.
    """
    places = latin_points(len(axis), len(task_vectors), points, seed)
    tasks, sizes = compared(backbone, task_vectors, heads, images, singles), [len(split) for split in images]
    labels = np.array([rows[0, 0].size for rows in singles])

    def count(start: int, stop: int) -> Float64[np.ndarray, " strata"]:
        """Return how many images of each task change at each point, of those in some places of its order there."""
        draws = [
            [sampling.drawn(size, start, stop, seed, point, task) for task, size in enumerate(sizes)]
            for point in range(points)
        ]
        counts: Float64[np.ndarray, "points tasks"] = changes(backbone, tasks, places.tolist(), axis, draws) / labels
        return counts.ravel()

    mean = sampling.sample(count, np.tile(sizes, points), tolerance / 2)
    return Sampled(2 * float(mean.shares.mean()), 2 * mean.half_width, mean.images)


def choose_sets(names: Sequence[str], size: int, count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Return ``count`` seeded sets of ``size`` names (all of them where there are no more), every name about as often.

    Names keep their order within a set.
    """
    if math.comb(len(names), size) <= count:
        return list(itertools.combinations(names, size))
    generator = np.random.default_rng([seed, size])
    uses = dict.fromkeys(names, 0)
    chosen: dict[tuple[str, ...], None] = {}
    while len(chosen) < count:
        order = dict(zip(names, generator.random(len(names)), strict=True))
        rarest = sorted(names, key=lambda name: (uses[name], order[name]))[:size]
        members = tuple(name for name in names if name in rarest)
        if members in chosen:  # the rarest names were together before: any set will do
            members = tuple(names[i] for i in sorted(generator.choice(len(names), size, replace=False)))
        if members not in chosen:
            chosen[members] = None
            uses |= {name: uses[name] + 1 for name in members}
    return list(chosen)


def spread_sets(names: Sequence[str], sizes: Sequence[int], limit: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Return at most ``limit`` sets of names, as many of each size as there are or as an even share allows."""
    counts = dict.fromkeys(sizes, 0)
    while sum(counts.values()) < limit:
        open_sizes = [size for size in sizes if counts[size] < math.comb(len(names), size)]
        if not open_sizes:
            break
        counts[min(open_sizes, key=lambda size: counts[size])] += 1
    return [members for size, count in counts.items() for members in choose_sets(names, size, count, seed)]


def choose_pairs(names: Sequence[str], count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return ``count`` seeded pairs of different tasks, spread so that no task recurs before all have been drawn."""
    every = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    order = [every[i] for i in np.random.default_rng(seed).permutation(len(every))]
    chosen: list[tuple[str, str]] = []
    while order and len(chosen) < count:
        used = [name for pair in chosen for name in pair]
        best = min(order, key=lambda pair: used.count(pair[0]) + used.count(pair[1]))
        chosen.append(best)
        order.remove(best)
    return chosen
