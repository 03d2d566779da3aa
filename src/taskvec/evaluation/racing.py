"""Racing: scales leave a line search as soon as a sample of the validation images shows that another is better.

All scales are tried on the same few images of every task, those that are left on more, the last ones on whole splits
(Maron and Moore, Hoeffding Races, NIPS 6, 1994).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64, Shaped

from taskvec.core.progress import Progress, no_progress
from taskvec.data.tasks import Split, Task
from taskvec.encoders.backbone import Backbone
from taskvec.evaluation.scale_search import ScaleSearch, best_candidate, features_along, objective
from taskvec.learning.heads import Head
from taskvec.weights.flat import Weights

LOOKS = (128, 1024)
"""Images of each task at which scales may leave a race; those that are left then go over the whole split."""
LEFT = (1.0, 0.6, 0.25)
"""The share of the scales that were left at each look and for the rest of the splits (benchmarks/racing.py)."""
PORTION = 1024
"""Images that are held in memory while they pass at all scales."""
INDIFFERENCE = 0.002
"""The normalised accuracy that a race may lose against the best scale."""
RISK = 0.05
"""The chance that it loses more."""

TaskScores = Shaped[np.ndarray, "scales _"]
"""How right a task's head is on each image that a race has looked at, at each scale that is left."""


def image_order(size: int, seed: int) -> Int64[np.ndarray, " size"]:
    """Return the order in which a race looks at the images of a split: one drawn without replacement."""
    return np.random.default_rng(seed).permutation(size)


def images_of(look: int, left: int, size: int) -> int:
    """Return how many images of a split of ``size`` are looked at by the end of a look, with so many scales left.

    The last scale that is left needs no more comparison, and goes over the whole split at once.
    """
    return size if left == 1 or look >= len(LOOKS) else min(LOOKS[look], size)


def images_added(look: int, size: int) -> int:
    """Return how many images of a split of ``size`` a look adds to those before, with several scales left."""
    return images_of(look, 2, size) - (images_of(look - 1, 2, size) if look else 0)


def survivors(
    scales: Sequence[float],
    scores: Sequence[TaskScores],
    sizes: Sequence[int],
    fine_tuned: Sequence[float],
    started: int,
) -> list[float]:
    """Return the scales that stay in a race: the best one so far and those that may be better than it.

    It stays alone where none may be better by more than the indifference. ``scores`` are those of every task on the
    images so far, out of ``sizes``; ``started`` counts the scales that began. With a chance of 1 - RISK no bound on
    the lead of the best scale of the grid fails at any look: then it stays until what is chosen is within the
    indifference.
    """
    values = [objective(row, fine_tuned) for row in zip(*(task.mean(axis=1) for task in scores), strict=True)]
    leader = scales.index(best_candidate(scales, values))
    log = math.log(2 * max(started - 1, 1) * len(LOOKS) / RISK)
    leads = upper_bounds([task - task[leader] * 1.0 for task in scores], sizes, task_weights(fine_tuned), log)
    leads[leader] = -math.inf
    decided = leads.max() <= INDIFFERENCE
    return [s for place, s in enumerate(scales) if place == leader or (leads[place] > 0 and not decided)]


def task_weights(fine_tuned: Sequence[float]) -> Float64[np.ndarray, " tasks"]:
    """Return the weight of each task's accuracy in the objective (``scale_search.objective``)."""
    values = np.asarray(fine_tuned, dtype=float)
    return 1 / (len(values) * (values if values.all() else np.ones_like(values)))


def upper_bounds(
    differences: Sequence[Float64[np.ndarray, "scales _"]],
    sizes: Sequence[int],
    weights: Float64[np.ndarray, " tasks"],
    log: float,
) -> Float64[np.ndarray, " scales"]:
    """Return bounds from above of weighted sums of means over whole splits, by samples of values in [-1, 1].

    Each bound fails with a chance of at most 2 exp(-log). With n of N values of a task, weight w, p the mean of squares
    over its split and g = min(1, (N - n) / n), the sum of the samples is sub-gamma with variance v = sum w^2 g p / n
    and scale 2/3 max w / n: Bernstein's inequality, which holds without replacement too (Hoeffding 1963, theorem 4);
    past half of a split, the images that are left are the smaller sample. v is itself bounded by what was seen, as
    sums of squares are rarely far below their mean (Maurer and Pontil, arXiv 0907.3740, theorem 10).
    """
    means, variances = np.zeros(len(differences[0])), np.zeros(len(differences[0]))
    ranges, squares = [0.0], [0.0]
    for values, size, weight in zip(differences, sizes, weights, strict=True):
        count = values.shape[1]
        rest, unit = min(1.0, (size - count) / count), weight / count
        means += weight * values.mean(axis=1)
        variances += unit**2 * rest * (values**2).sum(axis=1)
        ranges, squares = [*ranges, unit * (count < size)], [*squares, unit**2 * rest]
    slack = max(squares) * log / 2
    deviations = np.sqrt(variances + slack) + math.sqrt(slack)
    return means + math.sqrt(2 * log) * deviations + 2 / 3 * max(ranges) * log


def scores_along(
    backbone: Backbone,
    merged: Weights,
    task: Task,
    head: Head,
    scales: Sequence[float],
    places: Int64[np.ndarray, " images"],
    progress: Progress = no_progress,
) -> TaskScores:
    """Return how right a task's kept head is, at scales along a merged vector, on some images of its validation split.

    They are read from disk in the order of the split, a portion at a time, and returned in the order of ``places``.
    Scores of a portion stay on the device until all scales are done.
    """
    rising, head, portions = np.argsort(places), head.on(backbone.device), list[TaskScores]()
    for start in range(0, len(places), PORTION):
        chosen, scores = places[rising[start : start + PORTION]], []
        images: Any = backbone.resident(task.validation.images[chosen])
        split = Split(images, task.validation.labels[chosen])
        with backbone.at():
            for features, targets in features_along(backbone, merged, split, task.kind, scales):
                scores.append(head.score(features, targets))
                progress((start + len(chosen) * len(scores) / len(scales)) / len(places))
        portions.append(torch.stack(scores).cpu().numpy())
    return np.concatenate(portions, axis=1)[:, np.argsort(rising)]


def race_scale(
    backbone: Backbone,
    merged: Weights,
    tasks: Sequence[Task],
    heads: Sequence[Head],
    fine_tuned: Sequence[float],
    grid: Sequence[float],
    seed: int = 0,
) -> ScaleSearch:
    """Choose the scale of a merged vector with kept heads by a race on the tasks' validation splits.

    What is returned was measured on whole splits, at the scales that were left in the end.
    """

    def measure(place: int, scales: Sequence[float], images: Int64[np.ndarray, " images"]) -> TaskScores:
        return scores_along(backbone, merged, tasks[place], heads[place], scales, images)

    return race(measure, [len(task.validation) for task in tasks], fine_tuned, grid, seed)


def race(
    measure: Callable[[int, Sequence[float], Int64[np.ndarray, " images"]], TaskScores],
    sizes: Sequence[int],
    fine_tuned: Sequence[float],
    scales: Sequence[float],
    seed: int = 0,
) -> ScaleSearch:
    """Choose a scale by a race, whatever measures it.

    ``measure`` returns the scores of a task, by its place, at some scales on the images at some places of its split.
    """
    left, orders = list(scales), [image_order(size, seed) for size in sizes]
    scores: list[TaskScores] = [np.empty((len(left), 0)) for _ in sizes]
    for look in range(len(LOOKS) + 1):
        for task, size in enumerate(sizes):
            added = orders[task][scores[task].shape[1] : images_of(look, len(left), size)]
            if len(added):
                scores[task] = np.concatenate([scores[task], measure(task, left, added)], axis=1)
        staying = survivors(left, scores, sizes, fine_tuned, len(scales)) if look < len(LOOKS) else left
        scores = [task[[left.index(scale) for scale in staying]] for task in scores]
        left = staying
    rows = tuple(zip(*(task.mean(axis=1).tolist() for task in scores), strict=True))
    values = tuple(objective(row, fine_tuned) for row in rows)
    return ScaleSearch(best_candidate(left, values), tuple(left), values, rows)
