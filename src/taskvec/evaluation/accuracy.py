"""Accuracy of encoders with their heads, normalised accuracy (paper, equation 1), paired confidence intervals.

A task of another type than classification has its own metric in the place of accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, Shaped
from torch import Tensor

from taskvec.core.errors import TaskvecError
from taskvec.data.tasks import Split, Task
from taskvec.encoders.backbone import Backbone
from taskvec.evaluation.sampling import Shares, drawn, sample
from taskvec.learning.heads import Head, features_of
from taskvec.weights import vectors
from taskvec.weights.flat import Weights

Scores = Bool[np.ndarray, " count"] | Float64[np.ndarray, " count"]
"""How right a model is on each image: yes or no, or the share of its patches."""


def per_image_scores(backbone: Backbone, weights: Weights, split: Split, head: Head) -> Scores:
    """Return for every image of a split whether the encoder at ``weights`` with ``head`` gives its class.

    Heads of other task types say whether the angle is near, or give the share of patches whose class is right.
    """
    with backbone.at(weights):
        scores: Scores = head.score(*features_of(backbone, split, head.kind)).cpu().numpy()
    return scores


def accuracy(backbone: Backbone, weights: Weights, split: Split, head: Head) -> float:
    """Return the accuracy (a fraction) on a split of the encoder at ``weights`` with ``head``."""
    return float(per_image_scores(backbone, weights, split, head).mean())


def some(split: Split, places: Int64[np.ndarray, " places"]) -> Split:
    """Return the images at some places of a split; all of them are the split itself, not copied."""
    return split if len(places) == len(split) else Split(split.images[places], split.labels[places])


def sampled_accuracies(
    backbone: Backbone,
    weights: Weights,
    splits: Sequence[Split],
    heads: Sequence[Head],
    tolerance: float,
    seed: int = 0,
) -> Shares:
    """Return the accuracy on each split, from as many images as the half-width of their mean takes (``tolerance``).

    Images are drawn in a seeded order of each split; with tolerance 0 every image is looked at.
    """

    def right(start: int, stop: int) -> Float64[np.ndarray, " splits"]:
        """Return the sum of scores over some places of the order of each split."""
        scores = []
        for place, (split, head) in enumerate(zip(splits, heads, strict=True)):
            few = some(split, drawn(len(split), start, stop, seed, place))
            scores.append(float(per_image_scores(backbone, weights, few, head).sum()) if len(few) else 0.0)
        return np.array(scores)

    return sample(right, np.array([len(split) for split in splits]), tolerance)


def evaluate(
    backbone: Backbone, weights: Weights, tasks: Sequence[Task], heads: Sequence[Head], split: str = "test"
) -> dict[str, float]:
    """Return the accuracy (a fraction) of each task by name, under common weights and with the task's own head.

    Two tasks of one name raise.
    """
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise TaskvecError(f"two tasks are named '{name}'", "give each a name: dataclasses.replace(task, name=...)")
    pairs = zip(tasks, heads, strict=True)
    return {task.name: accuracy(backbone, weights, getattr(task, split), head) for task, head in pairs}


def accuracies(backbone: Backbone, tasks: Sequence[Task], heads: Sequence[Head]) -> tuple[float, ...]:
    """Return the validation accuracy of each task under the backbone's present weights."""
    pairs = zip(tasks, heads, strict=True)
    scores = [head.score(*features_of(backbone, task.validation, task.kind)) for task, head in pairs]
    return tuple(means(scores))


def means(scores: Sequence[Shaped[Tensor, "..."]]) -> list[float]:
    """Return the mean of each of several scores, in float64; they are fetched from the device together."""
    values: list[float] = torch.stack([score.double().mean() for score in scores]).tolist()
    return values


def fine_tuned_accuracies(
    backbone: Backbone, task_vectors: Sequence[Weights], tasks: Sequence[Task], heads: Sequence[Head]
) -> list[float]:
    """Return the validation accuracy of each task under its own fine-tuned weights, by which others are normalised."""
    values: list[float] = []
    with backbone.at():
        for vector, task, head in zip(task_vectors, tasks, heads, strict=True):
            vectors.move(backbone.bound, backbone.pretrained, [vector], [1.0])
            values += accuracies(backbone, [task], [head])
    return values


def normalised_accuracy(merged: Sequence[float], fine_tuned: Sequence[float]) -> float | None:
    """Return mean_t acc_t(merged) / acc_t(fine-tuned), both on one split; None where a fine-tuned accuracy is zero."""
    if any(value == 0 for value in fine_tuned):
        return None
    return float(np.mean([a / b for a, b in zip(merged, fine_tuned, strict=True)]))


@dataclass(frozen=True)
class ConfidenceInterval:
    """A difference of accuracies (fractions) with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    ours: Mapping[str, Scores],
    baseline: Mapping[str, Scores],
    draws: int = 10_000,
    seed: int = 0,
    of: Mapping[str, float] | None = None,
) -> ConfidenceInterval:
    """Return the mean over tasks of the accuracy gained on the same test images, with its percentile interval.

    ``of`` has the value of each task that its difference is divided by, where tasks differ in their metric.

    Images are drawn anew within each task. An image gains, loses or ties (or differs by one of a few shares), so a draw
    of n images is one draw of as many counts from a multinomial: exact, and as fast for a million images as for ten.
    """
    generator = np.random.default_rng(seed)
    means, samples = [], []
    for task in baseline:
        difference, values = differences(ours[task], baseline[task])
        unit = of[task] if of else 1.0
        share = np.array([(difference == value).mean() for value in values])
        counts = generator.multinomial(len(difference), share / share.sum(), size=draws)
        means.append(difference.mean() / unit)
        samples.append(counts @ values / len(difference) / unit)
    low, high = np.quantile(np.mean(samples, axis=0), [0.025, 0.975])
    return ConfidenceInterval(float(np.mean(means)), float(low), float(high))


def differences(ours: Scores, baseline: Scores) -> tuple[Shaped[np.ndarray, " count"], Shaped[np.ndarray, " values"]]:
    """Return the difference of two models on every image, and which values it takes (-1, 0 and 1 for yes and no)."""
    if ours.dtype == bool:
        return ours.astype(np.int8) - baseline.astype(np.int8), np.array([-1, 0, 1])
    difference = ours - baseline
    return difference, np.unique(difference)
