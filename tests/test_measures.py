"""Heads, accuracy, search and disentanglement against slow references and hand examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.learning import QUICK, TUNE, tune
from helpers.tasks import colour_task
from hypothesis import given
from hypothesis import strategies as st

import taskvec as tv
from taskvec.core import settings
from taskvec.core.errors import TaskvecError
from taskvec.core.settings import Finetune
from taskvec.data.tasks import Task
from taskvec.encoders.backbone import Backbone
from taskvec.evaluation import scale_search as search
from taskvec.evaluation.accuracy import normalised_accuracy, paired_bootstrap, per_image_scores
from taskvec.evaluation.disentanglement import choose_pairs, disentanglement
from taskvec.learning import heads
from taskvec.learning.batches import training_batches
from taskvec.learning.finetuning import finetune_tasks
from taskvec.learning.heads import Head
from taskvec.merging.in_memory import merge_vectors
from taskvec.weights import vectors
from taskvec.weights.flat import Weights, mend_variances


def test_normalised_accuracy_is_the_papers_equation_on_a_hand_example() -> None:
    assert normalised_accuracy([0.6, 0.9], [0.8, 0.9]) == pytest.approx((0.75 + 1.0) / 2)
    assert normalised_accuracy([0.6], [0.0]) is None


def test_the_probe_is_a_linear_layer_trained_by_the_plain_loop() -> None:
    torch.manual_seed(3)
    features, labels = torch.randn(40, 6), torch.randint(0, 3, (40,))
    ours = heads.fit(features[None], labels, 3, [0.01, 0.1], QUICK, seed=5)
    alone = heads.fit(features[None], labels, 3, [0.1], QUICK, seed=5)
    assert torch.allclose(ours[1].weight, alone[0].weight, atol=1e-6)
    logits = F.linear(features, ours[0].weight, ours[0].bias)
    assert torch.equal(ours[0].predict(features), logits.argmax(1))


def test_probing_learns_and_prefers_the_smaller_rate_on_ties(backbone: Backbone, tasks: list[Task]) -> None:
    head = tv.fit_head(backbone, tasks[0], QUICK)
    assert tv.evaluate(backbone, backbone.pretrained, tasks[:1], [head])["warm"] > 0.6
    tied = heads.ProbeResult((0.1, 0.01), (head, head), (0.5, 0.5))
    assert tied.best() == 1


def test_probing_leaves_torchs_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    features = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(0))
    heads.fit(features, torch.zeros(8).long(), 2, [0.1], QUICK, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_fine_tuning_moves_the_encoder_only_and_is_reproducible(backbone: Backbone, tasks: list[Task]) -> None:
    before = backbone.bound.flat.clone()
    head = tv.fit_head(backbone, tasks[0], QUICK)
    kept = head.weight.clone()
    tuned = tv.finetune(backbone, tasks[0], head, TUNE)
    again = tv.finetune(backbone, tasks[0], head, TUNE)
    assert torch.equal(tuned.flat, again.flat)
    assert torch.equal(head.weight, kept)
    assert torch.equal(backbone.bound.flat, before)
    assert not torch.equal(tuned.flat, before)


def test_a_task_vector_holds_neither_heads_nor_integer_buffers(backbone: Backbone, tasks: list[Task]) -> None:
    tuned = finetune_tasks(
        backbone, tasks[:1], [None], TUNE, head_learns=True
    )  # a frozen head would leave the counters alone
    vector = tv.task_vector(backbone, tuned.encoder)
    names = {entry.name for entry in vector.layout}
    assert names == {name for name, p in backbone.module.state_dict().items() if p.is_floating_point()}
    assert int(tuned.encoder["norm.num_batches_tracked"]) > 0
    merged = tv.merge(backbone.pretrained, [vector], scale=1.0)
    assert int(merged["norm.num_batches_tracked"]) == 0


def test_fine_tuning_beats_probing_on_its_task(backbone: Backbone) -> None:
    task = colour_task("hard", 8, 5, (160, 40, 80))
    head = tv.fit_head(backbone, task, QUICK)
    tuned = tv.finetune(backbone, task, head, Finetune(steps=150, batch_size=32, warmup=5, learning_rate=0.01))
    probed = tv.evaluate(backbone, backbone.pretrained, [task], [head])["hard"]
    assert tv.evaluate(backbone, tuned, [task], [head])["hard"] > probed + 0.05


def test_merging_one_task_at_scale_one_is_its_fine_tuned_encoder(backbone: Backbone, tasks: list[Task]) -> None:
    probed, tuned, taus = tune(backbone, tasks[:1])
    merged = tv.merge(backbone.pretrained, taus, scale=1.0)
    assert torch.allclose(merged.flat, tuned[0].flat, atol=1e-6)
    assert tv.evaluate(backbone, merged, tasks[:1], probed) == tv.evaluate(backbone, tuned[0], tasks[:1], probed)


def test_addition_is_a_sum_whatever_the_order_and_linear_in_the_scale(backbone: Backbone, tasks: list[Task]) -> None:
    _, _, taus = tune(backbone, tasks)
    pre = backbone.pretrained
    merged = tv.merge(pre, taus, scale=0.4)
    want = pre.flat.double() + 0.4 * (taus[0].flat.double() + taus[1].flat.double())
    assert torch.allclose(merged.flat.double(), want, atol=1e-7)
    assert torch.allclose(merged.flat, tv.merge(pre, taus[::-1], scale=0.4).flat, atol=1e-7)
    twice = tv.merge(pre, taus, scale=0.8).flat - pre.flat
    assert torch.allclose(twice, 2 * (merged.flat - pre.flat), atol=1e-6)
    assert torch.equal(tv.merge(pre, taus, scale=0.0).flat, pre.flat)


def test_two_tasks_of_one_name_are_not_measured_as_one(backbone: Backbone) -> None:
    alike = [colour_task("same", 3, 1), colour_task("same", 3, 2)]
    own = [heads.random_head(backbone.width, 3, seed) for seed in (0, 1)]
    with pytest.raises(TaskvecError, match="two tasks are named 'same'"):
        tv.evaluate(backbone, backbone.pretrained, alike, own)


def test_an_unknown_method_names_the_nearest(backbone: Backbone) -> None:
    with pytest.raises(tv.TaskvecError, match="task_arithmetic"):
        tv.merge(backbone.pretrained, [backbone.pretrained], scale=1.0, method="task_arithmetics")


def test_scale_zero_is_probing_for_kept_and_reprobed_heads(backbone: Backbone, tasks: list[Task]) -> None:
    probed, _, taus = tune(backbone, tasks)
    settings = QUICK.model_copy(update={"learning_rates": (0.03,)})
    head = tv.fit_head(backbone, tasks[0], settings)
    merged = merge_vectors(backbone.pretrained, taus, "task_arithmetic")
    values, refitted = search.reprobed_curve(backbone, merged, tasks[0], 0.03, settings, [0.0])
    assert torch.equal(refitted[0].weight, head.weight)
    assert search.kept_curve(backbone, merged, tasks[0], head, [0.0]) == values
    assert probed[0].weight.shape == (3, 6)


def test_the_search_reads_validation_and_never_test(backbone: Backbone, tasks: list[Task]) -> None:
    probed, _, taus = tune(backbone, tasks)
    blind = [Task(t.name, t.classes, t.train, t.validation, None) for t in tasks]  # type: ignore[arg-type]
    found = tv.search_scale(backbone, taus, blind, probed, scales="0:1:0.25")
    assert found.scales == (0.0, 0.25, 0.5, 0.75, 1.0)
    best = max(found.values)
    assert found.scale == min(s for s, v in zip(found.scales, found.values, strict=True) if v == best)
    for scale, row in zip(found.scales, found.accuracies, strict=True):
        merged = tv.merge(backbone.pretrained, taus, scale=scale)
        assert list(tv.evaluate(backbone, merged, tasks, probed, "validation").values()) == pytest.approx(list(row))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=21))
def test_ties_go_to_the_smaller_scale(values: list[int]) -> None:
    scales = [round(0.05 * i, 10) for i in range(len(values))]
    assert search.best_candidate(scales, values) == scales[values.index(max(values))]


@given(st.integers(0, 20))
def test_coarse_to_fine_finds_the_peak_of_any_single_peaked_curve(peak: int) -> None:
    grid = [round(0.05 * i, 10) for i in range(21)]
    value = {scale: -abs(i - peak) for i, scale in enumerate(grid)}
    tried = settings.coarse(grid)
    for step in (2, 1):
        best = search.best_candidate(tried, [value[s] for s in tried])
        tried += search.untried_neighbours(grid, tried, best, step)
    assert search.best_candidate(tried, [value[s] for s in tried]) == grid[peak]
    assert len(tried) == len(set(tried)) <= 9


def slow_errors(
    backbone: Backbone, taus: list[Weights], probed: list[Head], tasks: list[Task], scales: list[float]
) -> np.ndarray:
    """Two terms of xi by a double loop over the grid and whole models in float64-free plain code (section 4.1)."""
    out = np.zeros((2, len(scales), len(scales)))
    pre = backbone.pretrained
    for i, one in enumerate(scales):
        for j, two in enumerate(scales):
            both = mend_variances(pre.with_flat(pre.flat + one * taus[0].flat + two * taus[1].flat))
            for t, own in enumerate((one, two)):
                backbone.use(mend_variances(pre.with_flat(pre.flat + own * taus[t].flat)))
                single = probed[t].predict(backbone.features(tasks[t].test.images))
                backbone.use(both)
                together = probed[t].predict(backbone.features(tasks[t].test.images))
                out[t, i, j] = (single != together).double().mean()
    return out


def test_the_disentanglement_error_equals_a_slow_double_loop(backbone: Backbone, tasks: list[Task]) -> None:
    probed, _, taus = tune(backbone, tasks)
    scales = [-1.5, 0.0, 1.0, 3.0]
    images = (tasks[0].test.images, tasks[1].test.images)
    errors = disentanglement(backbone, (taus[0], taus[1]), (probed[0], probed[1]), images, scales)
    slow = slow_errors(backbone, taus, probed, tasks, scales)
    assert np.allclose(errors.first, slow[0])
    assert np.allclose(errors.second, slow[1])
    assert errors.xi().max() > 0
    assert errors.first[:, 1].max() == 0  # second coefficient 0: the same model twice
    assert errors.second[1, :].max() == 0


def test_dropout_and_stochastic_depth_come_from_the_seed(backbone: Backbone, tasks: list[Task]) -> None:
    backbone.module.register_forward_hook(lambda module, inputs, out: F.dropout(out, 0.5, module.training))
    head = tv.fit_head(backbone, tasks[0], QUICK)
    first = tv.finetune(backbone, tasks[0], head, TUNE)
    torch.rand(3)
    assert torch.equal(tv.finetune(backbone, tasks[0], head, TUNE).flat, first.flat)
    assert not torch.equal(tv.finetune(backbone, tasks[0], head, TUNE, seed=1).flat, first.flat)


def test_predictions_that_are_not_numbers_are_wrong_and_never_agree(backbone: Backbone, tasks: list[Task]) -> None:
    head = tv.fit_head(backbone, tasks[0], QUICK)
    assert head.predict(torch.tensor([[float("nan")] * 6, [0.0] * 6]))[0] == -1
    broken = backbone.pretrained.with_flat(torch.full_like(backbone.pretrained.flat, float("inf")))
    assert tv.evaluate(backbone, vectors.add(backbone.pretrained, broken), tasks[:1], [head]) == {"warm": 0.0}
    images = tasks[0].test.images
    errors = disentanglement(backbone, (broken, broken), (head, head), (images, images), [0.0, 1.0])
    assert errors.first[1, 1] == errors.second[1, 1] == 1


def test_running_variances_stay_positive_far_along_a_vector(backbone: Backbone, tasks: list[Task]) -> None:
    _, _, (tau,) = tune(backbone, tasks[:1])
    for far in (-30.0, 30.0):
        vectors.move(backbone.bound, backbone.pretrained, [tau], [far])
        assert float(backbone.bound["norm.running_var"].min()) >= 0
        assert float(tv.merge(backbone.pretrained, [tau], far)["norm.running_var"].min()) >= 0
    assert bool(backbone.features(tasks[0].test.images).isfinite().all())


def test_pairs_are_different_and_spread_over_the_tasks() -> None:
    names = list("abcdefgh")
    pairs = choose_pairs(names, 4)
    assert sorted(name for pair in pairs for name in pair) == names
    assert pairs == choose_pairs(names, 4)
    assert len(set(choose_pairs(names, 99))) == 28
    assert choose_pairs(["a"], 2) == []


def test_the_paired_interval_covers_as_a_plain_bootstrap_does() -> None:
    generator = np.random.default_rng(0)
    ours = {"a": generator.random(200) < 0.8, "b": generator.random(300) < 0.7}
    base = {"a": generator.random(200) < 0.7, "b": generator.random(300) < 0.7}
    gain = paired_bootstrap(ours, base)
    draws = []
    for _ in range(4000):
        means = []
        for name in ours:
            picked = generator.integers(0, len(ours[name]), len(ours[name]))
            means.append(ours[name][picked].mean() - base[name][picked].mean())
        draws.append(np.mean(means))
    assert gain.mean == pytest.approx(np.mean([ours[n].mean() - base[n].mean() for n in ours]))
    assert (gain.low, gain.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.006)
    same = paired_bootstrap(ours, ours)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_training_batches_come_from_the_seed_alone(backbone: Backbone, tasks: list[Task]) -> None:
    first, second = (training_batches(backbone, tasks[0].train, 8, seed=4) for _ in range(2))
    torch.manual_seed(99)
    a, b = next(first), next(second)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_correct_is_the_accuracy_image_by_image(backbone: Backbone, tasks: list[Task]) -> None:
    head = tv.fit_head(backbone, tasks[1], QUICK)
    right = per_image_scores(backbone, backbone.pretrained, tasks[1].test, head)
    assert right.dtype == bool
    assert right.mean() == tv.evaluate(backbone, backbone.pretrained, [tasks[1]], [head])["cold"]
    backbone.use(vectors.scale(backbone.pretrained, 0.5))
