"""Exact order statistics of more numbers than fit in memory: two passes, 65 536 counters a row and rank. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int64, UInt32
from numpy import ndarray

from taskvec.merging.entries import array

if TYPE_CHECKING:  # the command lists methods without loading torch
    from torch import Tensor

BITS = 16
"""Numbers are sorted by so many of their upper bits first, then by as many lower ones."""
BINS = 1 << BITS
SIGN = np.uint32(1 << 31)
SMALLEST = np.float32(1e-45)


def order_statistics(
    slices: Iterable[Float32[Tensor, "rows ..."] | Float32[ndarray, "rows ..."]],
    ranks: Callable[[int], Sequence[int]],
) -> Float32[ndarray, "rows ranks"]:
    """Return the values of some ranks (0 is the smallest) of every row, whose finite numbers come in slices.

    ``slices`` is iterated over twice; ``ranks`` is told how many numbers a row has. Of no numbers all values are 0.
    """
    upper = _tally_upper(slices)
    wanted = np.tile(np.array(ranks(int(upper[0].sum())), np.int64), (len(upper), 1))
    if not upper.any():
        return np.zeros(wanted.shape, np.float32)
    buckets = [_bucket(counts, want) for counts, want in zip(upper, wanted, strict=True)]
    bucket, before = (np.stack(each) for each in zip(*buckets, strict=True))
    del upper
    lower = _tally_lower(slices, bucket)
    rest = [
        [counts.cumsum().searchsorted(place, side="right") for counts, place in zip(row, left, strict=True)]
        for row, left in zip(lower, wanted - before, strict=True)
    ]
    return _numbers((bucket << BITS) + np.array(rest, np.int64))


def _bucket(
    counts: Int64[ndarray, " bins"], ranks: Int64[ndarray, " ranks"]
) -> tuple[Int64[ndarray, " ranks"], Int64[ndarray, " ranks"]]:
    """Return the bins that ranks fall into, and how many numbers are in those before."""
    ends = counts.cumsum()
    places = ends.searchsorted(ranks, side="right")
    return places, ends[places] - counts[places]


def _tally_upper(slices: Iterable[Any]) -> Int64[ndarray, "rows bins"]:
    """Count the numbers of every row by their upper bits."""
    tallies = np.zeros((1, BINS), np.int64)
    for piece in map(array, slices):
        if len(tallies) < len(piece):
            tallies = np.zeros((len(piece), BINS), np.int64)
        for row, counts in zip(piece, tallies, strict=True):
            np.add.at(counts, _keys(row) >> BITS, 1)
    return tallies


def _tally_lower(slices: Iterable[Any], bucket: Int64[ndarray, "rows ranks"]) -> Int64[ndarray, "rows ranks bins"]:
    """Count the numbers of every row that are in the bucket of a rank by their lower bits."""
    tallies = np.zeros((*bucket.shape, BINS), np.int64)
    first, last = _numbers(bucket << BITS), _numbers((bucket << BITS) + BINS - 1)
    last[(last == 0) & np.signbit(last)] = -SMALLEST  # all zeros are in the bucket of 0
    for piece in map(array, slices):
        for row, values in enumerate(piece):
            for rank, counts in enumerate(tallies[row]):
                inside = values[(values >= first[row, rank]) & (values <= last[row, rank])]
                np.add.at(counts, _keys(inside) & (BINS - 1), 1)
    return tallies


def _keys(numbers: Float32[ndarray, " count"]) -> UInt32[ndarray, " count"]:
    """Return integers that have the order of the numbers; 0 and -0 are one."""
    bits = np.add(numbers, np.float32(0), order="C").view(np.uint32)
    keys: UInt32[ndarray, " count"] = bits ^ ((bits.view(np.int32) >> 31).view(np.uint32) | SIGN)
    return keys


def _numbers(keys: Int64[ndarray, "rows ranks"]) -> Float32[ndarray, "rows ranks"]:
    """Return the numbers of keys."""
    bits = keys.astype(np.uint32)
    numbers: Float32[ndarray, "rows ranks"] = np.where(bits & SIGN, bits ^ SIGN, ~bits).view(np.float32)
    return numbers
