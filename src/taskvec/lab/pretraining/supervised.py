"""Supervised pre-training: classify glyphs that no task uses, from clean to hard images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from taskvec.core.compute import seeded
from taskvec.lab.pretraining import objective
from taskvec.lab.pretraining.corpus import draw_pretraining, pretraining_code_points
from taskvec.lab.pretraining.objective import BATCH, Objective, features, normalised
from taskvec.lab.vit import VisionTransformer

SMOOTHING = 0.1
"""Share of the target that is spread over all classes."""


class Supervised(Objective[tuple[Tensor, Tensor]]):
    """Cross-entropy with label smoothing; every image is new."""

    def __init__(self, steps: int, seed: int, few: bool = False, **architecture: int) -> None:
        """Make encoder and head from ``seed``, for all 389 classes or the ``few``."""
        super().__init__("supervised", steps, seed)
        self.few = few
        self.encoder, self.head = seeded(lambda: self.make(**architecture), seed)
        self.modules = nn.ModuleList([self.encoder, self.head])

    def make(self, **architecture: int) -> tuple[VisionTransformer, nn.Linear]:
        """Make the encoder, then the head."""
        encoder = VisionTransformer(**architecture)
        return encoder, nn.Linear(encoder.width, len(pretraining_code_points(self.few)))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Draw images and labels, from clean glyphs to full difficulty."""
        images, labels = draw_pretraining(BATCH, self.difficulty(step), self.generator, self.few)
        return normalised(images), labels

    def loss(self, batch: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
        """Return the cross-entropy of a batch with smoothed labels."""
        return F.cross_entropy(self.head(self.encoder(batch[0])), batch[1], label_smoothing=SMOOTHING)

    def figures(self) -> dict[str, float]:
        """Measure the accuracy on clean and on hard images of another random stream."""
        generator = self.held_out()
        return {
            "classes": len(pretraining_code_points(self.few)),
            "held_out_accuracy_clean": self.accuracy(0.0, generator),
            "held_out_accuracy": self.accuracy(1.0, generator),
        }

    @torch.no_grad()
    def accuracy(self, difficulty: float, generator: torch.Generator) -> float:
        """Return the share of new images of the pre-training classes whose class is recognised."""
        images, labels = draw_pretraining(objective.HELD_OUT, difficulty, generator, self.few)
        return float((self.head(features(self.encoder, images)).argmax(1) == labels).float().mean())
