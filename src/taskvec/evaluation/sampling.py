"""Means over strata from as few images as a tolerance needs: planned looks, draws without replacement, half-widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Num
from scipy.special import ndtri

FEWEST = 128
"""Images of a stratum after which its mean is first looked at."""
CONFIDENCE = 0.95
VARIANCES = (0.06, 0.25)
"""Between these about, and evenly, lie the variances within strata of a heatmap's cells (benchmarks/sampling.py)."""


def planned_looks(samples: int, tolerance: float) -> list[int]:
    """Return after how many images of every stratum its mean is looked at: 128, 256 and so on, and the whole sample.

    The last early look is at half of the sample or before. With tolerance 0 there is none.
    """
    looks, count = [], FEWEST
    while tolerance and 2 * count <= samples:
        looks.append(count)
        count *= 2
    return [*looks, samples]


def drawn(count: int, start: int, stop: int, *seed: int) -> Int64[np.ndarray, " images"]:
    """Return the places ``start`` to ``stop`` of a seeded order of ``count`` images, sorted: none comes twice."""
    return np.sort(np.random.default_rng(seed).permutation(count)[start:stop])


def half_width(
    shares: Float64[np.ndarray, " strata *cells"],
    images: Num[np.ndarray, " strata *cells"],
    sizes: Num[np.ndarray, " strata *cells"],
    looks: int,
) -> Float64[np.ndarray, "*cells"]:
    """Return the 95 % half-width of the mean of shares over strata, valid at all of so many early looks together.

    ``shares`` are those of ``images`` that were drawn of each stratum without replacement, of the ``sizes`` that there
    are. A stratum that was seen whole adds nothing, so the mean of whole samples is exact: 0.

    The variance is that of stratified sampling with the correction of a finite population (Cochran, Sampling
    Techniques, 1977, equation 5.7). The mean of many images is about normal, without replacement too (Hajek 1960). A
    true sum of shares that lies t away may have a larger variance than the one seen, by t / images at most: the
    half-width t solves t = z sqrt(variance + t / images), as in the score interval (Wilson 1927). Every look may err in
    5 % / ``looks`` of the cases, so that all hold together, whichever is the last: these are repeated confidence
    intervals (Jennison and Turnbull 1989) by Bonferroni's inequality. ``tests/test_sampling.py`` simulates them.
    """
    left, square = 1 - images / sizes, quantile(looks) ** 2
    variance = (left * shares * (1 - shares) / images).sum(0)
    step = square * (np.ceil(left) / images).max(0) / 2
    return np.asarray((step + np.sqrt(square * variance + step**2)) / len(shares))


@dataclass(frozen=True)
class Shares:
    """The shares of strata, the 95 % half-width of their mean, and how many images were seen of a stratum at most."""

    shares: Float64[np.ndarray, " strata"]
    half_width: float
    images: int


def sample(
    count: Callable[[int, int], Float64[np.ndarray, " strata"]],
    sizes: Int64[np.ndarray, " strata"],
    tolerance: float,
) -> Shares:
    """Look at more images of every stratum until the half-width of the mean share is at most the tolerance.

    ``count`` returns the sum over the images in the places start to stop of each stratum's order (``drawn``), each
    from 0 to 1. Strata have ``sizes`` images; with tolerance 0 all are looked at, at once.
    """
    looks = planned_looks(int(sizes.max()), tolerance)
    sums, start = np.zeros(len(sizes)), 0
    for stop in looks:
        sums += count(start, stop)
        seen = np.minimum(sizes, stop)
        width = float(half_width(sums / seen, seen, sizes, len(looks) - 1))
        if width <= tolerance:
            break
        start = stop
    return Shares(sums / seen, width, stop)


def quantile(looks: int) -> float:
    """Return how many standard deviations either side hold a normal value in all but 5 % / ``looks`` of the cases."""
    return float(ndtri(1 - (1 - CONFIDENCE) / 2 / max(looks, 1)))


def expected_open(images: int, size: int, strata: int, looks: int, tolerance: float) -> float:
    """Return about which share of means is still wider than ``tolerance`` after so many images of each stratum.

    ``half_width`` is solved for the largest variance at which a mean is narrow enough.
    """
    if images in (0, size):
        return float(images == 0)
    total = strata * tolerance
    variance = (total**2 / quantile(looks) ** 2 - total / images) * images / strata / (1 - images / size)
    least, most = VARIANCES
    return min(max((most - variance) / (most - least), 0.0), 1.0)


def expected_images(samples: int, strata: int, tolerance: float) -> float:
    """Return about how many images of each stratum are looked at until a mean is no wider than ``tolerance``."""
    looks = planned_looks(samples, tolerance)
    starts = [0, *looks[:-1]]
    how = (samples, strata, len(looks) - 1, tolerance)
    return sum((stop - start) * expected_open(start, *how) for start, stop in zip(starts, looks, strict=True))
