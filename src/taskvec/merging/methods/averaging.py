"""Methods that combine task vectors linearly, or along a great circle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, FiniteFloat

from taskvec.core.errors import TaskvecError
from taskvec.core.settings import Settings
from taskvec.merging.entries import Entry
from taskvec.merging.recipes import ADDITION, FIXED, MIDDLE, Method, register

if TYPE_CHECKING:  # the command lists methods without loading torch
    from jaxtyping import Float32, Float64
    from numpy import ndarray
    from torch import Tensor

NEARLY_PARALLEL = 0.9995
"""The cosine beyond which two tensors are interpolated on a straight line, as in mergekit."""


class Slerp(Settings):
    """``t`` is the place between the first model (0) and the second (1)."""

    t: Annotated[float, Field(ge=0, le=1)] = 0.5


class Lines(Settings):
    """The factor of the first layer (1 / T if None), and what is added to it up to the last layer."""

    alpha: FiniteFloat | None = None
    beta: FiniteFloat = 0.5


def total(vectors: Float32[Tensor, " tasks *shape"]) -> Float32[Tensor, " *shape"]:
    """Return the sum over tasks, in float32 and in the given order; of one task its own vector, not a copy."""
    return sum(vectors[1:], start=vectors[0])


def precise_total(vectors: Float32[Tensor, " tasks *shape"]) -> Float64[Tensor, " *shape"]:
    """Return the sum over tasks in float64, whose sign does not depend on the order of the tasks when they cancel."""
    if isinstance(vectors, np.ndarray):
        return vectors.sum(0, dtype=np.float64)
    import torch

    return vectors.sum(0, dtype=torch.float64)


def rows(vectors: Float32[Tensor, " tasks *shape"]) -> Float32[Tensor, "tasks count"]:
    """Return every task's numbers as one row."""
    return vectors.reshape(len(vectors), -1)


def by_task(
    values: Float32[Tensor, " tasks"] | Float32[ndarray, " tasks"], vectors: Float32[Tensor, " tasks *shape"]
) -> Tensor:
    """Return one value a task in a shape that broadcasts against the tasks' vectors, where and as those are."""
    shaped: Any = values.reshape(-1, *[1] * (vectors.ndim - 1))
    if isinstance(vectors, np.ndarray):
        return shaped
    import torch

    return torch.as_tensor(shaped, device=vectors.device)


def task_arithmetic(
    vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Settings
) -> Float32[Tensor, " *shape"]:
    """Return sum_t tau_t (arXiv 2212.04089, section 2; the paper's section 2)."""
    return total(vectors)


register(
    Method(
        name=ADDITION,
        function=task_arithmetic,
        description="task addition: the sum of the task vectors",
        reference="Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089",
        laws=frozenset({"one task", "order", "homogeneous"}),
        elementwise=True,
        arrays=True,
    )
)


def average(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Settings) -> Float32[Tensor, " *shape"]:
    """Return 1/T sum_t tau_t, which gives the mean of the fine-tuned weights (arXiv 2203.05482)."""
    return total(vectors) / len(vectors)


register(
    Method(
        name="average",
        function=average,
        description="the mean of the fine-tuned weights",
        reference="Wortsman et al., Model soups, arXiv 2203.05482",
        scales=FIXED,
        laws=frozenset({"one task", "order", "homogeneous"}),
        elementwise=True,
        arrays=True,
    )
)


def lines(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Lines) -> Float32[Tensor, " tasks *shape"]:
    """Return (alpha + beta l/(L-1)) tau_t for layer l of L (arXiv 2410.17146).

    What is outside of the layers has alpha, as in the authors' code; alpha = 1/T is their rule for task addition. They
    scale the merged vector, which is the same before any method whose result for an entry is proportional to its input.
    """
    if entry.depth is None:
        raise TaskvecError(
            f"lines: no name of the model's tensors tells a layer (the first is '{entry.name}')",
            "leave lines out, or rename the layers to blocks.0, blocks.1, ...",
        )
    alpha = 1 / len(vectors) if config.alpha is None else config.alpha
    factor: float = alpha + config.beta * entry.depth
    return vectors * factor


register(
    Method(
        name="lines",
        function=lines,
        description="vectors scaled up from the first layer to the last; before any other method",
        reference="Wang et al., LiNeS, arXiv 2410.17146",
        scales=MIDDLE,
        role="transform",
        config=Lines,
        laws=frozenset({"order", "homogeneous"}),
        elementwise=True,
        arrays=True,
    )
)


def slerp(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Slerp) -> Float32[Tensor, " *shape"]:
    """Return (sin((1-t) w) theta_1 + sin(t w) theta_2) / sin(w) - theta_pre, w the angle of the two tensors.

    Shoemake (SIGGRAPH 1985), one tensor at a time as in mergekit, which also takes a straight line for nearly parallel
    tensors. Fine-tuned weights usually are, so that little but averaging is left.
    """
    first, second = (entry.base + vector for vector in vectors.double())
    norms = first.norm() * second.norm()
    cosine = ((first * second).sum() / norms).clamp(-1, 1) if norms > 0 else norms.new_ones(())
    if abs(float(cosine)) > NEARLY_PARALLEL:
        return vectors[0] * (1 - config.t) + vectors[1] * config.t
    angle = cosine.acos()
    mixed = (((1 - config.t) * angle).sin() * first + (config.t * angle).sin() * second) / angle.sin()
    moved: Tensor = mixed - entry.base
    return moved.float()


register(
    Method(
        name="slerp",
        function=slerp,
        description="two models along a great circle",
        reference="Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985",
        scales=FIXED,
        config=Slerp,
        laws=frozenset({"order"}),
        tasks=2,
    )
)
