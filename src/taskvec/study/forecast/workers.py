"""How many steps of a study run at once, unless its user says so: on the cores of a CPU, and on GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from taskvec.core.machine import Gpu, cores
from taskvec.data.uploads import PART
from taskvec.engine.pipeline import Step, ordered
from taskvec.study.forecast.sizes import BACKWARD, Sizes
from taskvec.study.forecast.step_memory import memory

CONTEXT = 1.5e9
"""Bytes that a process takes of a GPU beside its tensors: CUDA's context, and kernels of libraries."""
USABLE = 0.9
"""Share of a GPU's memory that workers are planned to fill."""
SMALL = 1e12
"""FLOPs of a training step below which it takes longer to launch it than to compute it, on a GPU of this decade."""
BATCH = 64
"""Images of a batch where a study trains nothing."""
MOST = 6
"""Workers of one GPU: their kernels take turns on it, so that more of them gain nothing."""


def cpu_workers(threads: int) -> int:
    """Return how many steps run at once on a CPU: one for every ``threads`` cores."""
    return max(1, cores() // threads)


def gpu_workers(steps: Sequence[Step], gpus: Sequence[Gpu]) -> int:
    """Return how many steps run at once on GPUs: one on each, or several where every encoder of the study is small.

    Several are at most ``MOST``, a core for each, and as many as the memory of the largest step, of the images
    that each keeps there and of a context leave room for. Nothing depends on what happens to be free.
    """
    every, sizes = ordered(steps), Sizes()
    looking = [step for step in every if getattr(step.config, "device", "")]
    if max((training_flops(step, sizes) for step in looking), default=0.0) > SMALL:
        return len(gpus)
    needed = CONTEXT + max((memory(step, sizes)[0] for step in looking), default=0.0)
    rooms = min(int(USABLE * gpu.memory // (needed + gpu.memory / PART)) for gpu in gpus)
    return len(gpus) * max(1, min(MOST, cores() // len(gpus), rooms))


def training_flops(step: Step, sizes: Sizes) -> float:
    """Return the FLOPs of one pass forward and back of a step's backbone, of a batch of the study's size."""
    settings = getattr(step.config, "finetune", None)
    images = settings.batch_size / settings.accumulate if settings else BATCH
    return BACKWARD * images * sizes.backbone(step).flops
