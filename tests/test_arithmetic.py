"""Negation and analogy, against slow references, hand examples and laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.learning import tune
from helpers.tasks import colour_task
from hypothesis import given
from hypothesis import strategies as st

import taskvec as tv
from taskvec.core.errors import TaskvecError
from taskvec.data.tasks import Task
from taskvec.encoders.backbone import Backbone
from taskvec.evaluation.negation import analogy, choose_negation, negate


def test_the_scale_of_negation_on_a_hand_example() -> None:
    scales, forgotten = [0.0, 0.5, 1.0, 1.5], [0.9, 0.4, 0.1, 0.1]
    assert choose_negation(scales, forgotten, [0.8, 0.8, 0.77, 0.7], 0.95) == 1.0
    assert choose_negation(scales, forgotten, [0.8, 0.8, 0.75, 0.7], 0.95) == 0.5
    assert choose_negation(scales, forgotten, [0.8, 0.8, 0.8, 0.8], 0.95) == 1.0  # a tie goes to the smaller
    assert choose_negation(scales, forgotten, [0.8, 0.1, 0.1, 0.1], 0.95) == 0.0


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=9), st.floats(0, 1))
def test_the_control_keeps_its_share_and_nothing_allowed_forgets_more(rows: list, keep: float) -> None:
    scales = [float(place) for place in range(len(rows))]
    forgotten, control = zip(*rows, strict=True)
    chosen = scales.index(choose_negation(scales, forgotten, control, keep))
    assert control[chosen] >= keep * control[0]
    allowed = [lost for lost, kept in rows if kept >= keep * control[0]]
    assert forgotten[chosen] == min(allowed)


def test_negation_measures_the_encoder_behind_the_pretrained_one(backbone: Backbone, tasks: list[Task]) -> None:
    heads, _, (tau, _) = tune(backbone, tasks)
    found = negate(backbone, tau, (tasks[0], tasks[1]), (heads[0], heads[1]), [0.5, 2.0], keep=0.5)
    assert torch.equal(backbone.bound.flat, backbone.pretrained.flat)
    assert found.scales == (0.0, 0.5, 2.0)
    for scale, *values in zip(found.scales, found.forgotten, found.control, strict=True):
        weights = tv.merge(backbone.pretrained, [tau], -scale)
        assert list(tv.evaluate(backbone, weights, tasks, heads, "validation").values()) == values
    assert found.control[found.place] >= 0.5 * found.control[0]


def test_what_negation_cannot_do_is_told(backbone: Backbone, tasks: list[Task]) -> None:
    heads, _, (tau, _) = tune(backbone, tasks)
    pair = (tasks[0], tasks[1]), (heads[0], heads[1])
    with pytest.raises(TaskvecError, match="0 or more, not -1"):
        negate(backbone, tau, *pair, [-1.0, 1.0])
    with pytest.raises(TaskvecError, match="cannot keep 1.2"):
        negate(backbone, tau, *pair, [1.0], keep=1.2)


def test_analogy_is_the_sum_and_the_same_from_either_side(backbone: Backbone) -> None:
    tasks = [colour_task(name, 3, seed) for seed, name in enumerate("abc")]
    tasks[1] = replace(tasks[1], classes=tasks[1].classes[::-1])  # the order of classes does not matter
    taus = [
        backbone.pretrained.with_flat(torch.randn(backbone.pretrained.flat.shape, generator=g))
        for g in (torch.Generator().manual_seed(seed) for seed in range(3))
    ]
    found = analogy(tasks, taus)
    assert torch.allclose(found.flat, taus[0].flat + taus[1].flat - taus[2].flat, atol=1e-6)
    swapped = analogy([tasks[1], tasks[0], tasks[2]], [taus[1], taus[0], taus[2]])
    assert torch.allclose(found.flat, swapped.flat, atol=1e-6)
    same = analogy([tasks[0], tasks[1], tasks[1]], [taus[0], taus[1], taus[1]])
    assert torch.equal(same.flat, taus[0].flat)


def test_analogy_between_other_labels_is_refused(backbone: Backbone, tasks: list[Task]) -> None:
    zero = backbone.pretrained
    with pytest.raises(TaskvecError, match=r"'warm' \(classification: c0, c1, c2\) and 'cold' \(.*c3, c4\)"):
        analogy([tasks[0], tasks[1], tasks[0]], [zero] * 3)
    with pytest.raises(TaskvecError, match="three task vectors, not 2"):
        analogy(tasks, [zero] * 2)
