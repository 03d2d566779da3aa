"""How much memory a step takes at most, by what it reads."""

from __future__ import annotations

from taskvec.engine.pipeline import Step, leaves
from taskvec.study.forecast.sizes import Sizes


def memory(step: Step, sizes: Sizes) -> tuple[float, float]:
    """Return the bytes a step needs on its device and in main memory: an estimate from above, without the libraries.

    Training keeps weights, gradients, Adam's two moments and the pre-trained copy, and half-precision activations.
    """
    weights = sizes.weights(step) if step.inputs.get("backbone") else 0.0
    if settings := getattr(step.config, "finetune", None):
        batch = settings.batch_size / settings.accumulate
        return 6 * weights + 2 * batch * sizes.backbone(step).activations, 2 * weights
    held = (len(list(leaves(step.inputs.get("finetuned")))) + 4) * weights
    return (held, 2 * weights) if getattr(step.config, "device", "") else (0, held)
