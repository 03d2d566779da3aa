"""The choice of the scale (lambda), on validation data only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskvec.core.progress import Progress, no_progress
from taskvec.core.settings import Probe, coarse, parse_scales
from taskvec.data.tasks import Split, Task
from taskvec.encoders.backbone import Backbone
from taskvec.evaluation.accuracy import normalised_accuracy
from taskvec.learning.heads import Features, Head, Labels, accuracy, features_of, fit
from taskvec.merging import in_memory as buffers
from taskvec.merging.registry import ADDITION, find_recipe
from taskvec.weights import vectors
from taskvec.weights.flat import Weights

COORDINATE_STRIDES = (4, 1)
"""A coordinate search moves each task's scale by so many places of the grid."""


@dataclass(frozen=True)
class Search:
    """The outcome of a line search: the chosen scale, and what was measured on validation to choose it."""

    scale: float
    scales: tuple[float, ...]
    values: tuple[float, ...]
    accuracies: tuple[tuple[float, ...], ...]


def choose(scales: Sequence[float], values: Sequence[float]) -> float:
    """Return the scale with the highest value; ties go to the smaller scale (protocol, Task vectors and addition)."""
    return max(zip(scales, values, strict=True), key=lambda pair: (pair[1], -pair[0]))[0]


def refine(grid: Sequence[float], tried: Sequence[float], best: float, step: int) -> list[float]:
    """Return the untried scales ``step`` places to the left and right of the best one so far."""
    place = list(grid).index(best)
    near = [place - step, place + step]
    return [grid[i] for i in near if 0 <= i < len(grid) and grid[i] not in tried]


def value_of(accuracies: Sequence[float], fine_tuned: Sequence[float]) -> float:
    """Return what the search maximises: normalised accuracy, or the mean accuracy where a fine-tuned one is zero."""
    normalised = normalised_accuracy(accuracies, fine_tuned)
    return float(np.mean(accuracies)) if normalised is None else normalised


def merge(
    pretrained: Weights,
    task_vectors: Sequence[Weights],
    scale: float,
    method: str = ADDITION,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Weights:
    """Return theta_pre + scale * direction; the method, or several joined by +, makes it out of the task vectors."""
    return vectors.add(pretrained, direction(pretrained, task_vectors, method, config, seed), scale)


def direction(
    pretrained: Weights,
    task_vectors: Sequence[Weights],
    method: str,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Weights:
    """Return a method's merged task vector."""
    return buffers.direction(find_recipe(method, config), buffers.Buffers(pretrained, task_vectors, seed))


def features_along(
    backbone: Backbone, vector: Weights, split: Split, kind: str, scales: Sequence[float]
) -> Iterator[tuple[Features, Labels]]:
    """Yield features and labels of a split at every scale along a vector; who asks moves the backbone back (``at``).

    Those of a linearised encoder are f_0 + scale * J tau, so that two passes serve all scales.
    """
    if backbone.base is None or len(scales) <= 2:
        yield from (_features_at(backbone, vector, split, kind, scale) for scale in scales)
        return
    (start, labels), (end, _) = (_features_at(backbone, vector, split, kind, scale) for scale in (0.0, 1.0))
    yield from ((start + scale * (end - start), labels) for scale in scales)


def _features_at(backbone: Backbone, vector: Weights, split: Split, kind: str, scale: float) -> tuple[Features, Labels]:
    vectors.move(backbone.bound, backbone.pretrained, [vector], [scale])
    return features_of(backbone, split, kind)


def kept_curve(
    backbone: Backbone,
    merged: Weights,
    task: Task,
    head: Head,
    scales: Sequence[float],
    progress: Progress = no_progress,
) -> list[float]:
    """Return the validation accuracy of a task at each scale along a merged vector, with its probed head kept."""
    values = []
    with backbone.at():
        for index, found in enumerate(features_along(backbone, merged, task.validation, task.kind, scales)):
            values.append(accuracy(head, *found))
            progress((index + 1) / len(scales))
    return values


def accuracies(backbone: Backbone, tasks: Sequence[Task], heads: Sequence[Head]) -> tuple[float, ...]:
    """Return the validation accuracy of each task with the weights that are in the backbone now."""
    pairs = zip(tasks, heads, strict=True)
    return tuple(accuracy(head, *features_of(backbone, task.validation, task.kind)) for task, head in pairs)


def own_accuracies(
    backbone: Backbone, task_vectors: Sequence[Weights], tasks: Sequence[Task], heads: Sequence[Head]
) -> list[float]:
    """Return the validation accuracy of each task with its own fine-tuned encoder, by which others are normalised."""
    each = zip(task_vectors, tasks, heads, strict=True)
    return [kept_curve(backbone, vector, task, head, [1.0])[0] for vector, task, head in each]


@dataclass(frozen=True)
class Coordinates:
    """The outcome of a search for one scale a task: the scales, and everything that was tried, the best one last."""

    scales: tuple[float, ...]
    tried: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]


def coordinate_search(
    backbone: Backbone,
    task_vectors: Sequence[Weights],
    tasks: Sequence[Task],
    heads: Sequence[Head],
    fine_tuned: Sequence[float],
    grid: Sequence[float],
    start: float,
    progress: Progress = no_progress,
) -> Coordinates:
    """Give every task vector a scale of its own (paper, section 2), one after the other from the common ``start``.

    A sweep tries a neighbour to either side on the grid for every task and keeps what raises the mean normalised
    validation accuracy (ties keep what is there); sweeps of a stride go on until nothing moves, wide strides first.
    """
    places = [list(grid).index(start)] * len(tasks)
    known: dict[tuple[int, ...], tuple[float, ...]] = {}

    def value(at: list[int]) -> float:
        if tuple(at) not in known:
            with backbone.at():
                vectors.move(backbone.bound, backbone.pretrained, task_vectors, [grid[place] for place in at])
                known[tuple(at)] = accuracies(backbone, tasks, heads)
        return value_of(known[tuple(at)], fine_tuned)

    for done, stride in enumerate(COORDINATE_STRIDES):
        before: list[int] = []
        while places != before:
            before = places
            for index in range(len(tasks)):
                near = [places[index], places[index] - stride, places[index] + stride]
                options = [[*places[:index], place, *places[index + 1 :]] for place in near if 0 <= place < len(grid)]
                places = max(options, key=value)
        progress((done + 1) / len(COORDINATE_STRIDES))
    best = known.pop(tuple(places))
    tried = {tuple(grid[place] for place in at): found for at, found in [*known.items(), (tuple(places), best)]}
    return Coordinates(tuple(grid[place] for place in places), tuple(tried.items()))


def coarse_search(
    backbone: Backbone,
    merged: Weights,
    tasks: Sequence[Task],
    heads: Sequence[Head],
    fine_tuned: Sequence[float],
    grid: Sequence[float],
) -> Search:
    """Choose the scale of a merged vector coarse to fine: every fifth of the grid, then neighbours of the best."""
    rows: dict[float, tuple[float, ...]] = {}

    def best_of(scales: Sequence[float]) -> float:
        curves = [kept_curve(backbone, merged, *pair, scales) for pair in zip(tasks, heads, strict=True)]
        rows.update({scale: tuple(curve[i] for curve in curves) for i, scale in enumerate(scales)})
        return choose(list(rows), [value_of(row, fine_tuned) for row in rows.values()])

    best = best_of(coarse(grid))
    for step in (2, 1):
        near = refine(grid, list(rows), best, step)
        best = best_of(near) if near else best
    ordered = sorted(rows)
    values = tuple(value_of(rows[scale], fine_tuned) for scale in ordered)
    return Search(best, tuple(ordered), values, tuple(rows[scale] for scale in ordered))


def reprobed_curve(
    backbone: Backbone,
    merged: Weights,
    task: Task,
    rate: float,
    settings: Probe,
    scales: Sequence[float],
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[list[float], list[Head]]:
    """Fit a task's head again on the merged encoder's features at each scale; return validation accuracies and heads.

    The probe's own settings, learning rate and seed are used, so that scale 0 gives the probed head back.
    """
    values, heads = [], []
    train = features_along(backbone, merged, task.train, task.kind, scales)
    validation = features_along(backbone, merged, task.validation, task.kind, scales)
    with backbone.at():
        for index, (fitted_on, measured_on) in enumerate(zip(train, validation, strict=True)):
            head = fit(*fitted_on, len(task.classes), [rate], settings, seed, kind=task.kind)[0]
            heads.append(head)
            values.append(accuracy(head, *measured_on))
            progress((index + 1) / len(scales))
    return values, heads


def search_scale(
    backbone: Backbone,
    task_vectors: Sequence[Weights],
    tasks: Sequence[Task],
    heads: Sequence[Head],
    method: str = ADDITION,
    scales: str | Sequence[float] | None = None,
) -> Search:
    """Choose the scale with kept heads by the highest mean normalised accuracy on the tasks' validation splits."""
    grid = (
        parse_scales(scales or find_recipe(method).scales)
        if scales is None or isinstance(scales, str)
        else list(scales)
    )
    tuned = own_accuracies(backbone, task_vectors, tasks, heads)
    merged = direction(backbone.pretrained, task_vectors, method)
    curves = [kept_curve(backbone, merged, task, head, grid) for task, head in zip(tasks, heads, strict=True)]
    rows = tuple(zip(*curves, strict=True))
    values = tuple(value_of(row, tuned) for row in rows)
    return Search(choose(grid, values), tuple(grid), values, rows)
