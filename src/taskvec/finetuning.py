"""Regimes of fine-tuning. Aligned: the probed head is frozen and the encoder learns (paper, section 3.1)."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from taskvec.backbones import Backbone
from taskvec.compute import autocast, choose_precision
from taskvec.errors import TaskvecError
from taskvec.heads import Head
from taskvec.images import normalise, random_resized_crop
from taskvec.settings import Finetune
from taskvec.tasks import Split, Task
from taskvec.training import Group, Progress, Schedule, index_batches, no_progress, train
from taskvec.vectors import subtract
from taskvec.weights import Weights, bind, check_finite

Batch = tuple[Float[Tensor, "batch 3 size size"], Int64[Tensor, " batch"]]


def training_batches(backbone: Backbone, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield augmented, normalised batches forever, on the backbone's device; all draws come from the seed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.from_numpy(split.labels)
    for indices in index_batches(len(split), batch_size, seed):
        images = torch.from_numpy(split.images[indices.numpy()])
        inputs = normalise(images, backbone.preprocessing, backbone.device)
        yield random_resized_crop(inputs, generator), labels[indices].to(backbone.device)


def finetune(
    backbone: Backbone,
    task: Task,
    head: Head,
    settings: Finetune | None = None,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress = no_progress,
) -> Weights:
    """Fine-tune a copy of the encoder with the task's head frozen, and return its weights (aligned regime)."""
    settings = settings or Finetune()
    module = copy.deepcopy(backbone.module)
    bound = bind(module)
    bound.flat.copy_(backbone.pretrained.flat)
    module.train()
    check_batch(module, settings)
    chosen = choose_precision(precision, "training", backbone.width, backbone.device)

    def loss(batch: Batch) -> Float[Tensor, ""]:
        with autocast(chosen, backbone.device):
            features = module(batch[0])
        return F.cross_entropy(head.logits(features), batch[1])

    schedule = Schedule(
        settings.steps, min(settings.warmup, settings.steps // 2), settings.weight_decay, accumulate=settings.accumulate
    )
    batches = training_batches(backbone, task.train, max(1, settings.batch_size // settings.accumulate), seed)
    with torch.random.fork_rng(devices=[] if backbone.device == "cpu" else None):
        torch.manual_seed(seed)  # for dropout and stochastic depth
        train([Group(list(module.parameters()), settings.learning_rate)], loss, batches, schedule, progress=progress)
    check_finite(bound, "fine-tuning diverged", "lower finetune.learning_rate")
    return bound.clone()


def check_batch(module: torch.nn.Module, settings: Finetune) -> None:
    """Raise when batch norm would see a single image at a time."""
    images = settings.batch_size // settings.accumulate
    if images < 2 and any(isinstance(part, _BatchNorm) for part in module.modules()):
        raise TaskvecError(f"batch norm cannot train on batches of {images}", "raise finetune.batch_size to 2 or more")


def task_vector(backbone: Backbone, fine_tuned: Weights) -> Weights:
    """Return tau = theta_ft - theta_pre of a fine-tuned encoder (paper, section 2)."""
    return subtract(fine_tuned, backbone.pretrained)
