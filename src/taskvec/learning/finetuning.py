"""Regimes of fine-tuning: with frozen heads, with a head that learns too, and on all tasks at once.

Aligned: the probed head is frozen and the encoder learns (paper, section 3.1). Full: encoder and a random head learn
together (appendix G). Open and open full: the same two from a zero-shot head (appendix H). Joint: one encoder for all.
Linearised: aligned, of a linearised backbone (``backbones.linearised``). LoRA: aligned, by adapters of low rank.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from taskvec.core.compute import Precision, autocast, choose_precision
from taskvec.core.errors import TaskvecError
from taskvec.core.settings import Finetune, Lora
from taskvec.core.task_types import CLASSIFICATION, KINDS
from taskvec.core.training import Group, Progress, Schedule, index_batches, no_progress, train
from taskvec.data.decoding import Whole
from taskvec.data.images import normalise, random_resized_crop
from taskvec.data.tasks import Split, Task
from taskvec.encoders import batch_norm
from taskvec.encoders.backbone import Backbone, encode
from taskvec.engine.executors import cores
from taskvec.learning import lora as adapters
from taskvec.learning.heads import Head, random_head
from taskvec.weights.flat import Weights, bind
from taskvec.weights.vectors import subtract

Batch = tuple[Float[Tensor, "batch 3 size size"], Shaped[Tensor, "batch ..."]]


class DivergedError(TaskvecError):
    """Fine-tuning ended with NaN or infinity; a search of learning rates goes on with the others."""


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning gives: the encoder's weights, and a head for every task it was tuned on."""

    encoder: Weights
    heads: tuple[Head, ...]


def training_batches(
    backbone: Backbone, split: Split, batch_size: int, seed: int, kind: str = CLASSIFICATION
) -> Iterator[Batch]:
    """Yield normalised batches forever, on the backbone's device, augmented where the kind's labels stay right.

    Where the split has whole images, crops are cut from them, else from the evaluation views. All draws come from the
    seed.
    """
    labels = torch.from_numpy(split.labels)
    if split.whole is not None and KINDS[kind].crops:
        size, device = backbone.preprocessing.size, backbone.device
        for indices, crops in cropped_batches(split.whole, batch_size, size, seed):
            yield normalise(torch.from_numpy(crops), backbone.preprocessing, device), labels[indices].to(device)
    generator = torch.Generator().manual_seed(seed)
    for indices in index_batches(len(split), batch_size, seed):
        images = torch.from_numpy(split.images[indices.numpy()])
        inputs = normalise(images, backbone.preprocessing, backbone.device)
        cropped = random_resized_crop(inputs, generator) if KINDS[kind].crops else inputs
        yield cropped, labels[indices].to(backbone.device)


def cropped_batches(
    whole: Whole, batch_size: int, size: int, seed: int, workers: int = 0
) -> Iterator[tuple[Int64[Tensor, " batch"], UInt8[np.ndarray, "batch 3 size size"]]]:
    """Yield indices and random crops of whole images forever, each batch made while the one before is trained on.

    They come from the seed alone, whatever the number of ``workers`` (all cores for 0).
    """
    with ThreadPoolExecutor(workers or cores()) as pool, ThreadPoolExecutor(1) as ahead:
        coming: deque[tuple[Tensor, Future[UInt8[np.ndarray, "batch 3 size size"]]]] = deque()
        for step, indices in enumerate(index_batches(len(whole.shapes), batch_size, seed)):
            coming.append((indices, ahead.submit(whole.crops, indices.tolist(), seed, step, size, pool)))
            if step:
                chosen, images = coming.popleft()
                yield chosen, images.result()


def finetune(
    backbone: Backbone,
    task: Task,
    head: Head,
    settings: Finetune | None = None,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress = no_progress,
) -> Weights:
    """Fine-tune a copy of the encoder with the task's head frozen, and return its weights (aligned or open regime)."""
    return optimise(backbone, [task], [head], False, settings or Finetune(), seed, precision, progress).encoder


def finetune_lora(
    backbone: Backbone,
    task: Task,
    head: Head,
    lora: Lora | None = None,
    settings: Finetune | None = None,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress = no_progress,
) -> Weights:
    """Fine-tune adapters of low rank with encoder and head frozen, and return the weights with their product added.

    The task vector is alpha / rank * B A of every adapted layer (LoRA, arXiv 2106.09685), so that all methods merge it.
    """
    chosen = settings or Finetune()
    return optimise(backbone, [task], [head], False, chosen, seed, precision, progress, lora or Lora()).encoder


def finetune_full(
    backbone: Backbone,
    task: Task,
    head: Head | None = None,
    settings: Finetune | None = None,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress = no_progress,
) -> Tuned:
    """Fine-tune encoder and head together, from ``head`` or else a seeded random one (full and open-full regimes)."""
    start = head or random_head(backbone.width, len(task.classes), seed, task.kind)
    return optimise(backbone, [task], [start], True, settings or Finetune(), seed, precision, progress)


def finetune_joint(
    backbone: Backbone,
    tasks: Sequence[Task],
    heads: Sequence[Head],
    settings: Finetune | None = None,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress = no_progress,
) -> Weights:
    """Fine-tune one encoder on all tasks at once with their heads frozen; every batch holds images of every task."""
    return optimise(backbone, tasks, heads, False, settings or Finetune(), seed, precision, progress).encoder


def optimise(
    backbone: Backbone,
    tasks: Sequence[Task],
    heads: Sequence[Head],
    heads_learn: bool,
    settings: Finetune,
    seed: int,
    precision: str,
    progress: Progress = no_progress,
    lora: Lora | None = None,
) -> Tuned:
    """Minimise the mean loss over tasks of a copy of the encoder, and of the heads where they learn too.

    With ``lora`` only adapters learn, whose product is added in the end. A linearised encoder is one fixed function of
    its weights: dropout is off. Batch norm keeps its statistics where heads are frozen, which were fitted under them.
    """
    with backbone.lock:  # what moves it may change its layers too
        module = copy.deepcopy(backbone.module)
    bound = bind(module)
    bound.flat.copy_(backbone.pretrained.flat)
    module.train(backbone.around is None)
    for layer in [] if heads_learn else batch_norm.layers(module):
        layer.eval()
    images = max(1, settings.batch_size // settings.accumulate // len(tasks))
    check_batch(module, images * len(tasks))
    chosen = training_precision(backbone, precision)
    heads = [head.on(backbone.device, learns=heads_learn) for head in heads]
    per_patch = [head.rules.per_patch for head in heads]

    def loss(batches: Sequence[Batch]) -> Float[Tensor, ""]:
        with autocast(chosen, backbone.device):
            parts = encode_all(module, [images for images, _ in batches], per_patch, backbone)
        each = [head.loss(own, labels) for head, own, (_, labels) in zip(heads, parts, batches, strict=True)]
        return torch.stack(each).mean()

    batches = zip(*(training_batches(backbone, task.train, images, seed, task.kind) for task in tasks), strict=True)
    with torch.random.fork_rng(devices=[] if backbone.device == "cpu" else None):
        torch.manual_seed(seed)  # for adapters, dropout and stochastic depth
        adapted = adapters.add(module, lora, backbone.name) if lora else None
        own = adapters.parameters(adapted) if adapted is not None else module.parameters()
        learning = [*own, *(p for head in heads for p in (head.weight, head.bias) if heads_learn)]
        train([Group(learning, settings.learning_rate)], loss, batches, schedule_of(settings), progress=progress)
    tuned = adapters.merged(adapted, bound) if adapted is not None else bound.clone()
    if not bool(torch.isfinite(tuned.flat).all()):
        raise DivergedError(
            f"fine-tuning diverged at learning rate {settings.learning_rate:g}", "lower finetune.learning_rate"
        )
    return Tuned(tuned, tuple(head.on("cpu") for head in heads))


def training_precision(backbone: Backbone, setting: str) -> Precision:
    """Return the precision of fine-tuning; a linearised encoder's derivative is always float32.

    Convolutions under autocast have no forward derivative in bfloat16.
    """
    wanted = setting if backbone.around is None else "float32"
    return choose_precision(wanted, "training", backbone.width, backbone.device)


def encode_all(
    module: torch.nn.Module,
    images: Sequence[Float[Tensor, "_ 3 size size"]],
    per_patch: Sequence[bool],
    backbone: Backbone,
) -> list[Float[Tensor, "_ ... width"]]:
    """Return the features of each batch, of images or of patches; all batches that need the same share one pass.

    The module is a copy of the backbone's, which says whether it is linearised.
    """
    found: dict[int, Tensor] = {}
    for wanted in sorted(set(per_patch)):
        places = [place for place, needed in enumerate(per_patch) if needed == wanted]
        features = encode(module, torch.cat([images[place] for place in places]), wanted, *backbone.expansion)
        found |= zip(places, features.split([len(images[place]) for place in places]), strict=True)
    return [found[place] for place in range(len(images))]


def schedule_of(settings: Finetune) -> Schedule:
    """Return the schedule of fine-tuning; a warm-up takes at most half of the steps."""
    warmup = min(settings.warmup, settings.steps // 2)
    return Schedule(settings.steps, warmup, settings.weight_decay, accumulate=settings.accumulate)


def check_batch(module: torch.nn.Module, images: int) -> None:
    """Raise when batch norm would see a single image at a time."""
    if images < 2 and any(isinstance(part, _BatchNorm) and part.training for part in module.modules()):
        raise TaskvecError(f"batch norm cannot train on batches of {images}", "raise finetune.batch_size to 2 or more")


def task_vector(backbone: Backbone, fine_tuned: Weights) -> Weights:
    """Return tau = theta_ft - theta_pre of a fine-tuned encoder (paper, section 2)."""
    return subtract(fine_tuned, backbone.pretrained)
