"""Types of task: what the scores of a linear head mean, and how they are trained, measured and described.

Scores are [count, outputs], or [count, patches, outputs] where a type looks at every patch. Regression is of an angle:
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
"""Largest error of a right angle, and width of the sectors in which two angles agree, in degrees."""


@dataclass(frozen=True)
class TaskType:
    """How tasks of one type are trained and measured.

    ``metric`` is what results call the mean of ``score``, which is 0 to 1 for each image. A ``per_patch`` head reads a
    feature of every patch, another head one of the image. Random crops leave labels right only with ``crops``.
    ``predict`` returns the classes by which two models are compared, -1 where a score is NaN or infinite. ``describe``
    returns one prediction as text, and its confidence from 0 to 1.
    """

    metric: str
    per_patch: bool
    crops: bool
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    predict: Callable[[Tensor], Tensor]
    describe: Callable[[Tensor, Sequence[str]], tuple[str, float]]


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
    """Return whether the predicted class of every image, or of every patch, is its label."""
    return best_class(scores) == labels


def share_right(
    scores: Float[Tensor, "count patches classes"], labels: Int64[Tensor, "count patches"]
) -> Float[Tensor, " count"]:
    """Return the share of patches whose predicted class is their label, in float64 for every image."""
    return is_right(scores, labels).double().mean(dim=1)


def sector(scores: Float[Tensor, "count 2"]) -> Int64[Tensor, " count"]:
    """Return the 15-degree sector of every angle: 0 is centred on zero degrees, -1 stands for NaN or infinity."""
    degrees = torch.rad2deg(torch.atan2(scores[:, 1], scores[:, 0]))
    sectors = (degrees / TOLERANCE).round().nan_to_num().long() % (360 // TOLERANCE)
    return sectors.where(scores.isfinite().all(dim=1), -1)


def is_near(scores: Float[Tensor, "count 2"], labels: Float[Tensor, "count 2"]) -> Bool[Tensor, " count"]:
    """Return whether the predicted angle of every image is within 15 degrees of its label."""
    return F.cosine_similarity(scores, labels, dim=1) >= math.cos(math.radians(TOLERANCE))


def describe_class(scores: Float[Tensor, " classes"], classes: Sequence[str]) -> tuple[str, float]:
    """Return the name of the best class and its softmax probability."""
    best = int(scores.argmax())
    return classes[best], float(torch.softmax(scores, 0)[best])


def describe_patches(scores: Float[Tensor, "patches classes"], classes: Sequence[str]) -> tuple[str, float]:
    """Return the count of patches by class, such as ``9 ground, 7 glyph``, and their mean softmax probability."""
    counts = torch.bincount(scores.argmax(1), minlength=len(classes)).tolist()
    label = ", ".join(f"{count} {name}" for count, name in zip(counts, classes, strict=True) if count)
    return label, float(torch.softmax(scores, 1).amax(1).mean())


def describe_angle(scores: Float[Tensor, " 2"], classes: Sequence[str]) -> tuple[str, float]:
    """Return the angle, such as ``90 degrees``, and the length of the predicted vector, at most 1.

    The length is a confidence: a prediction trained by mean squared error is a mean of unit vectors, which is the
    shorter, the more they differ.
    """
    degrees = round(math.degrees(math.atan2(float(scores[1]), float(scores[0])))) % 360
    return f"{degrees} degrees", min(1.0, float(scores.norm()))


CLASSIFICATION = "classification"
TASK_TYPES: Mapping[str, TaskType] = MappingProxyType(
    {
        CLASSIFICATION: TaskType("accuracy", False, True, cross_entropy, is_right, best_class, describe_class),
        "segmentation": TaskType(
            "patch_accuracy", True, False, cross_entropy, share_right, best_class, describe_patches
        ),
        "regression": TaskType("within_15_degrees", False, False, F.mse_loss, is_near, sector, describe_angle),
    }
)
"""Every type of task by name."""
