"""What all pre-training objectives share: their base class, the curriculum, the input of the encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Generator, Tensor, nn

from taskvec.core.training import Group
from taskvec.lab.drawing.looks import stream
from taskvec.lab.vit import VisionTransformer

BATCH = 64
LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.05
WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""
EASED = 0.6
"""Share of the steps after which the images have reached full difficulty."""
HELD_OUT = 4096
"""Images on which the figures are measured."""

Batch = TypeVar("Batch")


class Objective(Generic[Batch], ABC):
    """One way to pre-train, made for a number of steps and a seed.

    ``modules`` holds everything trained or averaged, the encoder included: with the optimizer and the ``generator``,
    from which every batch is drawn, it is all the state that a resumed run needs.
    """

    encoder: VisionTransformer
    modules: nn.Module

    def __init__(self, name: str, steps: int, seed: int) -> None:
        """Keep the length and seed of a run; ``name`` tells the random numbers of one objective from another's."""
        self.name, self.steps, self.seed = name, steps, seed
        self.generator = stream(name, "train", seed)

    def groups(self) -> list[Group]:
        """Return what is trained, with its peak learning rate."""
        return [Group(list(self.modules.parameters()), LEARNING_RATE)]

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """Draw the batch of a step; it is called once a step, in order."""

    @abstractmethod
    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss of a batch."""

    def after_step(self, step: int) -> None:
        """Do what follows each update, such as averaging a teacher."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """Measure what was learned, after the encoder was rounded to float16."""

    def held_out(self) -> Generator:
        """Return the generator of the images on which the figures are measured."""
        return stream(self.name, "held out", self.seed)

    def difficulty(self, step: int) -> float:
        """Return how hard the images of a step are: from 0 (clean) to 1 (full) over the first 60 % of steps."""
        return min(1.0, step / (EASED * self.steps))


def normalised(images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Scale bytes to the range -1 to 1, which is mean 0.5 and deviation 0.5."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def features(encoder: nn.Module, images: UInt8[Tensor, "images 3 32 32"]) -> Float[Tensor, "images width"]:
    """Return the features of many images, encoded some hundreds at a time."""
    return torch.cat([encoder(normalised(chunk)) for chunk in images.split(512)])


def mean_of_last(losses: Sequence[float]) -> float:
    """Return the mean loss of the last tenth of the steps, of one step at least."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)
