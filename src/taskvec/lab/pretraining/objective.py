"""What every pre-training objective has in common: its protocol, seeded construction, the curriculum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Generator, Tensor, nn

from taskvec.core.training import Group
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
Made = TypeVar("Made")


class Objective(Protocol[Batch]):
    """One way to pre-train, made for a number of steps and a seed.

    ``modules`` holds everything trained or averaged, the encoder included: with the optimizer and the ``generator``,
    from which every batch is drawn, it is all the state that a resumed run needs.
    """

    encoder: VisionTransformer
    generator: Generator

    @property
    def modules(self) -> nn.Module:
        """Everything whose state a resumed run needs."""
        ...

    def groups(self) -> list[Group]:
        """Return what is trained, at which peak learning rates."""
        ...

    def batch(self, step: int) -> Batch:
        """Draw the batch of a step; it is called once a step, in order."""
        ...

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss of a batch."""
        ...

    def after_step(self, step: int) -> None:
        """Do what follows each update, such as averaging a teacher."""
        ...

    def figures(self) -> dict[str, float]:
        """Measure what was learned, after the encoder was rounded to float16."""
        ...


def seeded(make: Callable[[], Made], seed: int) -> Made:
    """Make modules whose random weights come from ``seed``, and leave torch's global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def normalised(images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Scale bytes to the range -1 to 1, which is mean 0.5 and deviation 0.5."""
    return images.float() / 127.5 - 1


def difficulty(step: int, steps: int) -> float:
    """Return how hard the images of a step are: from 0 (clean) to 1 (full), which holds for the last 40 % of steps."""
    return min(1.0, step / (EASED * steps))


@torch.no_grad()
def features(encoder: nn.Module, images: UInt8[Tensor, "images 3 32 32"]) -> Float[Tensor, "images width"]:
    """Encode many images, some hundreds at a time."""
    return torch.cat([encoder(normalised(chunk)) for chunk in images.split(512)])


def mean_of_last(losses: Sequence[float]) -> float:
    """Return the mean loss of the last tenth of the steps, of one step at least."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)
