"""Representation surgery: a low-rank correction of merged features for each task, learned without labels."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from taskvec.core.progress import Progress, no_progress
from taskvec.core.settings import Surgery
from taskvec.core.training import Group, Schedule, index_batches, train
from taskvec.learning.heads import Features, Head


def fit_surgery(
    merged: Features, fine_tuned: Features, head: Head, settings: Surgery, seed: int, progress: Progress = no_progress
) -> Head:
    """Return a head that corrects merged features towards those of the fine-tuned encoder of the same images.

    Learns ``down`` and ``up`` of z - up relu(down z) by the mean absolute difference (arXiv 2402.02705, equations 4 and
    5), from a correction of nothing. The head itself stays as it is.
    """
    inputs, targets = (features.flatten(0, -2) for features in (merged, fine_tuned))
    width = inputs.shape[1]
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(width)  # as torch initialises a linear layer
    down = ((2 * torch.rand(settings.rank, width, generator=generator) - 1) * bound).requires_grad_(True)
    up = torch.zeros(width, settings.rank, requires_grad=True)
    corrected = replace(head.on("cpu"), down=down, up=up)

    def loss(batch: Tensor) -> Tensor:
        return F.l1_loss(corrected.corrected(inputs[batch]), targets[batch])

    batches = index_batches(len(inputs), settings.batch_size, seed)
    schedule = Schedule(settings.steps, weight_decay=0.0, clip=math.inf)
    train([Group([down, up], settings.learning_rate)], loss, batches, schedule, progress=progress)
    return replace(corrected, down=down.detach(), up=up.detach())
