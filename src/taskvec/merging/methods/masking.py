"""Methods that find which entries matter to which task: masks of tasks, and weights by importance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, FiniteFloat

from taskvec.core.settings import Count, Settings
from taskvec.merging.entries import Entries, Entry, Masked
from taskvec.merging.methods.averaging import by_task, precise_total, rows, total
from taskvec.merging.methods.ranks import order_statistics
from taskvec.merging.methods.sparsity import Rows, Share
from taskvec.merging.recipes import FIXED, MIDDLE, Method, register

if TYPE_CHECKING:  # the command lists methods without loading torch
    from jaxtyping import Bool, Float32
    from numpy import ndarray
    from torch import Tensor

OUTLIERS = 1e-4
"""The share of smallest and of largest magnitudes that pcb clips, as in its authors' code."""


class Tall(Settings):
    """How much larger a task's entry must be than the sum of the others'."""

    k: Annotated[FiniteFloat, Field(ge=0)] = 0.4


class Consensus(Tall):
    """How many tasks must use an entry."""

    at_least: Count = 2


class Pcb(Settings):
    """The share of each vector that is kept."""

    keep: Share = 0.1


def tall_mask(vectors: Float32[Tensor, " tasks *shape"], k: float) -> Bool[Tensor, " tasks *shape"]:
    """Return abs(tau_t) > k * abs(sum_s tau_s - tau_t) (arXiv 2405.07813)."""
    return abs(vectors) > k * abs(total(vectors) - vectors)


def consensus(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Consensus) -> Float32[Tensor, " *shape"]:
    """Return sum_t tau_t where at least ``at_least`` of the tasks' masks hold, else 0 (arXiv 2405.07813).

    The authors choose k for each task on validation; here it is one hyperparameter. With fewer tasks all must agree.
    """
    used = tall_mask(vectors, config.k).sum(0) >= min(config.at_least, len(vectors))
    return total(vectors) * used


register(
    Method(
        name="consensus",
        function=consensus,
        description="the sum of the vectors where at least two tasks use an entry",
        reference="Wang et al., Localizing task information, arXiv 2405.07813",
        config=Consensus,
        laws=frozenset({"one task", "order", "homogeneous"}),
        elementwise=True,
        arrays=True,
    )
)


def tall_masks(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Tall) -> Masked:
    """Return sum_s tau_s under each task's mask, abs(tau_t) > k abs(sum_s tau_s - tau_t) (arXiv 2405.07813)."""
    shared = total(vectors)
    return Masked(shared, tall_mask(vectors, config.k), vectors.new_ones(len(vectors)))


register(
    Method(
        name="tall_masks",
        function=tall_masks,
        description="the sum of the vectors under a mask of each task",
        reference="Wang et al., Localizing task information, arXiv 2405.07813",
        scales=FIXED,
        role="per-task",
        config=Tall,
        laws=frozenset({"one task", "order", "homogeneous"}),
        elementwise=True,
    )
)


def unify(vectors: Float32[Tensor, " tasks *shape"]) -> tuple[Tensor, Tensor]:
    """Return emr's unified vector, the largest magnitude of the elected sign, and the masks of the tasks that agree."""
    positive = precise_total(vectors) > 0
    masks = ((vectors > 0) & positive) | ((vectors < 0) & ~positive)
    largest = (vectors.abs() * masks).amax(0)
    return largest.where(positive, -largest), masks


def emr_rescales(entries: Entries, config: Settings) -> Float32[Tensor, " tasks"]:
    """Return sum abs(tau_t) / sum abs(mask_t * unified) over the whole vectors; 1 where nothing is unified."""
    import torch

    before: Tensor = torch.zeros(())
    after: Tensor = torch.zeros(())
    for _, vectors in entries:
        unified, masks = unify(vectors)
        before = before + rows(vectors).abs().double().sum(1)
        after = after + rows(unified.abs() * masks).double().sum(1)
    rescales: Tensor = (before / after).where(after > 0, 1)
    return rescales.float()


def emr(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Settings) -> Masked:
    """Return lambda_t M_t unified: elected, masked where signs agree, rescaled to the norm of tau_t (arXiv 2405.17461).

    lambda_t = sum abs(tau_t) / sum abs(M_t unified) as in the paper; their code adds up the means of each tensor.
    """
    unified, masks = unify(vectors)
    return Masked(unified, masks, entry.global_statistics.to(vectors.device))


register(
    Method(
        name="emr",
        function=emr,
        description="one elected vector under a mask of each task, rescaled for each",
        reference="Huang et al., EMR-Merging, arXiv 2405.17461",
        scales=FIXED,
        role="per-task",
        survey=emr_rescales,
        laws=frozenset({"one task", "order", "homogeneous"}),
        elementwise=True,
    )
)


@dataclass(frozen=True)
class Importance:
    """What pcb knows of whole vectors: the magnitudes that it clips at, and the scores between which it keeps."""

    clip: Float32[ndarray, "tasks 2"]
    keep: Float32[ndarray, "tasks 2"]


def importance(entries: Entries, config: Pcb) -> Importance:
    """Find pcb's four order statistics of every task, by the ranks of the authors' code."""
    clip = order_statistics(
        Rows(entries, abs),
        lambda count: [int(count * OUTLIERS), max(0, int(count * (1 - OUTLIERS) - 1))],
    )
    keep = order_statistics(
        Rows(entries, lambda vectors: scores(vectors, clip)),
        lambda count: [min(int(count * (1 - config.keep)), count - 1), count - 1],
    )
    return Importance(clip, keep)


def unit(
    values: Float32[Tensor, " tasks *shape"], ends: Float32[ndarray, "tasks 2"]
) -> Float32[Tensor, " tasks *shape"]:
    """Return every task's values between 0 at its lower end and 1 at its upper one; 0 where both are one."""
    low, high = (by_task(end, values) for end in ends.T)
    share: Tensor = ((values.clamp(low, high) - low) / (high - low)).where(high > low, 0)
    return share


def scores(
    vectors: Float32[Tensor, " tasks *shape"], clip: Float32[ndarray, "tasks 2"]
) -> Float32[Tensor, " tasks *shape"]:
    """Return exp(T unit(abs(tau_t))^2) * tanh(tau_t sum_s tau_s), how important an entry is to a task and to all.

    It is divided by e^T, which quantiles and ``unit`` do not see: e^T is infinite in float32 from 89 tasks on.
    """
    return (len(vectors) * (unit(vectors.abs(), clip) ** 2 - 1)).exp() * (vectors * total(vectors)).tanh()


def pcb(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Pcb) -> Float32[Tensor, " *shape"]:
    """Return sum_t s_t tau_t / sum_t s_t, s_t the score above its (1 - keep) quantile, from 0 to 1 (arXiv 2410.02396).

    Follows the authors' code: magnitudes are clipped at their 0.0001 quantiles from below and above, and the tanh of
    tau_t times the sum of all stands for the softmax over pairs in the paper's equation 3.
    """
    low, high = (by_task(end, vectors) for end in entry.global_statistics.clip.T)
    weights = unit(scores(vectors, entry.global_statistics.clip), entry.global_statistics.keep)
    clipped = vectors.sign() * vectors.abs().clamp(low, high)
    return total(clipped * weights) / total(weights).clamp(min=1e-12)


register(
    Method(
        name="pcb",
        function=pcb,
        description="the mean weighted by how important an entry is to its task and to the others",
        reference="Du et al., Parameter Competition Balancing, arXiv 2410.02396",
        scales=MIDDLE,
        config=Pcb,
        survey=importance,
        laws=frozenset({"order"}),
        elementwise=True,
    )
)
