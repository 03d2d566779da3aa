"""Representation surgery: a low-rank correction of merged features for each task, learned without labels."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from taskvec.core.progress import Progress, no_progress
from taskvec.core.settings import Surgery
from taskvec.core.training import Group, Schedule, train
from taskvec.learning.batches import index_stream
from taskvec.learning.heads import Features, Head, finite, products


def fit_surgery(
    merged: Float[Tensor, "scales count *patches width"],
    fine_tuned: Features,
    head: Head,
    settings: Surgery,
    seed: int,
    progress: Progress = no_progress,
) -> list[Head]:
    """Return a head for every scale that corrects merged features towards a fine-tuned encoder's of the same images.

    Learns ``down`` and ``up`` of z - up relu(down z) by the mean absolute difference (arXiv 2402.02705, equations 4 and
    5), from a correction of nothing, for all scales as one problem on the features' device. Weights of the head stay
    as they are. Returns heads on the CPU.
    """
    inputs, targets = finite(merged).flatten(1, -2), finite(fine_tuned).flatten(0, -2)
    downs, ups = first_corrections(len(merged), targets.shape[1], settings.rank, seed, merged.device)

    def loss(batch: Int64[Tensor, " batch"]) -> Float[Tensor, ""]:
        features = inputs[:, batch]
        hidden = products(features, torch.stack(downs)).relu()
        corrected = features - products(hidden, torch.stack(ups))
        return len(downs) * F.l1_loss(corrected, targets[batch].expand_as(corrected))

    batches = index_stream(len(targets), settings.batch_size, seed, str(merged.device))
    schedule = Schedule(settings.steps, weight_decay=0.0, clip=math.inf)
    groups = [Group([down, up], settings.learning_rate) for down, up in zip(downs, ups, strict=True)]
    train(groups, loss, batches, schedule, progress=progress, graph=True)
    return [replace(head, down=down, up=up).on("cpu") for down, up in zip(downs, ups, strict=True)]


def first_corrections(
    count: int, width: int, rank: int, seed: int, device: torch.device
) -> tuple[list[Float[Tensor, "rank width"]], list[Float[Tensor, "width rank"]]]:
    """Return equal corrections that correct nothing and learn: ``down`` as torch starts a linear layer, ``up`` zero."""
    generator, bound = torch.Generator().manual_seed(seed), 1 / math.sqrt(width)
    down = ((2 * torch.rand(rank, width, generator=generator) - 1) * bound).to(device)
    downs = [down.clone().requires_grad_(True) for _ in range(count)]
    ups = [torch.zeros(width, rank, device=device, requires_grad=True) for _ in range(count)]
    return downs, ups
