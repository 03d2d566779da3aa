"""Self-distillation (DINO, arXiv 2104.14294): a student agrees with its own moving average across views of a glyph.

The teacher's output is centred by Sinkhorn-Knopp, as in DINO v2 (arXiv 2304.07193). In trials of 300 to 500 steps with
the moving centre of the first version it became nearly uniform when views were hard, and used few prototypes when easy;
at one setting (temperature 0.06, eased crops) it did not, and was 3 points behind.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from taskvec.core.compute import seeded
from taskvec.core.training import Group
from taskvec.lab.drawing.looks import IMAGE_SIZE, uniform
from taskvec.lab.pretraining import objective
from taskvec.lab.pretraining.corpus import draw_pretraining
from taskvec.lab.pretraining.objective import LEARNING_RATE, Objective, features, normalised
from taskvec.lab.vit import VisionTransformer

BATCH = 64
HARDEST = 0.3
"""How hard the images become, where 1 is full difficulty: crops and colours of a view add to it."""
LOCALS = 2
"""Small views of each image, which only the student sees; there are two global views besides."""
LOCAL_SIZE = 16
"""Height and width of a small view, in pixels."""
GLOBAL_AREA = (0.6, 1.0)
"""Smallest and largest share of the image's area in a global view."""
LOCAL_AREA = (0.2, 0.6)
"""Smallest and largest share of the image's area in a small view."""
PROTOTYPES = 256
STUDENT_TEMPERATURE = 0.1
TEACHER_TEMPERATURE = 0.04
ROUNDS = 3
"""Rounds of Sinkhorn-Knopp normalisation, by which the teacher's output is centred."""
TEACHER_MOMENTUM = 0.99
"""Momentum of the teacher at the first step; it rises to 1 along a half cosine."""

Views = tuple[Tensor, Tensor]
"""Normalised global views and small views, one whole batch after the other."""


def crop(
    images: Float[Tensor, "batch 3 32 32"], size: int, area: tuple[float, float], generator: Generator
) -> Float[Tensor, "batch 3 size size"]:
    """Cut a random rectangle out of each image, of aspect 3/4 to 4/3, and enlarge it to ``size`` x ``size`` pixels."""
    count = len(images)
    side, stretch = uniform(generator, *area, count).sqrt(), (4 / 3) ** uniform(generator, -0.5, 0.5, count)
    extent = torch.stack([side * stretch, side / stretch], 1).clamp_max(1)
    shift = uniform(generator, -1, 1, count, 2) * (1 - extent)
    maps = torch.cat([torch.diag_embed(extent), shift[:, :, None]], 2)
    grid = F.affine_grid(maps, [count, 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def eased(area: tuple[float, float], level: float) -> tuple[float, float]:
    """Return an area that is the whole image at level 0 and ``area`` at level 1."""
    return 1 - level * (1 - area[0]), 1 - level * (1 - area[1])


def recolour(
    images: Float[Tensor, "batch 3 height width"], generator: Generator
) -> Float[Tensor, "batch 3 height width"]:
    """Change saturation, contrast, brightness and colour cast of each normalised image."""
    count = len(images)
    grey, mean = images.mean(1, keepdim=True), images.mean((1, 2, 3), keepdim=True)
    images = grey + uniform(generator, 0, 1, count, 1, 1, 1) * (images - grey)
    gain = torch.exp(uniform(generator, -1, 0.3, count, 1, 1, 1) + uniform(generator, -0.4, 0.4, count, 3, 1, 1))
    return (gain * (images - mean) + uniform(generator, -0.6, 0.6, count, 3, 1, 1)).clamp(-1, 1)


def cross_entropy(
    targets: Float[Tensor, "globals batch prototypes"], logits: Float[Tensor, "views batch prototypes"]
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of each of the teacher's views with every other view of the student.

    The first views of the student are those of the teacher, and none is compared with itself.
    """
    pairs = -torch.einsum("tbp,vbp->tv", targets, F.log_softmax(logits, 2)) / targets.shape[1]
    return pairs[~torch.eye(*pairs.shape, dtype=torch.bool)].mean()


def balanced(logits: Float[Tensor, "batch prototypes"], rounds: int = ROUNDS) -> Float[Tensor, "batch prototypes"]:
    """Return assignments whose rows sum to 1 and whose columns are about equally full (Sinkhorn-Knopp)."""
    shares = torch.exp(logits - logits.amax())
    for _ in range(rounds):
        shares = shares / shares.sum(0, keepdim=True)
        shares = shares / shares.sum(1, keepdim=True)
    return shares


def momentum(step: int, steps: int) -> float:
    """Return the share of itself that the teacher keeps after a step: a half cosine from ``TEACHER_MOMENTUM`` to 1."""
    return 1 - (1 - TEACHER_MOMENTUM) * (1 + math.cos(math.pi * step / steps)) / 2


def whiten(width: int) -> nn.BatchNorm1d:
    """Make a batch normalisation that learns nothing and remembers nothing."""
    return nn.BatchNorm1d(width, affine=False, track_running_stats=False)


class Projector(nn.Module):
    """An encoder and its head: images in, cosines with the prototypes out."""

    def __init__(self, hidden: int = 256, bottleneck: int = 64) -> None:
        """Make encoder, two-layer network and prototypes; the batch normalisation of the head keeps views apart."""
        super().__init__()
        self.encoder = VisionTransformer()
        width = self.encoder.width
        layers = nn.Linear(width, hidden), whiten(hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        self.head = nn.Sequential(whiten(width), *layers)
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, bottleneck))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch prototypes"]:
        """Return the cosine of every image's projection with every prototype."""
        return F.linear(F.normalize(self.head(self.encoder(images))), F.normalize(self.prototypes))


class Modules(nn.Module):
    """Student and teacher; the teacher starts as the student and gets no gradient."""

    def __init__(self) -> None:
        """Make the student and copy it."""
        super().__init__()
        self.student = Projector()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    @torch.no_grad()
    def targets(self, images: Float[Tensor, "batch 3 32 32"]) -> Float[Tensor, "batch prototypes"]:
        """Return the teacher's output, sharpened and balanced over the batch."""
        return balanced(self.teacher(images) / TEACHER_TEMPERATURE)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the teacher towards the student."""
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, 1 - momentum)


class SelfDistillation(Objective[Views]):
    """The student predicts from one view what the teacher sees in another; the teacher's encoder ships."""

    modules: Modules

    def __init__(self, steps: int, seed: int) -> None:
        """Make student and teacher from ``seed``."""
        super().__init__("dino", steps, seed)
        self.modules = seeded(Modules, seed)
        self.encoder = self.modules.teacher.encoder

    def groups(self) -> list[Group]:
        """Train the student alone."""
        return [Group(list(self.modules.student.parameters()), LEARNING_RATE)]

    def batch(self, step: int) -> Views:
        """Draw images of the few classes and look at each several times; images and crops go from easy to hard."""
        level = self.difficulty(step)
        images = normalised(draw_pretraining(BATCH, HARDEST * level, self.generator, few=True)[0])
        wide = self.views(images.repeat(2, 1, 1, 1), IMAGE_SIZE, eased(GLOBAL_AREA, level))
        return wide, self.views(images.repeat(LOCALS, 1, 1, 1), LOCAL_SIZE, eased(LOCAL_AREA, level))

    def views(
        self, images: Float[Tensor, "views 3 32 32"], size: int, area: tuple[float, float]
    ) -> Float[Tensor, "views 3 size size"]:
        """Crop and recolour every image."""
        return recolour(crop(images, size, area, self.generator), self.generator)

    def loss(self, batch: Views) -> Float[Tensor, ""]:
        """Return the cross-entropy between teacher and student."""
        wide, small = batch
        logits = torch.cat([self.modules.student(wide), self.modules.student(small)]) / STUDENT_TEMPERATURE
        targets = self.modules.targets(wide)
        return cross_entropy(targets.unflatten(0, (2, -1)), logits.unflatten(0, (2 + LOCALS, -1)))

    def after_step(self, step: int) -> None:
        """Move the teacher towards the student."""
        self.modules.follow(momentum(step, self.steps))

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Measure on hard images of another stream how often the nearest other image is of the same class."""
        images, labels = draw_pretraining(objective.HELD_OUT, 1.0, self.held_out(), few=True)
        rows = F.normalize(features(self.encoder, images))
        nearest = (rows @ rows.T).fill_diagonal_(-1).argmax(1)
        return {"held_out_nearest": float((labels[nearest] == labels).float().mean())}
