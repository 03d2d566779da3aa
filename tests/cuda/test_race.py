"""Races on a GPU: scores are the CPU's, and a race there chooses as the exact search does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.encoders import TinyEncoder
from helpers.learning import tune

from taskvec.data.images import Preprocessing
from taskvec.data.tasks import Task
from taskvec.encoders.backbone import Backbone, assemble
from taskvec.evaluation import racing
from taskvec.evaluation.accuracy import fine_tuned_accuracies
from taskvec.evaluation.scale_search import kept_curve, objective
from taskvec.merging.in_memory import merge_vectors

pytestmark = pytest.mark.cuda
GRID = [0.0, 0.25, 0.5, 0.75, 1.0]


def tiny(device: str) -> Backbone:
    torch.manual_seed(0)
    return assemble("tiny", TinyEncoder(), Preprocessing(size=8), {"family": "tiny", "options": {}}, device)


def test_scores_on_the_device_are_those_of_the_cpu(backbone: Backbone, tasks: list[Task]) -> None:
    heads, _, [tau, _] = tune(backbone, tasks)
    places, device = np.random.default_rng(0).permutation(24)[:20], tiny("cuda")
    there = device.pretrained.with_flat(tau.flat.to("cuda"))
    ours = racing.scores_along(device, there, tasks[0], heads[0], GRID, places)
    slow = racing.scores_along(backbone, tau, tasks[0], heads[0], GRID, places)
    assert ours.shape == (5, 20)
    assert (ours != slow).sum() <= 1  # a tie of two classes


def test_a_race_on_the_device_chooses_as_the_exact_search(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racing, "LOOKS", (8, 16))
    backbone = tiny("cuda")
    heads, _, taus = tune(backbone, tasks)
    merged, tuned = merge_vectors(backbone.pretrained, taus), fine_tuned_accuracies(backbone, taus, tasks, heads)
    curves = [kept_curve(backbone, merged, *pair, GRID) for pair in zip(tasks, heads, strict=True)]
    values = [objective(row, tuned) for row in zip(*curves, strict=True)]
    chosen = racing.race_scale(backbone, merged, tasks, heads, tuned, GRID)
    assert max(values) - values[GRID.index(chosen.scale)] <= racing.INDIFFERENCE + 1 / 24
    assert chosen.scale in chosen.scales
