"""Exact order statistics of more numbers than fit in memory: two passes, 65 536 counters a row and rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command lists methods without loading torch
    from jaxtyping import Float32, Int64
    from torch import Tensor

BITS = 16
"""Numbers are sorted by so many of their upper bits first, then by as many lower ones."""


def order_statistics(
    slices: Iterable[Float32[Tensor, "rows count"]], ranks: Callable[[int], Sequence[int]]
) -> Float32[Tensor, "rows ranks"]:
    """Return the values of some ranks (0 is the smallest) of every row, whose finite numbers come in slices.

    ``slices`` is iterated over twice; ``ranks`` is told how many numbers a row has. Of no numbers all values are 0.
    """
    import torch

    bins = 1 << BITS

    def tally(keys: Int64[Tensor, " count"]) -> Int64[Tensor, " bins"]:
        return torch.bincount(keys, minlength=bins).cpu()

    upper = sum(
        (torch.stack([tally(_keys(row) >> BITS) for row in part]) for part in slices), torch.zeros(1, bins).long()
    )
    wanted = torch.tensor(list(ranks(int(upper[0].sum())))).repeat(len(upper), 1)
    if not upper[0].any():
        return torch.zeros(wanted.shape)
    ends = upper.cumsum(1)
    bucket = torch.searchsorted(ends, wanted, right=True)
    lower = torch.zeros(*wanted.shape, bins, dtype=torch.int64)
    for part in slices:
        for row, keys in enumerate(map(_keys, part)):
            for place, chosen in enumerate(bucket[row].tolist()):
                lower[row, place] += tally(keys[keys >> BITS == chosen] & (bins - 1))
    left = wanted - (ends - upper).gather(1, bucket)
    rest = torch.searchsorted(lower.cumsum(2), left[..., None], right=True)[..., 0]
    return _numbers((bucket << BITS) + rest)


def _keys(numbers: Float32[Tensor, " count"]) -> Int64[Tensor, " count"]:
    """Return integers in [0, 2^32) that have the order of the numbers; 0 and -0 are one."""
    import torch

    bits = numbers.contiguous().view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF)) + (1 << 31)


def _numbers(keys: Int64[Tensor, "rows ranks"]) -> Float32[Tensor, "rows ranks"]:
    """Return the numbers of keys."""
    import torch

    places = keys - (1 << 31)
    size = places.abs().to(torch.int32).view(torch.float32)
    return torch.where(places >= 0, size, -size)
