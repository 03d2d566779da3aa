"""Fine-tuning of an encoder on one task or several, with frozen heads or with heads that learn too.

The regimes that use it are records in ``learning.regimes``.
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
from taskvec.core.machine import cores
from taskvec.core.progress import Progress, no_progress
from taskvec.core.settings import Finetune, Lora
from taskvec.core.task_types import CLASSIFICATION, TASK_TYPES
from taskvec.core.training import Group, Schedule, index_batches, train
from taskvec.data.augment import random_resized_crop
from taskvec.data.decoding import Whole
from taskvec.data.images import normalise
from taskvec.data.tasks import Split, Task
from taskvec.encoders import batch_norm
from taskvec.encoders.backbone import Backbone, encode
from taskvec.learning import lora as lora_layers
from taskvec.learning.heads import Head, random_head
from taskvec.weights.flat import Weights, bind
from taskvec.weights.vectors import subtract

Batch = tuple[Float[Tensor, "batch 3 size size"], Shaped[Tensor, "batch ..."]]


class DivergedError(TaskvecError):
    """Fine-tuning ended with NaN or infinity; a search of learning rates goes on with the others."""


@dataclass(frozen=True)
class FinetuneResult:
    """Fine-tuned weights of the encoder, and a head for every task it was tuned on."""

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
    if split.whole is not None and TASK_TYPES[kind].crops:
        size, device = backbone.preprocessing.size, backbone.device
        for indices, crops in cropped_batches(split.whole, batch_size, size, seed):
            yield normalise(torch.from_numpy(crops), backbone.preprocessing, device), labels[indices].to(device)
    generator = torch.Generator().manual_seed(seed)
    for indices in index_batches(len(split), batch_size, seed):
        images = torch.from_numpy(split.images[indices.numpy()])
        inputs = normalise(images, backbone.preprocessing, backbone.device)
        cropped = random_resized_crop(inputs, generator) if TASK_TYPES[kind].crops else inputs
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
    """Return the weights of an encoder fine-tuned on one task with its head frozen (aligned or open regime)."""
    return finetune_tasks(backbone, [task], [head], settings, seed, precision, progress).encoder


def finetune_tasks(
    backbone: Backbone,
    tasks: Sequence[Task],
    heads: Sequence[Head | None],
    settings: Finetune | None = None,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress = no_progress,
    *,
    head_learns: bool = False,
    lora: Lora | None = None,
) -> FinetuneResult:
    """Return a copy of the encoder that minimises the mean loss over tasks; every batch holds images of every task.

    A head that is None starts at random, from the seed; heads are frozen unless ``head_learns``. With ``lora`` only
    low-rank adapters learn, whose product alpha / rank * B A is added in the end.
    """
    settings = settings or Finetune()
    module, bound = training_copy(backbone, head_learns)
    images = max(1, settings.batch_size // settings.accumulate // len(tasks))
    check_batch(module, images * len(tasks))
    chosen = training_precision(backbone, precision)
    learned = [
        (head or random_head(backbone.width, len(task.classes), seed, task.kind)).on(backbone.device, head_learns)
        for task, head in zip(tasks, heads, strict=True)
    ]
    per_patch = [head.task_type.per_patch for head in learned]

    def loss(batches: Sequence[Batch]) -> Float[Tensor, ""]:
        with autocast(chosen, backbone.device):
            parts = encode_all(module, [images for images, _ in batches], per_patch, backbone)
        each = [
            head.loss(features, labels) for head, features, (_, labels) in zip(learned, parts, batches, strict=True)
        ]
        return torch.stack(each).mean()

    batches = zip(*(training_batches(backbone, task.train, images, seed, task.kind) for task in tasks), strict=True)
    with torch.random.fork_rng(devices=[] if backbone.device == "cpu" else None):
        torch.manual_seed(seed)  # for adapters, dropout and stochastic depth
        adapted = lora_layers.add(module, lora, backbone.name) if lora else None
        weights = lora_layers.parameters(adapted) if adapted is not None else module.parameters()
        learning = [*weights, *(p for head in learned for p in (head.weight, head.bias) if head_learns)]
        train([Group(learning, settings.learning_rate)], loss, batches, schedule_of(settings), progress=progress)
    tuned = lora_layers.merged(adapted, bound) if adapted is not None else bound.clone()
    check_finite(tuned, settings)
    return FinetuneResult(tuned, tuple(head.on("cpu") for head in learned))


def training_copy(backbone: Backbone, head_learns: bool) -> tuple[torch.nn.Module, Weights]:
    """Return a copy of the encoder in its mode of training, and the buffer that its parameters are views of.

    A linearised encoder is one fixed function of its weights: dropout is off. Batch norm keeps its statistics where
    heads are frozen, which were fitted under them.
    """
    with backbone.lock:  # what moves it may change its layers too
        module = copy.deepcopy(backbone.module)
    bound = bind(module)
    bound.flat.copy_(backbone.pretrained.flat)
    module.train(backbone.base is None)
    for layer in [] if head_learns else batch_norm.layers(module):
        layer.eval()
    return module, bound


def check_finite(tuned: Weights, settings: Finetune) -> None:
    """Raise where training has ended in NaN or infinity."""
    if not bool(torch.isfinite(tuned.flat).all()):
        raise DivergedError(
            f"fine-tuning diverged at learning rate {settings.learning_rate:g}", "lower finetune.learning_rate"
        )


def training_precision(backbone: Backbone, setting: str) -> Precision:
    """Return the precision of fine-tuning; a linearised encoder's derivative is always float32.

    Convolutions under autocast have no forward derivative in bfloat16.
    """
    wanted = setting if backbone.base is None else "float32"
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
    by_place: dict[int, Tensor] = {}
    for wanted in sorted(set(per_patch)):
        places = [place for place, needed in enumerate(per_patch) if needed == wanted]
        features = encode(module, torch.cat([images[place] for place in places]), wanted, backbone.base)
        by_place |= zip(places, features.split([len(images[place]) for place in places]), strict=True)
    return [by_place[place] for place in range(len(images))]


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
