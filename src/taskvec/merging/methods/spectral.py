"""Methods that look at singular vectors, or at the row spaces, of weight matrices; other entries are averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, FiniteFloat

from taskvec.core.settings import Count, Rate, Settings
from taskvec.merging.entries import Entry
from taskvec.merging.methods.averaging import average, total
from taskvec.merging.methods.singular import Columns, TruncatedSVD, decompose, joined, multiply, piece_on
from taskvec.merging.recipes import MIDDLE, WIDE, Method, register

if TYPE_CHECKING:  # the command lists methods without loading torch
    from jaxtyping import Float32
    from torch import Tensor

ROWS, LARGE_ROWS = 1 << 17, 1 << 26
"""Elements of a block of rows that wudi moves at once: on a CPU, and on a GPU."""


class IsoCts(Settings):
    """The share of singular vectors that all tasks have in common; the others are shared out among the tasks."""

    k: Annotated[FiniteFloat, Field(gt=0, le=1)] = 0.8


class Wudi(Settings):
    """Steps and learning rate of Adam."""

    steps: Count = 300
    learning_rate: Rate = 1e-5


Function = Callable[["Float32[Tensor, ' tasks *shape']", Entry, Any], "Float32[Tensor, ' *shape']"]


def on_matrices(function: Callable[[Float32[Tensor, "tasks rows columns"], Any], Tensor]) -> Function:
    """Give a method the linear maps as matrices, kernels flattened to [outputs, inputs * size]; average the rest."""

    @wraps(function)
    def merged(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Any) -> Float32[Tensor, " *shape"]:
        if entry.kind != "matrix":
            return average(vectors, entry, config)
        return function(vectors.flatten(2), config).reshape(entry.base.shape)

    return merged


def wide(function: Callable[[Float32[Tensor, "tasks rows columns"], Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    """Give a method that treats both sides of a matrix alike the shorter side as its rows."""

    @wraps(function)
    def turned(vectors: Float32[Tensor, "tasks rows columns"], config: Any) -> Float32[Tensor, "rows columns"]:
        if vectors.shape[1] > vectors.shape[2]:
            return function(vectors.mT, config).mT
        return function(vectors, config)

    return turned


def columns_of(vector: Float32[Tensor, "rows columns"]) -> Columns:
    """Return a matrix to be read in pieces."""
    return Columns(lambda place: vector[:, place].double(), len(vector), vector.shape[1], piece_on(vector))


def summed(vectors: Float32[Tensor, "tasks rows columns"]) -> Columns:
    """Return the sum over tasks, added up in float64 so that no rounding looks like a singular vector."""

    def read(place: slice) -> Tensor:
        piece = vectors[0][:, place].double()
        for vector in vectors[1:]:
            piece += vector[:, place]
        return piece

    return Columns(read, vectors.shape[1], vectors.shape[2], piece_on(vectors))


@on_matrices
@wide
def tsv_m(vectors: Float32[Tensor, "tasks rows columns"], config: Settings) -> Float32[Tensor, "rows columns"]:
    """Return U' S V'^T, U' and V' nearest orthogonal to the tasks' joined U_t and V_t of rank r/T (arXiv 2412.00081).

    S joins the tasks' largest r/T singular values. With more tasks than dimensions each keeps one vector, where the
    authors' code keeps none.
    """
    import torch

    rank = max(1, vectors.shape[1] // len(vectors))
    parts = [decompose(columns_of(vector), rank) for vector in vectors]
    return joined(parts, torch.cat([part.values for part in parts]))


register(
    Method(
        name="tsv_m",
        function=tsv_m,
        description="the largest singular vectors of every task, made orthogonal to each other",
        reference="Gargiulo et al., Task singular vectors, arXiv 2412.00081",
        scales=WIDE,
        laws=frozenset({"order", "homogeneous"}),
        matrices=True,
        heavy=True,
    )
)


@on_matrices
@wide
def iso_c(vectors: Float32[Tensor, "tasks rows columns"], config: Settings) -> Float32[Tensor, "rows columns"]:
    """Return mean(S) U V^T of the sum's SVD, sum_t tau_t = U S V^T (arXiv 2502.04959)."""
    svd = decompose(summed(vectors))
    mean = svd.values.sum() / len(svd.left)
    return multiply((svd.left * (mean / svd.values)) @ svd.left.mT, svd.matrix)


register(
    Method(
        name="iso_c",
        function=iso_c,
        description="the sum of the vectors with all singular values of a matrix made equal",
        reference="Marczak et al., No task left behind, arXiv 2502.04959",
        scales=WIDE,
        laws=frozenset({"order", "homogeneous"}),
        matrices=True,
        heavy=True,
    )
)


@on_matrices
def iso_cts(vectors: Float32[Tensor, "tasks rows columns"], config: IsoCts) -> Float32[Tensor, "rows columns"]:
    """Return mean(S') U' V'^T: singular vectors of the sum, and of what each task has outside them (arXiv 2502.04959).

    The sum gives about k r directions and each task (1 - k) r / T of its residual tau_t - U U^T tau_t, rounded as in
    the authors' code; U' and V' are nearest orthogonal to all of them, and mean(S') is over r values.
    """
    if vectors.shape[1] > vectors.shape[2]:
        return _iso_cts(vectors.mT, config.k, outside_right).mT
    return _iso_cts(vectors, config.k, outside_left)


register(
    Method(
        name="iso_cts",
        function=iso_cts,
        description="iso_c on shared singular vectors and on every task's own",
        reference="Marczak et al., No task left behind, arXiv 2502.04959",
        scales=WIDE,
        config=IsoCts,
        laws=frozenset({"order", "homogeneous"}),
        matrices=True,
        heavy=True,
    )
)


def _iso_cts(
    vectors: Float32[Tensor, "tasks rows columns"], k: float, outside: Callable[[Tensor, TruncatedSVD], Columns]
) -> Float32[Tensor, "rows columns"]:
    import torch

    tasks, rank, _ = vectors.shape
    rank_of_each = min(round((rank - int(rank * k)) / tasks), rank // tasks)
    shared = decompose(summed(vectors), rank - rank_of_each * tasks)
    parts = [shared, *(decompose(outside(vector, shared), rank_of_each) for vector in vectors if rank_of_each)]
    return joined(parts, torch.cat([part.values for part in parts]).sum() / rank)


def outside_left(vector: Float32[Tensor, "rows columns"], shared: TruncatedSVD) -> Columns:
    """Return what a matrix has outside the left singular vectors of another: x - U U^T x."""

    def read(place: slice) -> Tensor:
        piece = vector[:, place].double()
        return piece.sub_(shared.left @ (shared.left.mT @ piece))

    return Columns(read, len(vector), vector.shape[1], piece_on(vector), float(vector.norm()))


def outside_right(vector: Float32[Tensor, "rows columns"], shared: TruncatedSVD) -> Columns:
    """Return what a matrix has outside the right singular vectors of another: x - x V V^T."""
    within: Any = sum(piece @ shared.right(place).mT for place, piece in columns_of(vector))

    def read(place: slice) -> Tensor:
        return vector[:, place].double().sub_(within @ shared.right(place))

    return Columns(read, len(vector), vector.shape[1], piece_on(vector), float(vector.norm()))


LEAST = 1e-18
"""Length from which on float32 holds 1 / norm^2; a shorter vector does not count as moving."""


@on_matrices
def wudi(vectors: Float32[Tensor, "tasks rows columns"], config: Wudi) -> Float32[Tensor, "rows columns"]:
    """Minimise sum_t norm((tau - tau_t) tau_t^T)^2 / norm(tau_t)^2 by Adam from sum_t tau_t (arXiv 2503.08099).

    With C_t = tau_t^T tau_t / norm(tau_t)^2 the gradient is 2 (tau sum_t C_t - sum_t tau_t C_t), each row by itself, so
    that rows are moved in blocks. One task that moves is its own minimum.
    """
    merged = total(vectors).clone()
    scaled = [(vector, 2 / float(norm) ** 2) for vector in vectors if (norm := vector.norm()) > LEAST]
    if len(scaled) < 2:
        return merged
    pull = _pull(scaled)
    step = max(1, (ROWS if merged.device.type == "cpu" else LARGE_ROWS) // merged.shape[1])
    for start in range(0, len(merged), step):
        rows = slice(start, start + step)
        goal: Any = sum(((vector[rows] * factor) @ vector.mT) @ vector for vector, factor in scaled)
        _descend(merged[rows], pull, goal, config)
    return merged


register(
    Method(
        name="wudi",
        function=wudi,
        description="matrices that disturb the inputs of every task least, by gradient descent",
        reference="Cheng et al., Whoever started the interference, arXiv 2503.08099",
        scales=MIDDLE,
        config=Wudi,
        laws=frozenset({"one task", "order"}),
        matrices=True,
        heavy=True,
    )
)


def _pull(scaled: Sequence[tuple[Tensor, float]]) -> Callable[[Tensor], Tensor]:
    """Return the function x -> 2 x sum_t C_t; of very wide matrices the sum would be larger than all vectors."""
    import torch

    rows, columns = scaled[0][0].shape
    if columns > (len(scaled) + 1) * rows:
        return lambda x: torch.stack([(x @ vector.mT).mul_(factor) @ vector for vector, factor in scaled]).sum(0)
    pulls = scaled[0][0].new_zeros(columns, columns)
    for vector, factor in scaled:
        pulls.addmm_(vector.mT, vector, alpha=factor)
    return lambda x: x @ pulls


def _descend(x: Tensor, pull: Callable[[Tensor], Tensor], goal: Tensor, config: Wudi) -> None:
    """Move rows x in place by Adam along the gradient pull(x) - goal; on a GPU a step is one kernel."""
    import torch

    optimizer = torch.optim.Adam([x], lr=config.learning_rate, foreach=False, fused=x.is_cuda)
    for _ in range(config.steps):
        x.grad = pull(x).sub_(goal)
        optimizer.step()
