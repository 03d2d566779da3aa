"""Accuracy, normalised accuracy (paper, equation 1) and paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Shaped

from taskvec.core.errors import TaskvecError
from taskvec.data.tasks import Split, Task
from taskvec.encoders.backbone import Backbone
from taskvec.learning.heads import Head, features_of
from taskvec.weights.flat import Weights

Scores = Bool[np.ndarray, " count"] | Float64[np.ndarray, " count"]
"""How right a model is on every image: yes or no, or the share of its patches."""


def correct(backbone: Backbone, weights: Weights, split: Split, head: Head) -> Scores:
    """Say for every image of a split whether the encoder at ``weights`` with ``head`` gives its class.

    Heads of other kinds say whether the angle is near, or give the share of patches whose class is right.
    """
    with backbone.at(weights):
        right: Scores = head.score(*features_of(backbone, split, head.kind)).numpy()
    return right


def evaluate(
    backbone: Backbone, weights: Weights, tasks: Sequence[Task], heads: Sequence[Head], split: str = "test"
) -> dict[str, float]:
    """Return the accuracy (or its kind's metric; a fraction) of each task under common weights, with its own head.

    They are by name, so two tasks of one name raise.
    """
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise TaskvecError(f"two tasks are named '{name}'", "give each a name: dataclasses.replace(task, name=...)")
    pairs = zip(tasks, heads, strict=True)
    return {task.name: float(correct(backbone, weights, getattr(task, split), head).mean()) for task, head in pairs}


def normalised_accuracy(merged: Sequence[float], fine_tuned: Sequence[float]) -> float | None:
    """Return mean_t acc_t(merged) / acc_t(fine-tuned), both on one split; None where a fine-tuned accuracy is zero.

    Each task may have a metric of its own in the place of accuracy.
    """
    if any(value == 0 for value in fine_tuned):
        return None
    return float(np.mean([a / b for a, b in zip(merged, fine_tuned, strict=True)]))


@dataclass(frozen=True)
class Gain:
    """A difference of accuracies (fractions) with its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_gain(
    ours: Mapping[str, Scores],
    baseline: Mapping[str, Scores],
    draws: int = 10_000,
    seed: int = 0,
    of: Mapping[str, float] | None = None,
) -> Gain:
    """Bootstrap the mean over tasks of the accuracy gained on the same test images (percentile interval).

    ``of`` has the value of each task that its change is divided by, where tasks differ in their metric.

    Images are drawn anew within each task. An image gains, loses or ties (or changes by one of a few shares), so a draw
    of n images is one draw of as many counts from a multinomial: exact, and as fast for a million images as for ten.
    """
    generator = np.random.default_rng(seed)
    means, samples = [], []
    for task in baseline:
        change, values = changes(ours[task], baseline[task])
        unit = of[task] if of else 1.0
        share = np.array([(change == value).mean() for value in values])
        counts = generator.multinomial(len(change), share / share.sum(), size=draws)
        means.append(change.mean() / unit)
        samples.append(counts @ values / len(change) / unit)
    low, high = np.quantile(np.mean(samples, axis=0), [0.025, 0.975])
    return Gain(float(np.mean(means)), float(low), float(high))


def changes(ours: Scores, baseline: Scores) -> tuple[Shaped[np.ndarray, " count"], Shaped[np.ndarray, " values"]]:
    """Return the difference of two models on every image, and which values it takes (-1, 0 and 1 for yes and no)."""
    if ours.dtype == bool:
        return ours.astype(np.int8) - baseline.astype(np.int8), np.array([-1, 0, 1])
    change = ours - baseline
    return change, np.unique(change)
