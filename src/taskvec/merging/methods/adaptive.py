"""Methods that look at data: Fisher information, inputs of linear layers, coefficients by entropy. Never at test data.

What they need is measured once for all entries, by ``measuring.py``; the methods are functions of one entry. Of what
is as large as the weights sums over tasks are kept, and no task's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, FiniteFloat

from taskvec.core.settings import Count, Rate, Settings
from taskvec.merging.entries import Entry
from taskvec.merging.methods.averaging import average, by_task, total
from taskvec.merging.recipes import FIXED, Method, register

if TYPE_CHECKING:  # the command lists methods without loading torch
    from jaxtyping import Float32, Float64
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
    ``normalised``, as in MergeLM's code. Both sums are measured. Entries that have none, such as running means, are
    averaged.
    """
    if entry.statistics is None:
        return average(vectors, entry, config)
    moved, weights = entry.statistics.unbind()
    return moved / weights


def fisher_summand(
    information: Mapping[str, Float32[Tensor, " *shape"]], vector: Mapping[str, Tensor], config: Fisher
) -> Iterator[tuple[str, Float32[Tensor, " 2 *shape"]]]:
    """Yield w (F + floor) tau and w (F + floor) of a task for every entry, from its diagonal Fisher information F."""
    import torch

    squares: Any = sum(values.double().square().sum() for values in information.values())
    weight = 1 / (squares.sqrt().float() + config.floor) if config.normalised else 1
    for name, values in information.items():
        share = (values + config.floor) * weight
        yield name, torch.stack([share * vector[name], share])


register(
    Method(
        name="fisher",
        function=fisher,
        description="the mean weighted by the Fisher information of each task",
        reference="Matena and Raffel, Merging models with Fisher-weighted averaging, arXiv 2111.09832",
        scales=FIXED,
        config=Fisher,
        needs=frozenset({"inputs", "heads", "seed"}),
        measure="taskvec.merging.methods.measuring:fisher",
        summand=fisher_summand,
        laws=frozenset({"one task", "order", "homogeneous"}),
    )
)


def regmean(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Regmean) -> Float32[Tensor, " *shape"]:
    """Return (sum_t tau_t G_t) (sum_t G_t)^-1 of linear maps, G_t = X_t^T X_t of their inputs (arXiv 2212.09849).

    In torch's layout, weights are [outputs, inputs]; what is off the diagonal of G_t is scaled by ``off_diagonal``, and
    a ridge is added to each. The sums are measured. Entries without inputs of their own are averaged. Solved in
    float64.
    """
    import torch

    if entry.statistics is None:
        return average(vectors, entry, config)
    moved, gram = entry.statistics.tensor_split([len(entry.base)])
    ridge = RIDGE * gram.trace() / len(gram)  # of all tasks together
    ridge = ridge.where(ridge > 0, len(vectors))
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    moved = moved + ridge / len(vectors) * total(vectors).flatten(1).double()
    merged: Tensor = torch.linalg.solve(gram, moved, left=False)
    return merged.float().view(entry.base.shape)


def regmean_summand(
    grams: Mapping[str, Float32[Tensor, "inputs inputs"]], vector: Mapping[str, Tensor], config: Regmean
) -> Iterator[tuple[str, Float64[Tensor, "rows inputs"]]]:
    """Yield tau G of a task, and G under it, for every linear map, G with what is off its diagonal scaled."""
    import torch

    for name, values in grams.items():
        gram = values.double()
        gram = config.off_diagonal * gram + (1 - config.off_diagonal) * gram.diagonal().diag()
        yield name, torch.cat([vector[name].flatten(1).double() @ gram, gram])


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
        summand=regmean_summand,
        laws=frozenset({"one task", "order", "homogeneous"}),
        heavy=True,
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
