"""Methods that look at singular vectors, or at the row spaces, of weight matrices; other entries are averaged.

Matrices are decomposed in float64, well conditioned ones through the Gram matrix of their shorter side, which on one
core takes a third to two thirds of the time of a float32 SVD and is more exact. Directions whose singular value is
below float32's rounding of the largest one say nothing and are left out, so that no result depends on how a null space
happens to be completed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, FiniteFloat

from taskvec.merging.averaging import average, total
from taskvec.merging.parts import Part
from taskvec.settings import Count, Rate, Settings

if TYPE_CHECKING:  # the command lists methods without loading torch
    from jaxtyping import Float, Float32, Float64
    from torch import Tensor

    Triple = tuple[Float64[Tensor, "rows rank"], Float64[Tensor, " rank"], Float64[Tensor, "rank columns"]]

ROUNDING = 2.0**-23
"""The relative rounding of float32."""
WORST = 1e-9
"""The ratio of the squares of singular values below which a Gram matrix is not exact enough."""


class IsoCts(Settings):
    """The share of directions that all tasks have in common; the others are shared out among the tasks."""

    k: Annotated[FiniteFloat, Field(gt=0, le=1)] = 0.8


class Wudi(Settings):
    """Steps and learning rate of Adam."""

    steps: Count = 300
    learning_rate: Rate = 1e-5


Function = Callable[["Float32[Tensor, ' tasks *shape']", Part, Any], "Float32[Tensor, ' *shape']"]


def on_matrices(function: Callable[[Float32[Tensor, "tasks rows columns"], Any], Tensor]) -> Function:
    """Give a method the linear maps as matrices, kernels flattened to [outputs, inputs * size]; average the rest."""

    @wraps(function)
    def merged(vectors: Float32[Tensor, " tasks *shape"], part: Part, config: Any) -> Float32[Tensor, " *shape"]:
        if part.kind != "matrix":
            return average(vectors, part, config)
        return function(vectors.flatten(2), config).to(vectors.dtype).view(part.base.shape)

    return merged


def decompose(matrix: Float[Tensor, "rows columns"], most: int | None = None, size: float = 0) -> Triple:
    """Return U, S, V^T of the thin SVD in float64 without null directions, the ``most`` largest ones at most.

    A direction is null below the rounding of the largest one, or of ``size``, that of what the matrix was made from.
    """
    import torch

    if matrix.shape[0] > matrix.shape[1]:
        right, sizes, left = decompose(matrix.mT, most, size)
        return left.mT, sizes, right.mT
    wide = matrix.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    most = len(squares) if most is None else min(most, len(squares))
    if most and squares[-most] < WORST * squares[-1]:
        left, sizes, right = torch.linalg.svd(wide, full_matrices=False)
    else:
        left = vectors.flip(1)[:, :most]
        right = left.mT @ wide
        sizes = right.norm(dim=1)
        right /= sizes[:, None]
    count = min(most, int((sizes > ROUNDING * sizes[:1].clamp(min=size)).sum()))
    return left[:, :count], sizes[:count], right[:count]


def summed(vectors: Float32[Tensor, "tasks rows columns"]) -> Float64[Tensor, "rows columns"]:
    """Return the sum over tasks in float64, so that no rounding looks like a direction."""
    found = vectors[0].double()
    for vector in vectors[1:]:
        found += vector
    return found


def nearest_orthogonal(matrix: Float64[Tensor, "rows columns"]) -> Float64[Tensor, "rows columns"]:
    """Return U V^T of the SVD, the nearest matrix with orthonormal columns (or rows): the Procrustes solution."""
    left, _, right = decompose(matrix)
    return left @ right


@on_matrices
def tsv_m(vectors: Float32[Tensor, "tasks rows columns"], config: Settings) -> Float64[Tensor, "rows columns"]:
    """Return U' S V'^T, U' and V' nearest orthogonal to the tasks' joined U_t and V_t of rank r/T (arXiv 2412.00081).

    S joins the tasks' largest r/T singular values. With more tasks than dimensions each keeps one direction, where the
    authors' code keeps none.
    """
    import torch

    rank = max(1, min(vectors.shape[1:]) // len(vectors))
    lefts, sizes, rights = zip(*(decompose(vector, rank) for vector in vectors), strict=True)
    left, right = nearest_orthogonal(torch.cat(lefts, 1)), nearest_orthogonal(torch.cat(rights, 0))
    return (left * torch.cat(sizes)) @ right


@on_matrices
def iso_c(vectors: Float32[Tensor, "tasks rows columns"], config: Settings) -> Float64[Tensor, "rows columns"]:
    """Return mean(S) U V^T of the sum's SVD, sum_t tau_t = U S V^T (arXiv 2502.04959)."""
    left, sizes, right = decompose(summed(vectors))
    return (sizes.sum() / min(vectors.shape[1:])) * (left @ right)


@on_matrices
def iso_cts(vectors: Float32[Tensor, "tasks rows columns"], config: IsoCts) -> Float64[Tensor, "rows columns"]:
    """Return mean(S') U' V'^T: directions of the sum, and of what each task has outside them (arXiv 2502.04959).

    The sum gives about k r directions and each task (1 - k) r / T of its residual tau_t - U U^T tau_t, rounded as in
    the authors' code; U' and V' are nearest orthogonal to all of them, and mean(S') is over r values.
    """
    import torch

    rank, tasks = min(vectors.shape[1:]), len(vectors)
    own = min(round((rank - int(rank * config.k)) / tasks), rank // tasks)
    common, *_ = found = decompose(summed(vectors), rank - own * tasks)
    parts = [found]
    for vector in (one.double() for one in vectors if own):
        parts.append(decompose(vector - common @ (common.mT @ vector), own, size=float(vector.norm())))
    lefts, sizes, rights = zip(*parts, strict=True)
    left, right = nearest_orthogonal(torch.cat(lefts, 1)), nearest_orthogonal(torch.cat(rights, 0))
    return (torch.cat(sizes).sum() / rank) * (left @ right)


@on_matrices
def wudi(vectors: Float32[Tensor, "tasks rows columns"], config: Wudi) -> Float32[Tensor, "rows columns"]:
    """Minimise sum_t norm((tau - tau_t) tau_t^T)^2 / norm(tau_t)^2 by Adam from sum_t tau_t (arXiv 2503.08099).

    With C_t = tau_t^T tau_t / norm(tau_t)^2 the gradient is 2 (tau sum_t C_t - sum_t tau_t C_t): one product a step.
    One task is its own minimum.
    """
    import torch

    start = total(vectors).clone()
    norms = vectors.square().sum((1, 2))
    if len(vectors) == 1 or not norms.any():
        return start
    pulls, goal = torch.zeros(start.shape[1], start.shape[1]), torch.zeros_like(start)
    for vector, norm in zip(vectors, norms, strict=True):
        if norm > 0:
            own = vector.mT @ vector / norm
            pulls, goal = pulls.to(own.device) + own, goal + vector @ own
    optimizer = torch.optim.Adam([start], lr=config.learning_rate)
    for _ in range(config.steps):
        start.grad = 2 * (start @ pulls - goal)
        optimizer.step()
    return start
