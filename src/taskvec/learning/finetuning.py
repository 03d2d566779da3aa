"""Fine-tuning of an encoder on one task or several, with frozen heads or with heads that learn too.

The regimes that use it are records in ``learning.regimes``.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from taskvec.core.compute import Precision, arithmetic, autocast, choose_precision
from taskvec.core.cuda_steps import deterministic
from taskvec.core.errors import TaskvecError, first_line
from taskvec.core.notes import note
from taskvec.core.progress import Progress, no_progress
from taskvec.core.settings import Finetune, Lora
from taskvec.core.training import DivergedError, Group, Schedule, train
from taskvec.data.tasks import Task
from taskvec.encoders import batch_norm
from taskvec.encoders.backbone import Backbone, encode
from taskvec.learning import lora as lora_layers
from taskvec.learning.batches import Draw, Stream, training_stream
from taskvec.learning.heads import Head, random_head
from taskvec.weights.flat import Weights, bind
from taskvec.weights.vectors import subtract

GRAPHED = 30_000_000
"""Parameters up to which a GPU takes a step as one CUDA graph: launching its operations takes longer than they do."""
COMPILED_STEPS = 1000
"""Steps from which compiling a larger encoder pays, which takes about a minute."""


@dataclass(frozen=True)
class FinetuneResult:
    """Fine-tuned weights of the encoder, a head for every task it was tuned on, and the loss of every step."""

    encoder: Weights
    heads: tuple[Head, ...]
    losses: tuple[float, ...] = ()


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
    images = images_of_each(settings, len(tasks))
    check_batch(module, images * len(tasks))
    learned = [
        (head or random_head(backbone.width, len(task.classes), seed, task.kind)).on(backbone.device, head_learns)
        for task, head in zip(tasks, heads, strict=True)
    ]
    streams = [training_stream(backbone, task.train, images, seed, task.kind) for task in tasks]
    draws: Iterator[Sequence[Draw]] = zip(*(stream.uploaded(backbone.device) for stream in streams), strict=True)
    devices = [backbone.device] if backbone.device.startswith("cuda") else []
    with arithmetic("float32", backbone.device), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)  # for adapters, dropout and stochastic depth
        adapted = lora_layers.add(module, lora, backbone.name) if lora else None
        weights = lora_layers.parameters(adapted) if adapted is not None else module.parameters()
        learning = [*weights, *(p for head in learned for p in (head.weight, head.bias) if head_learns)]
        loss = loss_of(backbone, module, learned, streams, training_precision(backbone, precision))
        if pays_to_compile(backbone, module, learned, settings):
            first = next(draws)
            compile_encoder(module, loss, first, learning, backbone.device)
            draws = itertools.chain([first], draws)
        losses = minimise(Group(learning, settings.learning_rate), loss, draws, settings, progress, graphed(backbone))
    tuned = lora_layers.merged(adapted, bound) if adapted is not None else bound.clone()
    check_finite(tuned, settings)
    return FinetuneResult(tuned, tuple(head.on("cpu") for head in learned), tuple(losses))


def images_of_each(settings: Finetune, tasks: int) -> int:
    """Return how many images of each task a pass takes; a note tells where one of each is more than was asked for."""
    images = settings.batch_size // settings.accumulate // tasks
    if not images:
        note(
            f"a batch of {settings.batch_size} in {settings.accumulate} passes holds fewer images than there are "
            f"tasks, {tasks}: each pass takes one image of every task"
        )
    return max(1, images)


def loss_of(
    backbone: Backbone, module: torch.nn.Module, heads: Sequence[Head], streams: Sequence[Stream], precision: Precision
) -> Callable[[Sequence[Draw]], Float[Tensor, ""]]:
    """Return the mean loss over tasks as a function of a draw of each, from which it makes batches on the device."""
    per_patch = [head.task_type.per_patch for head in heads]

    def loss(draws: Sequence[Draw]) -> Float[Tensor, ""]:
        batches = [stream.make(draw) for stream, draw in zip(streams, draws, strict=True)]
        with autocast(precision, backbone.device):
            parts = encode_all(module, [images for images, _ in batches], per_patch, backbone)
        each = [head.loss(features, labels) for head, features, (_, labels) in zip(heads, parts, batches, strict=True)]
        return torch.stack(each).mean()

    return loss


def minimise(
    group: Group,
    loss: Callable[[Sequence[Draw]], Float[Tensor, ""]],
    draws: Iterator[Sequence[Draw]],
    settings: Finetune,
    progress: Progress,
    graph: bool,
) -> list[float]:
    """Train with the schedule of fine-tuning and return the losses, all of them finite."""
    try:
        return train([group], loss, draws, schedule_of(settings), progress=progress, finite=True, graph=graph)
    except DivergedError as error:
        raise error.mended_by("lower finetune.learning_rate") from None


def graphed(backbone: Backbone) -> bool:
    """Return whether a GPU takes steps of an encoder as CUDA graphs: a small one, not as its derivative."""
    return backbone.base is None and backbone.pretrained.flat.numel() <= GRAPHED


def pays_to_compile(backbone: Backbone, module: torch.nn.Module, heads: Sequence[Head], settings: Finetune) -> bool:
    """Return whether a GPU trains an encoder faster when it is compiled: a larger one, for many steps.

    That needs Triton and a C compiler. Compiling takes a pass, which must leave no trace in statistics of batch norm.
    """
    large = backbone.base is None and not graphed(backbone) and settings.steps >= COMPILED_STEPS
    able = importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("cc", "gcc", "clang")))
    traced = trains_statistics(module) or any(head.task_type.per_patch for head in heads)
    return backbone.device.startswith("cuda") and large and able and not traced


def compile_encoder(
    module: torch.nn.Module,
    loss: Callable[[Sequence[Draw]], Float[Tensor, ""]],
    draws: Sequence[Draw],
    learning: Sequence[Tensor],
    device: str,
) -> None:
    """Compile an encoder for the shapes of a draw, there and back; one that fails stays as it is, with a note."""
    state: Any = module
    with warnings.catch_warnings(), deterministic(torch.device(device)):
        warnings.simplefilter("ignore")  # of the compiler about itself, and that TF32 is off, which is on purpose
        try:
            state.compile(dynamic=False)
            loss(draws).backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # compilers fail in many ways
            state._compiled_call_impl = None
            note(f"the encoder is trained as it is, since it cannot be compiled: {first_line(error)}")
    for parameter in (*module.parameters(), *learning):
        parameter.grad = None


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
            f"training diverged at learning rate {settings.learning_rate:g}: NaN or infinity in its weights",
            "lower finetune.learning_rate",
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
    if images < 2 and trains_statistics(module):
        raise TaskvecError(f"batch norm cannot train on batches of {images}", "raise finetune.batch_size to 2 or more")


def trains_statistics(module: torch.nn.Module) -> bool:
    """Return whether batch norm of a module takes statistics from the batches it sees."""
    return any(isinstance(part, _BatchNorm) and part.training for part in module.modules())


def task_vector(backbone: Backbone, fine_tuned: Weights) -> Weights:
    """Return tau = theta_ft - theta_pre of a fine-tuned encoder (paper, section 2)."""
    return subtract(fine_tuned, backbone.pretrained)
