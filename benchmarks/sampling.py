"""How many images sequential sampling looks at, and how often a mean is within its half-width where it stops.

python benchmarks/sampling.py DISENTANGLEMENT_CSV   # images, by number of pairs, on the errors of a run
python benchmarks/sampling.py                       # coverage, simulated: 2,016 settings in about 15 minutes
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product

import numpy as np
import pandas as pd

from taskvec.evaluation.sampling import expected_images, half_width, planned_looks

TOLERANCE = 0.0075
"""1.5 points of xi, as a mean of shares."""
REPEATS = 4000


def images_used(shares: np.ndarray, size: int) -> float:
    """Return the share of the images that points with these changes [strata, points] look at, but for the origin."""
    looks = planned_looks(size, TOLERANCE)
    used = np.full(shares.shape[1], size)
    for looked in reversed(looks[:-1]):
        seen, sizes = np.full(shares.shape, looked), np.full(shares.shape, size)
        used = np.where(half_width(shares, seen, sizes, len(looks) - 1) <= TOLERANCE, looked, used)
    return float(used[shares.any(0)].mean()) / size


def of_run(path: str) -> Iterator[str]:
    """Yield for samples of some sizes and some numbers of pairs which share of the images is looked at."""
    heatmaps = pd.read_csv(path).groupby(["backbone", "regime"])
    grids = []
    for _, rows in heatmaps:
        parts = [
            rows.pivot_table(index=["scale_1", "scale_2"], columns=["task_1", "task_2"], values=column).to_numpy().T
            for column in ("error_1", "error_2")
        ]
        grids.append(np.stack(parts, axis=1))
    for size, pairs in product((256, 2048, 8192), (1, 3, 10, 28)):
        chosen = [np.resize(grid, (pairs, *grid.shape[1:])).reshape(2 * pairs, -1) for grid in grids]
        used = np.mean([images_used(shares, size) for shares in chosen])
        expected = expected_images(size, 2 * pairs, TOLERANCE) / size
        yield f"samples of {size:>5,}, {pairs:>2} pairs: {used:>4.0%} of the images; taskvec plan says {expected:.0%}"


def coverage(size: int, shares: np.ndarray, tolerance: float, generator: np.random.Generator) -> float:
    """Return in which part of repeats the mean is within its half-width where it stops."""
    changed = np.repeat(np.round(shares * size).astype(int)[:, None], REPEATS, 1)
    looks, counts, start = planned_looks(size, 1), np.zeros_like(changed), 0
    still, right = np.ones(REPEATS, bool), np.zeros(REPEATS, bool)
    for stop in looks:
        left = changed - counts
        counts += generator.hypergeometric(left, size - start - left, stop - start)
        sizes, start = np.full(counts.shape, size), stop
        width = half_width(counts / stop, np.full(counts.shape, stop), sizes, len(looks) - 1)
        ends = still & (width <= tolerance)
        right[ends] = (np.abs(counts.mean(0) / stop - changed.mean(0) / size) <= width + 1e-12)[ends]
        still &= ~ends
    return float(right.mean())


def simulated() -> Iterator[str]:
    """Yield the lowest coverages of all settings."""
    generator, found = np.random.default_rng(0), []
    rare = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.012, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5)
    for size, strata, share in product((256, 512, 2048, 8192), (1, 2, 4, 6, 16, 56), rare):
        uneven = np.linspace(0, 2 * share, strata) if strata > 1 else np.array([share])
        for shares, tolerance in product((np.full(strata, share), uneven), (0.0075, 0.015, 0.03)):
            found.append((coverage(size, shares, tolerance, generator), size, strata, share, tolerance))
    yield f"{len(found):,} settings, {REPEATS:,} repeats each; the lowest coverages:"
    for covered, size, strata, share, tolerance in sorted(found)[:5]:
        yield f"{covered:.4f}  {strata} shares of {share:.1%}, samples of {size:,}, tolerance {tolerance}"


if __name__ == "__main__":
    for line in of_run(sys.argv[1]) if sys.argv[1:] else simulated():
        print(line)
