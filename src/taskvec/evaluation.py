"""Accuracy, normalised accuracy (paper, equation 1) and paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from taskvec.backbones import Backbone
from taskvec.heads import Head, features_of
from taskvec.tasks import Split, Task
from taskvec.weights import Weights


def correct(backbone: Backbone, weights: Weights, split: Split, head: Head) -> Bool[np.ndarray, " count"]:
    """Say for every image of a split whether the encoder at ``weights`` with ``head`` gives its class."""
    backbone.use(weights)
    features, labels = features_of(backbone, split)
    right: Bool[np.ndarray, " count"] = (head.predict(features) == labels).numpy()
    return right


def evaluate(
    backbone: Backbone, weights: Weights, tasks: Sequence[Task], heads: Sequence[Head], split: str = "test"
) -> dict[str, float]:
    """Return the accuracy (a fraction) of each task under common encoder weights, each with its own head."""
    pairs = zip(tasks, heads, strict=True)
    return {task.name: float(correct(backbone, weights, getattr(task, split), head).mean()) for task, head in pairs}


def normalised_accuracy(merged: Sequence[float], fine_tuned: Sequence[float]) -> float | None:
    """Return mean_t acc_t(merged) / acc_t(fine-tuned), both on one split; None where a fine-tuned accuracy is zero."""
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
    ours: Mapping[str, Bool[np.ndarray, " count"]],
    baseline: Mapping[str, Bool[np.ndarray, " count"]],
    draws: int = 10_000,
    seed: int = 0,
) -> Gain:
    """Bootstrap the mean over tasks of the accuracy gained on the same test images (percentile interval).

    Images are drawn anew within each task. An image gains, loses or ties, so a draw of n images is one draw of three
    counts from a multinomial: exact, and as fast for a million images as for ten.
    """
    generator = np.random.default_rng(seed)
    means, samples = [], []
    for task in baseline:
        change = ours[task].astype(np.int8) - baseline[task].astype(np.int8)
        share = np.array([(change == value).mean() for value in (-1, 0, 1)])
        counts = generator.multinomial(len(change), share / share.sum(), size=draws)
        means.append(change.mean())
        samples.append((counts[:, 2] - counts[:, 0]) / len(change))
    low, high = np.quantile(np.mean(samples, axis=0), [0.025, 0.975])
    return Gain(float(np.mean(means)), float(low), float(high))
