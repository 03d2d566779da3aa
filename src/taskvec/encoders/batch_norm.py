"""Statistics of batch norm after a merge: estimated anew from unlabelled training images.

A merged encoder's running means and variances are sums of what other encoders measured, and fit none of its own
activations; estimating them again needs images and no labels (REPAIR, arXiv 2211.08403; SWA, arXiv 1803.05407).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from taskvec.core.errors import TaskvecError
from taskvec.data.images import normalise
from taskvec.data.splits import seeded_choice
from taskvec.data.tasks import Task
from taskvec.data.uploads import batches
from taskvec.encoders.backbone import Backbone
from taskvec.weights.flat import Slot, Weights, view

IMAGES = 2048
"""Training images that statistics are estimated from, shared evenly by the tasks."""
BATCH = 128
Images = UInt8[np.ndarray, "count 3 size size"]


def layers(module: nn.Module) -> list[_BatchNorm]:
    """Return the layers of batch norm that keep running statistics."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]


def check(backbone: Backbone) -> None:
    """Raise where there is nothing to estimate."""
    if not layers(backbone.module):
        raise TaskvecError(
            f"'{backbone.name}' has no batch norm whose statistics could be estimated anew",
            "leave out batch_norm for this backbone",
        )


def mixed(tasks: Sequence[Task], count: int = IMAGES, seed: int = 0) -> Images:
    """Return a seeded choice of training images of all tasks, the same number of each, in one mixed order."""
    generator = np.random.default_rng(seed)
    share = min(count // len(tasks), *(len(task.train) for task in tasks))
    chosen = [task.train.images[seeded_choice(len(task.train), share, generator)] for task in tasks]
    return np.concatenate(chosen)[generator.permutation(share * len(tasks))]


@torch.no_grad()
def reestimate(backbone: Backbone, weights: Weights, images: Images, batch_size: int = BATCH) -> Weights:
    """Return the weights with running means and variances as the images have them, one pass for all layers.

    Every layer normalises by each batch's own statistics, and keeps their cumulative average. Batches are equally large
    but for less than one batch of images; what is left over is not looked at. On a GPU the images stay for the next
    weights.
    """
    seen = batches(backbone.resident(images), batch_size, backbone.device)
    with backbone.at(weights), own_statistics(layers(backbone.module.eval())) as norms:
        for place, batch in enumerate(islice(seen, max(1, len(images) // batch_size))):
            for layer in norms:
                layer.momentum = 1 / (place + 1)  # torch's None says the same, but waits for a GPU to read its counter
            backbone.module(normalise(batch, backbone.preprocessing, backbone.device))
        return weights.with_flat(backbone.bound.flat.clone())


@contextlib.contextmanager
def own_statistics(norms: Sequence[_BatchNorm]) -> Iterator[Sequence[_BatchNorm]]:
    """Yield layers that learn their statistics anew, from the batches of the block and by the momentum it gives them.

    Afterwards momentum and counters are those of before; statistics and modes are for the caller to put back.
    """
    before = [(layer.momentum, copy.deepcopy(layer.num_batches_tracked)) for layer in norms]
    try:
        for layer in norms:
            layer.reset_running_stats()
            layer.train()
        yield norms
    finally:
        for layer, (momentum, counted) in zip(norms, before, strict=True):
            layer.momentum = momentum
            if layer.num_batches_tracked is not None and counted is not None:
                layer.num_batches_tracked.copy_(counted)


def entries(weights: Weights) -> list[Slot]:
    """Return the entries that are running means and variances."""
    return [entry for entry in weights.layout if entry.name.endswith(("running_mean", "running_var"))]


def statistics(weights: Weights) -> Float32[Tensor, " statistics"]:
    """Return all running means and variances in one vector, on the CPU."""
    return torch.cat([view(weights.flat, entry).flatten() for entry in entries(weights)]).cpu()


def with_statistics(weights: Weights, values: Float32[Tensor, " statistics"]) -> Weights:
    """Return a copy of the weights with other running means and variances."""
    changed, places = weights.clone(), entries(weights)
    for entry, part in zip(places, values.split([entry.size for entry in places]), strict=True):
        view(changed.flat, entry).copy_(part.view(entry.shape))
    return changed
