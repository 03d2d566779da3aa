"""How much memory a step takes at most, by what it reads."""

from __future__ import annotations

from taskvec.engine.pipeline import Step, leaves
from taskvec.study.forecast.sizes import Sizes

PIECES = 0.1e9
"""Bytes of the pieces that a streamed merge holds at once."""
READ_HEADS = ("build_model",)
"""Kinds of step that read of fine-tuned encoders their heads alone."""
LARGEST = 1 / 30
"""Share of a transformer's weights that its largest matrix has: of 12 blocks or more, a third of each."""


def memory(step: Step, sizes: Sizes) -> tuple[float, float]:
    """Return the bytes a step needs on its device and in main memory: an estimate from above, without the libraries.

    Training keeps weights, gradients, Adam's two moments and the pre-trained copy, and half-precision activations.
    """
    opens = hasattr(step.config, "device") or step.type.name == "load_backbone"
    weights = sizes.weights(step) if opens else 0.0
    encoders = 0 if step.type.name in READ_HEADS else len(list(leaves(step.inputs.get("finetuned"))))
    on_device = bool(getattr(step.config, "device", ""))
    if settings := getattr(step.config, "finetune", None):
        batch = settings.batch_size / settings.accumulate
        return 6 * weights + 2 * batch * sizes.backbone(step).activations, 2 * weights
    if step.type.name == "merge":
        held = merging(step, weights, encoders)
        return (held, PIECES) if on_device else (0.0, held)
    held = (encoders + 4) * weights
    return (held, 2 * weights) if on_device else (0.0, held)


def merging(step: Step, weights: float, tasks: int) -> float:
    """Return the bytes that a merge of so many encoders holds: entries of all of them, one at a time, in pieces.

    What measures on data has the encoder with its gradients and sums; masks of each task take a bit a weight.
    """
    recipe = step.config.recipe()
    if recipe.measures:
        return max(10, tasks + 4) * weights
    matrices = 0.0 if recipe.elementwise else (2 * tasks + 4) * LARGEST * weights
    return PIECES + matrices + (weights + tasks * weights / 32 if recipe.per_task else 0.0)
