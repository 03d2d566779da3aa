"""Methods that drop, elect or mask entries of task vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, FiniteFloat, model_validator

from taskvec.core.settings import Count, Settings
from taskvec.merging.entries import Entries, Entry, Masked
from taskvec.merging.methods.averaging import by_task, precise_total, rows, total
from taskvec.merging.methods.ranks import order_statistics
from taskvec.merging.recipes import FIXED, MIDDLE, Method, register

if TYPE_CHECKING:  # the command lists methods without loading torch
    from collections.abc import Callable

    from jaxtyping import Bool, Float32
    from numpy import ndarray
    from torch import Tensor

Share = Annotated[FiniteFloat, Field(gt=0, le=1)]
Fuse = Literal["mean", "sum"]
BLOCK = 1 << 18
"""Elements of all tasks in a block of rows, which della draws and ranks at once."""
OUTLIERS = 1e-4
"""The share of smallest and of largest magnitudes that pcb clips, as in its authors' code."""


class Ties(Settings):
    """The share of each vector that is ``kept``, and how entries of the elected sign are joined."""

    keep: Share = 0.2
    fuse: Fuse = "mean"


class Dare(Settings):
    """The probability with which an entry is dropped."""

    drop: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.9


class Della(Settings):
    """The mean probability of a drop, how far it goes up and down with the rank, and how entries are joined."""

    drop: Annotated[FiniteFloat, Field(gt=0, lt=1)] = 0.7
    epsilon: Annotated[FiniteFloat, Field(ge=0, lt=0.5)] = 0.15
    fuse: Fuse = "sum"

    @model_validator(mode="after")
    def _probable(self) -> Della:
        if not self.epsilon < min(self.drop, 1 - self.drop):
            raise ValueError("epsilon must be below drop and below 1 - drop, so that drop +- epsilon are probabilities")
        return self


class Breadcrumbs(Settings):
    """The share of a tensor's largest entries that is dropped (``gamma``), and the share below it that is kept."""

    beta: Share = 0.2
    gamma: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _shares(self) -> Breadcrumbs:
        if self.beta + self.gamma > 1:
            raise ValueError("beta and gamma are shares of one whole; lower one of them")
        return self


class Tall(Settings):
    """How much larger a task's entry must be than the sum of the others'."""

    k: Annotated[FiniteFloat, Field(ge=0)] = 0.4


class Consensus(Tall):
    """How many tasks must use an entry."""

    at_least: Count = 2


class Pcb(Settings):
    """The share of each vector that is kept."""

    keep: Share = 0.1


@dataclass(frozen=True)
class Rows:
    """Every entry as one row a task, after a function; it can be iterated over again."""

    entries: Entries
    function: Callable[[Float32[Tensor, " tasks *shape"]], Float32[Tensor, " tasks *shape"]]

    def __iter__(self) -> Iterator[Float32[Tensor, "tasks count"]]:
        """Yield the rows of each entry."""
        for _, vectors in self.entries:
            yield rows(self.function(vectors))


def trim_thresholds(entries: Entries, config: Ties) -> Float32[ndarray, " tasks"]:
    """Return the magnitude from which on each task's entries are kept, over its whole vector."""

    def ranks(count: int) -> list[int]:
        return [max(0, count - int(count * config.keep) - 1)]

    return order_statistics(Rows(entries, abs), ranks)[:, 0]


def elect(vectors: Float32[Tensor, " tasks *shape"], fuse: Fuse) -> Float32[Tensor, " *shape"]:
    """Return the mean, or the sum, of what has the sign of the tasks' sum; 0 where the sum is 0."""
    elected = precise_total(vectors)
    agreeing = ((vectors > 0) & (elected > 0)) | ((vectors < 0) & (elected < 0))
    merged = total(vectors * agreeing)
    return merged if fuse == "sum" else merged / agreeing.sum(0, dtype=vectors.dtype).clip(1)


def ties(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Ties) -> Float32[Tensor, " *shape"]:
    """Return the mean of the trimmed tau_t that have the elected sign, sgn(sum_t trim(tau_t)) (arXiv 2306.01708).

    trim keeps what is at least as large as the threshold of the authors' code, the (n - int(0.2 n))-th smallest of n
    magnitudes. Where kept values cancel exactly the code takes the whole vector's majority sign; here none is elected.
    """
    kept = vectors * (abs(vectors) >= by_task(entry.global_statistics, vectors))
    return elect(kept, config.fuse)


register(
    Method(
        name="ties",
        function=ties,
        description="the largest entries, a sign elected for each, the mean of those that have it",
        reference="Yadav et al., TIES-Merging, arXiv 2306.01708",
        scales=MIDDLE,
        config=Ties,
        survey=trim_thresholds,
        laws=frozenset({"order", "homogeneous"}),
        elementwise=True,
        arrays=True,
    )
)


def dare(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Dare) -> Float32[Tensor, " tasks *shape"]:
    """Return (1 - m) tau_t / (1 - p), m drawn from Bernoulli(p) for every entry (arXiv 2311.03099)."""
    kept = vectors.clone()
    for task in range(len(vectors)):
        kept[task] *= entry.uniform(task) >= config.drop
    return kept / (1 - config.drop)


register(
    Method(
        name="dare",
        function=dare,
        description="random entries dropped and the others scaled up; before any other method",
        reference="Yu et al., Language models are super Mario, arXiv 2311.03099",
        role="transform",
        config=Dare,
        needs=frozenset({"seed"}),
        laws=frozenset({"homogeneous"}),
        elementwise=True,
    )
)


def della(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Della) -> Float32[Tensor, " *shape"]:
    """Return sum_t of the elected sign of (1 - m) tau_t / (1 - p), p falling with magnitude (arXiv 2406.11617).

    Within a row (the first dimension's; a vector is one row) p falls linearly with the rank of the magnitude, from drop
    + epsilon to drop - epsilon. The paper takes the mean of the elected, mergekit's della the sum; see ``fuse``.
    """
    base = entry.base.flatten(1) if entry.base.ndim > 1 else entry.base.reshape(1, -1)
    stacks, columns = vectors.reshape(len(vectors), *base.shape), base.shape[1]
    merged, step = base.new_empty(base.shape), max(1, BLOCK // max(1, len(vectors) * columns))
    for start in range(0, len(base), step):
        block = slice(start, start + step)
        rows_entry = replace(entry, base=base[block], start=entry.start + start * columns)
        merged[block] = elect(thinned(stacks[:, block], rows_entry, config), config.fuse)
    return merged.view(entry.base.shape)


register(
    Method(
        name="della",
        function=della,
        description="entries dropped by chance and magnitude, a sign elected for each, the sum of those that have it",
        reference="Deep et al., DELLA-Merging, arXiv 2406.11617",
        scales=MIDDLE,
        config=Della,
        needs=frozenset({"seed"}),
        laws=frozenset({"homogeneous"}),
    )
)


def thinned(
    vectors: Float32[Tensor, "tasks rows columns"], entry: Entry, config: Della
) -> Float32[Tensor, "tasks rows columns"]:
    """Return some rows of every task with entries dropped by chance, and the others scaled up."""
    kept = vectors.clone()
    for task, vector in enumerate(vectors):
        chance = 1 - drop_chances(vector, config)
        kept[task] *= (entry.uniform(task) < chance) / chance
    return kept


def drop_chances(matrix: Float32[Tensor, "rows columns"], config: Della) -> Float32[Tensor, "rows columns"]:
    """Return the probability of a drop of every entry, by the rank of its magnitude in its row; ties by position."""
    ranks = matrix.abs().argsort(dim=1, stable=True).argsort(dim=1)
    spread = 1 - 2 * ranks / (matrix.shape[1] - 1) if matrix.shape[1] > 1 else ranks * 0.0
    return config.drop + config.epsilon * spread


def breadcrumbs(
    vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Breadcrumbs
) -> Float32[Tensor, " tasks *shape"]:
    """Return tau_t without its gamma n largest magnitudes and with the beta n next ones alone (arXiv 2312.06795).

    n is the size of the tensor, as in the paper; the authors' code does the same in every row of it. At least one entry
    stays.
    """
    import torch

    count = vectors[0].numel()
    dropped, kept = int(config.gamma * count), max(1, int(config.beta * count))
    middle = torch.zeros_like(vectors)
    for vector, out in zip(vectors, middle, strict=True):
        chosen = largest(vector, min(count, dropped + kept)) ^ largest(vector, dropped)
        torch.where(chosen, vector, out, out=out)
    return middle


register(
    Method(
        name="breadcrumbs",
        function=breadcrumbs,
        description="the entries of each tensor without outliers and without small ones; before any other method",
        reference="Davari and Belilovsky, Model Breadcrumbs, arXiv 2312.06795",
        role="transform",
        config=Breadcrumbs,
        laws=frozenset({"order", "homogeneous"}),
    )
)


def largest(vector: Float32[Tensor, " *shape"], count: int) -> Bool[Tensor, " *shape"]:
    """Return a mask of the ``count`` largest magnitudes; of equal ones the first."""
    import torch

    if not count:
        return torch.zeros_like(vector, dtype=torch.bool)
    numbers = vector.abs().cpu().numpy().reshape(-1)
    numbers.partition(len(numbers) - count)
    least = float(numbers[len(numbers) - count])
    del numbers  # one copy at a time
    sizes = vector.abs()
    chosen, equal = sizes > least, (sizes == least).view(-1).nonzero()[:, 0]
    chosen.view(-1)[equal[: count - int(chosen.sum())]] = True
    return chosen


def magmax(vectors: Float32[Tensor, " tasks *shape"], entry: Entry, config: Settings) -> Float32[Tensor, " *shape"]:
    """Return tau_t of the task t whose magnitude is largest, entry by entry (arXiv 2407.06322).

    Of equal magnitudes the positive one wins, so that the order of tasks does not matter (the code takes the later).
    """
    best = vectors[0]
    for vector in vectors[1:]:
        larger = (abs(vector) > abs(best)) | ((abs(vector) == abs(best)) & (vector > best))
        best = vector * larger + best * ~larger
    return best


register(
    Method(
        name="magmax",
        function=magmax,
        description="of every entry the one with the largest magnitude",
        reference="Marczak et al., MagMax, arXiv 2407.06322",
        laws=frozenset({"one task", "order", "homogeneous"}),
        elementwise=True,
        arrays=True,
    )
)


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
