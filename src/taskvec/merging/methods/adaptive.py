"""Methods that look at data: Fisher information, inputs of linear layers, coefficients by entropy. Never at test data.

What they need is measured once for all entries, by ``measuring.py``; the methods are functions of one entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, FiniteFloat

from taskvec.core.settings import Count, Rate, Settings
from taskvec.merging.entries import Entries, Entry
from taskvec.merging.methods.averaging import average, by_task, rows, total
from taskvec.merging.recipes import FIXED, Method, register

if TYPE_CHECKING:  # the command lists methods without loading torch
    from jaxtyping import Float32
    from torch import Tensor

RIDGE = 1e-6
"""What regmean adds to a Gram matrix, as a share of its mean diagonal: inputs that are always 0 give the mean."""


class Fisher(Settings):
    """How many images of each task to look at, whether vectors of information have one length, and what is added."""

    examples: Count = 256
    normalised: bool = True
    floor: Annotated[FiniteFloat, Field(gt=0)] = 1e-6


class Regmean(Settings):
    """How many images of each task to look at, and by what to scale what is off the diagonal."""

    examples: Count = 256
    off_diagonal: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.9


class Adamerging(Settings):
    """One coefficient a tensor and task, or one a task; where it starts; steps, batches and learning rate of Adam."""

    level: Literal["layer", "task"] = "layer"
    start: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.3
    steps: Count = 500
    batch_size: Count = 16
    learning_rate: Rate = 1e-3


def fisher(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Fisher) -> Float32[Tensor, " *shape"]:
    """Return sum_t w_t (F_t + floor) tau_t / sum_t w_t (F_t + floor), a weighted mean (arXiv 2111.09832).

    F_t is the diagonal of the Fisher information at theta_t. w_t is 1 over the length of the whole of it, if
    ``normalised``, as in MergeLM's code. Entries that have none, such as running means, are averaged.
    """
    if entry.statistics is None:
        return average(vectors, entry, config)
    weights = (entry.statistics + config.floor) * by_task(entry.global_statistics, vectors)
    return total(weights * vectors) / total(weights)


def fisher_weights(entries: Entries, config: Fisher) -> Float32[Tensor, " tasks"]:
    """Return 1 / length of every task's diagonal Fisher information over all entries, or ones."""
    import torch

    squares: Any = 0
    for entry, vectors in entries:
        information = torch.zeros(1, len(vectors)) if entry.statistics is None else rows(entry.statistics).T
        squares = squares + information.double().square().sum(0).cpu()
    lengths = squares.sqrt().float() + config.floor
    return 1 / lengths if config.normalised else torch.ones_like(lengths)


register(
    Method(
        name="fisher",
        function=fisher,
        description="the mean weighted by the Fisher information of each task",
        reference="Matena and Raffel, Merging models with Fisher-weighted averaging, arXiv 2111.09832",
        scales=FIXED,
        config=Fisher,
        survey=fisher_weights,
        needs=frozenset({"inputs", "heads", "seed"}),
        measure="taskvec.merging.methods.measuring:fisher",
        laws=frozenset({"one task", "order", "homogeneous"}),
    )
)


def regmean(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Regmean) -> Float32[Tensor, " *shape"]:
    """Return (sum_t tau_t G_t) (sum_t G_t)^-1 of linear maps, G_t = X_t^T X_t of their inputs (arXiv 2212.09849).

    In torch's layout, weights are [outputs, inputs]; what is off the diagonal of G_t is scaled by ``off_diagonal``.
    Entries without inputs of their own are averaged. Solved in float64.
    """
    import torch

    if entry.statistics is None:
        return average(vectors, entry, config)
    grams = entry.statistics.double()
    diagonals = torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    grams = config.off_diagonal * grams + (1 - config.off_diagonal) * diagonals
    ridge = RIDGE * diagonals.sum() / len(grams) / grams.shape[1]
    grams = grams + ridge.where(ridge > 0, 1) * torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    moved = (vectors.flatten(2).double() @ grams).sum(0)
    merged: Tensor = torch.linalg.solve(grams.sum(0), moved, left=False)
    return merged.float().view(entry.base.shape)


register(
    Method(
        name="regmean",
        function=regmean,
        description="linear layers whose outputs are nearest to those of every task, by least squares",
        reference="Jin et al., Dataless knowledge fusion, arXiv 2212.09849",
        scales=FIXED,
        config=Regmean,
        needs=frozenset({"inputs", "seed"}),
        measure="taskvec.merging.methods.measuring:grams",
        laws=frozenset({"one task", "order", "homogeneous"}),
    )
)


def adamerging(
    vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Adamerging
) -> Float32[Tensor, " *shape"]:
    """Return sum_t lambda_t tau_t, lambda by ``measuring.coefficients`` (arXiv 2310.02575)."""
    assert entry.statistics is not None  # of every entry, by measuring.coefficients
    return total(by_task(entry.statistics, vectors) * vectors)


register(
    Method(
        name="adamerging",
        function=adamerging,
        description="coefficients of each tensor and task with the least entropy of the predictions",
        reference="Yang et al., AdaMerging, arXiv 2310.02575",
        scales=FIXED,
        config=Adamerging,
        needs=frozenset({"inputs", "heads", "seed"}),
        measure="taskvec.merging.methods.measuring:coefficients",
        laws=frozenset({"homogeneous"}),
    )
)
