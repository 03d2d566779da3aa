"""Weight disentanglement error xi of two tasks (paper, section 4.1) or of a set, and the choice of pairs and sets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from taskvec.core.progress import Progress, no_progress
from taskvec.encoders.backbone import Backbone
from taskvec.learning.heads import Head
from taskvec.weights import vectors
from taskvec.weights.flat import Weights

Images = UInt8[np.ndarray, "_ 3 size size"]
Labels = Int64[np.ndarray, "_ ..."]
Predictions = Int64[np.ndarray, "points ..."]
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


def predictions(backbone: Backbone, head: Head, images: Images) -> Labels:
    """Return the predicted classes (of every patch, or sectors of angles) under the backbone's present weights."""
    features = backbone.features(images, per_patch=head.task_type.per_patch)
    predicted: Labels = head.predict(features).cpu().numpy()
    return predicted


def single_predictions(
    backbone: Backbone,
    vector: Weights,
    head: Head,
    images: Images,
    scales: Sequence[float],
    progress: Progress = no_progress,
) -> Predictions:
    """Return f(x; theta_pre + l * tau) for every coefficient: they depend on one axis only and serve all pairs."""
    rows = []
    with backbone.at():
        for index, scale in enumerate(scales):
            vectors.move(backbone.bound, backbone.pretrained, [vector], [scale])
            rows.append(predictions(backbone, head, images))
            progress((index + 1) / len(scales))
    return np.stack(rows)


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
    shares = np.zeros((2, len(scales), len(scales)))
    with backbone.at():
        for (i, first_scale), (j, second_scale) in itertools.product(enumerate(scales), enumerate(scales)):
            vectors.move(backbone.bound, backbone.pretrained, task_vectors, (first_scale, second_scale))
            for task, (place, other_scale) in enumerate([(i, second_scale), (j, first_scale)]):
                if other_scale != 0:
                    merged = predictions(backbone, heads[task], images[task])
                    shares[task, i, j] = changed(merged, singles[task][place])
            progress((i * len(scales) + j + 1) / len(scales) ** 2)
    return Errors(tuple(scales), shares[0], shares[1])


def changed(merged: Labels, single: Labels) -> float:
    """Return the share of predictions that differ from those under a task's own vector, or give no class (-1)."""
    return float(np.mean((merged != single) | (merged < 0)))


def latin_points(axis: int, tasks: int, points: int, seed: int) -> Int64[np.ndarray, "points tasks"]:
    """Return seeded points as places on an axis, on which each task takes all places about equally often."""
    generator = np.random.default_rng(seed)
    columns = [
        np.concatenate([generator.permutation(axis) for _ in range(math.ceil(points / axis))])[:points]
        for _ in range(tasks)
    ]
    return np.stack(columns, axis=1)


def set_error(
    backbone: Backbone,
    task_vectors: Sequence[Weights],
    heads: Sequence[Head],
    images: Sequence[Images],
    singles: Sequence[Predictions],
    axis: Sequence[float],
    points: int,
    seed: int = 0,
) -> float:
    """Measure the disentanglement error of T tasks: the mean of xi_T over seeded points.

    xi_T(l) = 2/T sum_t P_t[f(x; theta_pre + l_t tau_t) != f(x; theta_pre + sum_s l_s tau_s)], which is the paper's xi
    for two tasks and within 0 to 2 for any number. Each task's coefficients are those of ``axis`` in turn, for which
    ``singles`` hold its predictions under its own vector.
    """
    errors = []
    with backbone.at():
        for places in latin_points(len(axis), len(task_vectors), points, seed):
            vectors.move(backbone.bound, backbone.pretrained, task_vectors, [axis[place] for place in places])
            for place, head, task_images, single in zip(places, heads, images, singles, strict=True):
                errors.append(changed(predictions(backbone, head, task_images), single[place]))
    return 2 * float(np.mean(errors))


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
