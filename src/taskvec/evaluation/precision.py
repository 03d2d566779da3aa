"""The precision of an encoder's passes on a GPU: the fastest that leaves its predictions as they are in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from taskvec.core.compute import PassPrecision, uses_tf32
from taskvec.core.cuda_steps import deterministic
from taskvec.core.progress import Progress, no_progress
from taskvec.core.task_types import TASK_TYPES
from taskvec.data.tasks import Task
from taskvec.encoders.backbone import Backbone
from taskvec.learning.heads import Head, features_of
from taskvec.weights import vectors
from taskvec.weights.flat import Weights

FASTEST: tuple[PassPrecision, ...] = ("float16", "tf32")
"""What is tried, the fastest first; float32 needs no check."""
MOST_DIFFERING = 0.005
"""The largest share of predictions that may differ from float32's."""
PREDICTED, FITTED = 2048, 2048
"""Validation images of all tasks together that are predicted, and training images that heads are fitted on."""
LENGTH = 0.14
"""Length of the direction relative to the encoder, entry by entry: that of a sum of eight task vectors.

One task vector has 4 to 6 % of the encoder's norm where the lab's encoder is fine-tuned as in ``quickstart``, in single
entries up to 8 %; eight of them are nearly orthogonal, so that their sum has sqrt(8) times as much.
"""


@dataclass(frozen=True)
class Agreement:
    """How far predictions in a precision are those in float32, at one scale: the share that differs, and NaNs.

    A prediction differs where its class does; ``nans`` counts those that are no class, though float32's are.
    """

    precision: PassPrecision
    scale: float
    differing: float
    nans: int

    @property
    def is_close(self) -> bool:
        """Return whether the precision may stand for float32."""
        return self.differing <= MOST_DIFFERING and not self.nans


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision of an encoder's passes, what the study wanted, and the comparisons that it follows from."""

    precision: PassPrecision
    wanted: str
    images: int
    agreements: tuple[Agreement, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what is kept: the choice, how both TF32 switches then stand, and every comparison."""
        return {
            "precision": self.precision,
            "wanted": self.wanted,
            "tf32": uses_tf32(self.precision),
            "images": self.images,
            "agreements": [vars(agreement) for agreement in self.agreements],
        }

    def explanation(self) -> str:
        """Return what was not close to float32, and so why the precision is not the fastest; nothing if all was."""
        poor = [agreement for agreement in self.agreements if not agreement.is_close]
        worst = {a.precision: a for a in sorted(poor, key=lambda agreement: (agreement.nans, agreement.differing))}
        reasons = [
            f"in {name}, at scale {a.scale:g}, {100 * a.differing:.1f} % of predictions differ from float32's and "
            f"{a.nans} are no class"
            for name, a in worst.items()
        ]
        return f"passes are computed in {self.precision}: {'; '.join(reasons)}" if reasons else ""


def choose_precision(
    backbone: Backbone,
    tasks: Sequence[Task],
    scales: Sequence[float],
    wanted: str = "auto",
    seed: int = 0,
    progress: Progress = no_progress,
) -> PrecisionChoice:
    """Return the precision of a backbone's passes, by what it predicts at some scales along a random direction.

    ``auto`` takes the fastest that is close to float32 at every scale, float32 where none is. One that is asked for is
    taken as it is, and compared all the same.

    The heads are class means of each task, from float32 features. A study's own are not there yet: they are probed on
    features of the precision that is chosen here. Both are linear in features, and class means separate less well, so
    that more images lie near a border: with the lab's encoder and eight tasks float16 changed 0.03 to 0.16 % of their
    predictions, and 0 to 0.13 % of those of ridge regression.
    """
    candidates = FASTEST if wanted == "auto" else tuple(precision for precision in FASTEST if precision == wanted)
    samples = [sampled(task, len(tasks)) for task in tasks]
    agreements: list[Agreement] = []
    with backbone.at(backbone.pretrained), computed_in(backbone, "float32"):
        heads = [class_mean_head(backbone, task) for task in samples]
        direction = random_direction(backbone.pretrained, seed)
        for candidate in candidates:
            for scale in scales:
                vectors.move(backbone.bound, backbone.pretrained, [direction], [scale])
                agreements.append(compare(backbone, samples, heads, candidate, scale))
                progress(len(agreements) / len(candidates) / len(scales))
            if all(agreement.is_close for agreement in agreements[-len(scales) :]):
                break
    images = sum(len(task.validation) for task in samples)
    return PrecisionChoice(decide(wanted, agreements), wanted, images, tuple(agreements))


def decide(wanted: str, agreements: Sequence[Agreement]) -> PassPrecision:
    """Return the first precision whose comparisons are all close, float32 where none is, or the one asked for."""
    for precision in FASTEST:
        rows = [agreement for agreement in agreements if agreement.precision == precision]
        if wanted == precision or (wanted == "auto" and rows and all(row.is_close for row in rows)):
            return precision
    return "float32"


def compare(
    backbone: Backbone, tasks: Sequence[Task], heads: Sequence[Head], precision: PassPrecision, scale: float
) -> Agreement:
    """Return how far predictions in a precision are those in float32 under the backbone's present weights."""
    exact = predictions(backbone, tasks, heads)
    with computed_in(backbone, precision):
        others = predictions(backbone, tasks, heads)
    pairs = [(known, other, known >= 0) for known, other in zip(exact, others, strict=True)]
    differing = [((known != other) & finite).double().flatten(1).mean(1) for known, other, finite in pairs]
    nans = sum(int(((other < 0) & finite).sum()) for _, other, finite in pairs)
    return Agreement(precision, scale, float(torch.cat(differing).mean()), nans)


def predictions(
    backbone: Backbone, tasks: Sequence[Task], heads: Sequence[Head]
) -> list[Int64[Tensor, "count predictions"]]:
    """Return the class of every validation image, or of its patches, of each task; -1 where a score is no number."""
    pairs = zip(tasks, heads, strict=True)
    return [
        head.predict(features_of(backbone, task.validation, task.kind)[0]).reshape(len(task.validation), -1)
        for task, head in pairs
    ]


def class_mean_head(backbone: Backbone, task: Task) -> Head:
    """Return the linear head that gives features the class whose mean over training images is nearest.

    Patches are samples like images, and angles are of the class of their sector.
    """
    features, labels = features_of(backbone, task.train, task.kind)
    task_type = TASK_TYPES[task.kind]
    classes = task_type.predict(labels) if labels.is_floating_point() else labels
    samples, places = features.flatten(0, -2), torch.unique(classes, return_inverse=True)[1].flatten()
    count = int(places.max()) + 1
    with deterministic(samples.device):
        sums = samples.new_zeros(count, samples.shape[1]).index_add_(0, places, samples)
    means = sums / torch.bincount(places, minlength=count)[:, None]
    return Head(means, -means.square().sum(1) / 2)


def sampled(task: Task, tasks: int) -> Task:
    """Return one of several tasks with a seeded choice of its training and validation images."""
    train, validation = task.train.sample(max(1, FITTED // tasks)), task.validation.sample(max(1, PREDICTED // tasks))
    return replace(task, train=train, validation=validation)


def random_direction(pretrained: Weights, seed: int) -> Weights:
    """Return a vector of ``LENGTH`` times the encoder's norm in every entry: each number times a random one.

    Numbers keep their proportions, so that variances of batch norm stay positive near the encoder.
    """
    generator = torch.Generator(pretrained.flat.device).manual_seed(seed)
    noise = torch.randn(pretrained.flat.shape, generator=generator, device=pretrained.flat.device)
    return pretrained.with_flat(LENGTH * pretrained.flat * noise)


@contextlib.contextmanager
def computed_in(backbone: Backbone, precision: PassPrecision) -> Iterator[None]:
    """Let a backbone's passes compute in a precision within a block."""
    before, backbone.precision = backbone.precision, precision
    try:
        yield
    finally:
        backbone.precision = before
