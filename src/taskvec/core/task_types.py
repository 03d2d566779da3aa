"""Kinds of task: what the scores of a linear head mean, how they are trained, measured and told.

Scores are [count, outputs], or [count, patches, outputs] where a kind looks at every patch. Regression is of an angle:
its two outputs are the cosine and the sine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

TOLERANCE = 15
"""How far a predicted angle may be off, and how wide the sectors are in which two angles agree, in degrees."""


@dataclass(frozen=True)
class Kind:
    """How tasks of one kind are treated.

    ``metric`` names the mean of ``score``, 0 to 1 an image, in results. ``per_patch`` heads read a feature of every
    patch, others one an image. Labels stay right under random crops only with ``crops``. ``decide`` gives what two
    models agree or differ in, -1 where a score is NaN or infinite; ``answer`` a label and how sure it is, 0 to 1.
    """

    metric: str
    per_patch: bool
    crops: bool
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    decide: Callable[[Tensor], Tensor]
    answer: Callable[[Tensor, Sequence[str]], tuple[str, float]]


def cross_entropy(
    scores: Float[Tensor, "count *patches classes"], labels: Int64[Tensor, " count *patches"]
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over images, or over all their patches."""
    return F.cross_entropy(scores.flatten(0, -2), labels.flatten())


def best_class(scores: Float[Tensor, "count *patches classes"]) -> Int64[Tensor, " count *patches"]:
    """Return the class of highest score, ties to the first; -1 (no class) where a score is NaN or infinite."""
    return scores.argmax(dim=-1).where(scores.isfinite().all(dim=-1), -1)


def is_right(
    scores: Float[Tensor, "count *patches classes"], labels: Int64[Tensor, " count *patches"]
) -> Bool[Tensor, " count *patches"]:
    """Say of every image, or of every patch, whether its class is its label."""
    return best_class(scores) == labels


def share_right(
    scores: Float[Tensor, "count patches classes"], labels: Int64[Tensor, "count patches"]
) -> Float[Tensor, " count"]:
    """Return of every image the share of its patches whose class is their label, in float64."""
    return is_right(scores, labels).double().mean(dim=1)


def sector(scores: Float[Tensor, "count 2"]) -> Int64[Tensor, " count"]:
    """Return which sector of 15 degrees the angle lies in, 0 around zero degrees; -1 for NaN or infinity."""
    degrees = torch.rad2deg(torch.atan2(scores[:, 1], scores[:, 0]))
    sectors = (degrees / TOLERANCE).round().nan_to_num().long() % (360 // TOLERANCE)
    return sectors.where(scores.isfinite().all(dim=1), -1)


def is_near(scores: Float[Tensor, "count 2"], labels: Float[Tensor, "count 2"]) -> Bool[Tensor, " count"]:
    """Say of every image whether the predicted angle is within 15 degrees of its label."""
    return F.cosine_similarity(scores, labels, dim=1) >= math.cos(math.radians(TOLERANCE))


def answer_class(scores: Float[Tensor, " classes"], classes: Sequence[str]) -> tuple[str, float]:
    """Return the name of the best class and its softmax probability."""
    best = int(scores.argmax())
    return classes[best], float(torch.softmax(scores, 0)[best])


def answer_patches(scores: Float[Tensor, "patches classes"], classes: Sequence[str]) -> tuple[str, float]:
    """Return how many patches each class has, such as ``9 ground, 7 glyph``, and their mean softmax probability."""
    counts = torch.bincount(scores.argmax(1), minlength=len(classes)).tolist()
    label = ", ".join(f"{count} {name}" for count, name in zip(counts, classes, strict=True) if count)
    return label, float(torch.softmax(scores, 1).amax(1).mean())


def answer_angle(scores: Float[Tensor, " 2"], classes: Sequence[str]) -> tuple[str, float]:
    """Return the angle, such as ``90 degrees``, and the length of the predicted vector, at most 1.

    The mean of unit vectors is the shorter, the more they differ: trained by mean squared error, so is the prediction.
    """
    degrees = round(math.degrees(math.atan2(float(scores[1]), float(scores[0])))) % 360
    return f"{degrees} degrees", min(1.0, float(scores.norm()))


CLASSIFICATION = "classification"
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        CLASSIFICATION: Kind("accuracy", False, True, cross_entropy, is_right, best_class, answer_class),
        "segmentation": Kind("patch_accuracy", True, False, cross_entropy, share_right, best_class, answer_patches),
        "regression": Kind("within_15_degrees", False, False, F.mse_loss, is_near, sector, answer_angle),
    }
)
"""Every kind of task by name."""
