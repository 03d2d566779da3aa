"""Disentanglement on a GPU: counts of changed predictions are the CPU's, but for few near ties."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from taskvec.encoders.backbone import Backbone, load_backbone
from taskvec.evaluation.disentanglement import BOX_AXIS, changes, compared, set_error, single_predictions
from taskvec.learning.heads import random_head
from taskvec.weights.flat import Weights

pytestmark = pytest.mark.cuda
FEW = 0.02
"""Share of predictions that may differ: float32 sums in another order turn near ties."""
IMAGES, CLASSES = 96, 10
AXIS = BOX_AXIS[::2]
Measured = dict[str, tuple[np.ndarray, list[np.ndarray], float]]


def directions(backbone: Backbone) -> list[Weights]:
    """Return two seeded vectors that change about half of the predictions at their ends."""
    generator, pre = torch.Generator().manual_seed(3), backbone.pretrained
    noise = [torch.randn(pre.flat.shape, generator=generator) for _ in range(2)]
    return [pre.with_flat((0.02 * values).to(backbone.device)) for values in noise]


@pytest.fixture(scope="module")
def measured() -> Measured:
    """Return of each device the changes on a grid, the predictions along both vectors, and the error of the set."""
    found = {}
    for device in ("cpu", "cuda"):
        backbone = load_backbone("lab:random", device=device)
        size, generator = backbone.preprocessing.size, np.random.default_rng(0)
        images = [generator.integers(0, 256, (IMAGES, 3, size, size)).astype(np.uint8) for _ in range(2)]
        heads = [random_head(backbone.width, CLASSES, seed) for seed in range(2)]
        taus = directions(backbone)
        singles = [single_predictions(backbone, *three, AXIS) for three in zip(taus, heads, images, strict=True)]
        tasks = compared(backbone, taus, heads, images, singles)
        assert all(str(part.device).startswith(device) for part in tasks.singles)
        counts = changes(backbone, tasks, list(itertools.product(range(len(AXIS)), repeat=2)), AXIS)
        error = set_error(backbone, taus, heads, images, singles, AXIS, points=2, tolerance=0.1)
        found[device] = counts, singles, error.value
    return found


def test_predictions_along_a_vector_are_the_cpus(measured: Measured) -> None:
    for here, there in zip(measured["cpu"][1], measured["cuda"][1], strict=True):
        assert there.dtype == np.int8
        assert np.mean(here != there) <= FEW


def test_a_small_heatmap_is_the_cpus(measured: Measured) -> None:
    here, there = measured["cpu"][0], measured["cuda"][0]
    assert here.max() > IMAGES / 4
    assert np.abs(here - there).max() <= 2 * FEW * IMAGES
    assert measured["cuda"][2] == pytest.approx(measured["cpu"][2], abs=4 * FEW)
