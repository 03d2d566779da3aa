"""Methods that drop entries of task vectors, by magnitude or at random, and elect signs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, FiniteFloat, model_validator

from taskvec.core.settings import Settings
from taskvec.merging.entries import Entries, Entry
from taskvec.merging.methods.averaging import by_task, precise_total, rows, total
from taskvec.merging.methods.ranks import order_statistics
from taskvec.merging.recipes import MIDDLE, Method, register

if TYPE_CHECKING:  # the command lists methods without loading torch
    from collections.abc import Callable

    from jaxtyping import Bool, Float32
    from numpy import ndarray
    from torch import Tensor

Share = Annotated[FiniteFloat, Field(gt=0, le=1)]
Fuse = Literal["mean", "sum"]
BLOCK = 1 << 18
"""Elements of all tasks in a block of rows, which della draws and ranks at once."""


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
