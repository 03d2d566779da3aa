"""Pre-training of the lab's encoders: own images, one thread, a file and its record."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import save
from torch import Generator, Tensor, nn

from taskvec.errors import TaskvecError, unknown
from taskvec.lab.corpus import draw_pretraining, pretraining_code_points
from taskvec.lab.looks import one_thread, stream
from taskvec.lab.vit import VisionTransformer
from taskvec.training import Group, Progress, Schedule, no_progress, train

MEAN = STD = (0.5, 0.5, 0.5)
"""Mean and standard deviation of the pixels, by which images are normalised before they enter an encoder."""
BATCH = 64
LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.05
SMOOTHING = 0.1
WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""
EASED = 0.6
"""Share of the steps after which the images have reached full difficulty."""
HELD_OUT = 4096
"""Images on which the figures are measured."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Pretraining:
    """One way to pre-train: its function, called with steps, seed and progress, and the length of the shipped run."""

    function: Callable[[int, int, Progress], tuple[VisionTransformer, Figures]]
    steps: int


def normalised(images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Scale bytes to the range -1 to 1, which is mean 0.5 and deviation 0.5."""
    return images.float() / 127.5 - 1


def curriculum(steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one batch of images and labels a step, from clean glyphs to full difficulty."""
    generator = stream("supervised", "train", seed)
    for step in range(steps):
        images, labels = draw_pretraining(BATCH, min(1.0, step / (EASED * steps)), generator)
        yield normalised(images), labels


def seeded_model(classes: int, seed: int) -> tuple[VisionTransformer, nn.Linear]:
    """Initialise encoder and head from ``seed``, and leave torch's global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = VisionTransformer()
        return encoder, nn.Linear(encoder.width, classes)


def round_to_half(encoder: nn.Module) -> None:
    """Round the weights to float16, the precision in which they are kept, but leave them in float32."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(parameter.half())


@torch.no_grad()
def pretraining_accuracy(encoder: nn.Module, head: nn.Linear, difficulty: float, generator: Generator) -> float:
    """Return the share of new images of the pre-training classes whose class is recognised."""
    images, labels = draw_pretraining(HELD_OUT, difficulty, generator)
    right = [
        (head(encoder(normalised(chunk))).argmax(1) == truth).sum()
        for chunk, truth in zip(images.split(512), labels.split(512), strict=True)
    ]
    return int(sum(right)) / HELD_OUT


def pretrain_supervised(
    steps: int, seed: int = 0, progress: Progress = no_progress
) -> tuple[VisionTransformer, Figures]:
    """Classify glyphs that no task uses, from clean to hard; return the encoder, rounded to float16, and its figures.

    Every training image is new. The figures are the mean loss of the last tenth of the steps and the accuracy on
    clean and on hard images of another random stream.
    """
    with one_thread():
        encoder, head = seeded_model(len(pretraining_code_points()), seed)

        def loss(batch: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
            return F.cross_entropy(head(encoder(batch[0])), batch[1], label_smoothing=SMOOTHING)

        groups = [Group([*encoder.parameters(), *head.parameters()], LEARNING_RATE)]
        schedule = Schedule(steps, warmup=round(WARMUP * steps), weight_decay=WEIGHT_DECAY)
        losses = train(groups, loss, curriculum(steps, seed), schedule, progress=progress)
        round_to_half(encoder)
        last = losses[-max(1, steps // 10) :]
        generator = stream("supervised", "held out", seed)
        return encoder.eval(), {
            "classes": len(pretraining_code_points()),
            "final_loss": sum(last) / len(last),
            "held_out_accuracy_clean": pretraining_accuracy(encoder, head, 0.0, generator),
            "held_out_accuracy": pretraining_accuracy(encoder, head, 1.0, generator),
        }


PRETRAININGS: Mapping[str, Pretraining] = MappingProxyType({"supervised": Pretraining(pretrain_supervised, 7000)})
"""How every encoder is pre-trained, by its name."""


def replace(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Return the versions on which the bytes of an encoder depend."""
    packages = ("torch", "pillow", "matplotlib", "numpy")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def write_encoder(encoder: VisionTransformer, folder: Path, name: str, facts: Mapping[str, Any]) -> Path:
    """Write ``NAME.safetensors`` in float16, then ``NAME.json`` with ``facts`` and what belongs to the file itself."""
    folder.mkdir(parents=True, exist_ok=True)
    data = save({key: tensor.half().contiguous() for key, tensor in encoder.state_dict().items()})
    path = folder / f"{name}.safetensors"
    replace(path, data)
    known = {
        **facts,
        "versions": versions(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "architecture": encoder.architecture,
        "mean": MEAN,
        "std": STD,
    }
    replace(path.with_suffix(".json"), (json.dumps(known, indent=2) + "\n").encode())
    return path


def pretrain(name: str, out: Path, steps: int | None = None, seed: int = 0, progress: Progress = no_progress) -> Path:
    """Pre-train one of ``PRETRAININGS`` on one thread and write it to the folder ``out``; return the weights' path.

    The same steps, seed and versions give the same bytes on one type of processor. An unknown name raises.
    """
    if name not in PRETRAININGS:
        raise unknown("pre-trained lab encoder", name, PRETRAININGS)
    steps = PRETRAININGS[name].steps if steps is None else steps
    if steps < 1:
        raise TaskvecError(f"cannot pre-train for {steps} steps", "ask for one or more")
    start = time.perf_counter()
    encoder, figures = PRETRAININGS[name].function(steps, seed, progress)
    facts = {
        "command": f"taskvec lab pretrain {name} --steps {steps} --seed {seed}",
        "seed": seed,
        "steps": steps,
        "threads": 1,
        "seconds": round(time.perf_counter() - start, 1),
        "figures": figures,
    }
    return write_encoder(encoder, out, name, facts)
