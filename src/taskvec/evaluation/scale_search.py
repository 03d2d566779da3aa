"""Scale search: the choice of the scale (lambda) of a merged vector, on validation data only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.core.progress import Progress, no_progress
from taskvec.core.settings import Probe, Surgery, coarse, parse_scales
from taskvec.core.task_types import TASK_TYPES
from taskvec.data.tasks import Split, Task
from taskvec.encoders.backbone import Backbone
from taskvec.evaluation.accuracy import accuracies, fine_tuned_accuracies, means, normalised_accuracy
from taskvec.learning.heads import Features, Head, Labels, features_of, fit
from taskvec.learning.surgery import fit_surgery
from taskvec.merging.in_memory import merge_vectors
from taskvec.merging.registry import ADDITION, find_recipe
from taskvec.weights import vectors
from taskvec.weights.flat import Weights

COORDINATE_STRIDES = (4, 1)
"""Strides of the coordinate search in places of the grid: coarse, then fine."""
SHARE = 1 / 8
"""Share of a GPU's memory that features at several scales may take together."""


@dataclass(frozen=True)
class ScaleSearch:
    """The outcome of a scale search: the chosen scale, and what was measured on validation to choose it.

    ``values`` has the objective at each scale, ``accuracies`` a row a scale with the accuracy of each task.
    """

    scale: float
    scales: tuple[float, ...]
    values: tuple[float, ...]
    accuracies: tuple[tuple[float, ...], ...]


def best_candidate(candidates: Sequence[float], values: Sequence[float]) -> float:
    """Return the candidate (a scale, a rate) with the highest value; ties go to the smaller one."""
    return max(zip(candidates, values, strict=True), key=lambda pair: (pair[1], -pair[0]))[0]


def untried_neighbours(grid: Sequence[float], tried: Sequence[float], best: float, step: int) -> list[float]:
    """Return the untried scales ``step`` places to the left and right of the best one so far."""
    place = list(grid).index(best)
    near = [place - step, place + step]
    return [grid[i] for i in near if 0 <= i < len(grid) and grid[i] not in tried]


def objective(accuracies: Sequence[float], fine_tuned: Sequence[float]) -> float:
    """Return what a search maximises: normalised accuracy, or the mean accuracy where a fine-tuned one is zero."""
    normalised = normalised_accuracy(accuracies, fine_tuned)
    return float(np.mean(accuracies)) if normalised is None else normalised


def features_along(
    backbone: Backbone, vector: Weights, split: Split, task_type: str, scales: Sequence[float]
) -> Iterator[tuple[Features, Labels]]:
    """Yield features and labels of a split at every scale along a vector, within the caller's ``backbone.at()``.

    Features of a linearised encoder are f_0 + scale * J tau, so that two passes serve all scales.
    """
    if backbone.base is None or len(scales) <= 2:
        yield from (_features_at(backbone, vector, split, task_type, scale) for scale in scales)
        return
    (start, labels), (end, _) = (_features_at(backbone, vector, split, task_type, scale) for scale in (0.0, 1.0))
    yield from ((start + scale * (end - start), labels) for scale in scales)


def _features_at(
    backbone: Backbone, vector: Weights, split: Split, task_type: str, scale: float
) -> tuple[Features, Labels]:
    vectors.move(backbone.bound, backbone.pretrained, [vector], [scale])
    return features_of(backbone, split, task_type)


def kept_curve(
    backbone: Backbone,
    merged: Weights,
    task: Task,
    head: Head,
    scales: Sequence[float],
    progress: Progress = no_progress,
) -> list[float]:
    """Return the validation accuracy of a task at each scale along a merged vector, with its probed head kept.

    Scores stay on the device until all scales are done.
    """
    scores, head = [], head.on(backbone.device)
    with backbone.at():
        pairs = features_along(backbone, merged, task.validation, task.kind, scales)
        for index, (features, labels) in enumerate(pairs):
            scores.append(head.score(features, labels))
            progress((index + 1) / len(scales))
    return means(scores) if scores else []


@dataclass(frozen=True)
class CoordinateSearch:
    """The outcome of a search for one scale a task: the scales, and all trials (scales, accuracies), the best last."""

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
) -> CoordinateSearch:
    """Give every task vector a scale of its own (paper, section 2), one after the other from the common ``start``.

    A sweep tries a neighbour to either side on the grid for every task and keeps what raises the mean normalised
    validation accuracy (ties keep what is there); sweeps of a stride go on until nothing moves, wide strides first.
    """
    places, heads = [list(grid).index(start)] * len(tasks), [head.on(backbone.device) for head in heads]
    trials: dict[tuple[int, ...], tuple[float, ...]] = {}

    def value(point: list[int]) -> float:
        if tuple(point) not in trials:
            with backbone.at():
                vectors.move(backbone.bound, backbone.pretrained, task_vectors, [grid[place] for place in point])
                trials[tuple(point)] = accuracies(backbone, tasks, heads)
        return objective(trials[tuple(point)], fine_tuned)

    for done, stride in enumerate(COORDINATE_STRIDES):
        before: list[int] = []
        while places != before:
            before = places
            for index in range(len(tasks)):
                near = [places[index], places[index] - stride, places[index] + stride]
                options = [[*places[:index], place, *places[index + 1 :]] for place in near if 0 <= place < len(grid)]
                places = max(options, key=value)
        progress((done + 1) / len(COORDINATE_STRIDES))
    best = trials.pop(tuple(places))
    tried = {tuple(grid[place] for place in point): row for point, row in [*trials.items(), (tuple(places), best)]}
    return CoordinateSearch(tuple(grid[place] for place in places), tuple(tried.items()))


def coarse_search(
    backbone: Backbone,
    merged: Weights,
    tasks: Sequence[Task],
    heads: Sequence[Head],
    fine_tuned: Sequence[float],
    grid: Sequence[float],
) -> ScaleSearch:
    """Choose the scale of a merged vector coarse to fine: every fifth of the grid, then neighbours of the best."""
    rows: dict[float, tuple[float, ...]] = {}

    def best_of(scales: Sequence[float]) -> float:
        curves = [kept_curve(backbone, merged, *pair, scales) for pair in zip(tasks, heads, strict=True)]
        rows.update({scale: tuple(curve[i] for curve in curves) for i, scale in enumerate(scales)})
        return best_candidate(list(rows), [objective(row, fine_tuned) for row in rows.values()])

    best = best_of(coarse(grid))
    for step in (2, 1):
        near = untried_neighbours(grid, list(rows), best, step)
        best = best_of(near) if near else best
    ordered = sorted(rows)
    values = tuple(objective(rows[scale], fine_tuned) for scale in ordered)
    return ScaleSearch(best, tuple(ordered), values, tuple(rows[scale] for scale in ordered))


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

    The probe's own settings, learning rate and seed are used, so that scale 0 gives the probed head back. On a GPU it
    does so but for rounding, where heads of as many scales are fitted together as ``scales_together`` says.
    """
    heads: list[Head] = []
    values: list[float] = []
    train = features_along(backbone, merged, task.train, task.kind, scales)
    validation = features_along(backbone, merged, task.validation, task.kind, scales)
    together = scales_together(task.train, task.kind, backbone.width, backbone.device)
    with backbone.at():
        while pairs := list(islice(train, together)):
            features, labels = stacked([features for features, _ in pairs]), pairs[0][1]
            fitted = fit(features, labels, len(task.classes), [rate], settings, seed, kind=task.kind)
            for head, pair in zip(fitted, validation, strict=False):
                values.append(head.accuracy(*pair))
                progress(len(values) / len(scales))
            heads += fitted
    return values, heads


def corrected_curve(
    backbone: Backbone,
    merged: Weights,
    fine_tuned: Weights,
    task: Task,
    head: Head,
    settings: Surgery,
    scales: Sequence[float],
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[list[float], list[Head]]:
    """Learn a correction of the merged encoder's features at each scale; return validation accuracies and heads.

    It brings features of training images, without labels, towards those of the fine-tuned encoder; the head is kept.
    """
    heads: list[Head] = []
    values: list[float] = []
    together = scales_together(task.train, task.kind, backbone.width, backbone.device)
    with backbone.at(fine_tuned):
        target, _ = features_of(backbone, task.train, task.kind)
        for start in range(0, len(scales), together):
            group = scales[start : start + together]
            pairs = features_along(backbone, merged, task.train, task.kind, group)
            fitted = fit_surgery(stacked([features for features, _ in pairs]), target, head, settings, seed)
            validation = features_along(backbone, merged, task.validation, task.kind, group)
            for corrected, pair in zip(fitted, validation, strict=True):
                values.append(corrected.accuracy(*pair))
                progress(len(values) / len(scales))
            heads += fitted
    return values, heads


def scales_together(split: Split, task_type: str, width: int, device: str) -> int:
    """Return at how many scales heads are fitted on a split's features at once: one on a CPU.

    On a GPU features may take ``SHARE`` of its whole memory: what happens to be free decides nothing.
    """
    if not device.startswith("cuda"):
        return 1
    count = split.labels.size if TASK_TYPES[task_type].per_patch else len(split)
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, int(SHARE * memory) // (count * width * 4))


def stacked(features: Sequence[Features]) -> Float[Tensor, "scales count *patches width"]:
    """Return features at several scales as one tensor; those of one scale are not copied."""
    return features[0][None] if len(features) == 1 else torch.stack(list(features))


def search_scale(
    backbone: Backbone,
    task_vectors: Sequence[Weights],
    tasks: Sequence[Task],
    heads: Sequence[Head],
    method: str = ADDITION,
    scales: str | Sequence[float] | None = None,
) -> ScaleSearch:
    """Choose the scale with kept heads by the highest mean normalised accuracy on the tasks' validation splits.

    A study tries scales in steps of its own, and the step ``choose_scale`` chooses by the same rule.
    """
    grid = (
        parse_scales(scales or find_recipe(method).scales)
        if scales is None or isinstance(scales, str)
        else list(scales)
    )
    tuned = fine_tuned_accuracies(backbone, task_vectors, tasks, heads)
    merged = merge_vectors(backbone.pretrained, task_vectors, method)
    curves = [kept_curve(backbone, merged, task, head, grid) for task, head in zip(tasks, heads, strict=True)]
    rows = tuple(zip(*curves, strict=True))
    values = tuple(objective(row, tuned) for row in rows)
    return ScaleSearch(best_candidate(grid, values), tuple(grid), values, rows)
