"""Regimes of fine-tuning, sets of tasks and one scale a task, against slow references and laws."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers.encoders import TinyEncoder
from helpers.learning import QUICK, tune
from helpers.reporters import Quiet
from helpers.tasks import colour_task, write_folder_task
from hypothesis import given
from hypothesis import strategies as st

import taskvec as tv
from taskvec.command import runs
from taskvec.core.settings import Finetune, Subsets
from taskvec.data.tasks import Task
from taskvec.encoders.backbone import Backbone
from taskvec.encoders.identity import describe
from taskvec.engine.store import Store
from taskvec.evaluation import scale_search as search
from taskvec.evaluation.disentanglement import (
    BOX_AXIS,
    choose_sets,
    disentanglement,
    latin_points,
    set_error,
    single_predictions,
    spread_sets,
)
from taskvec.learning import heads
from taskvec.learning.batches import training_batches
from taskvec.learning.finetuning import finetune_tasks
from taskvec.learning.heads import Head
from taskvec.merging.in_memory import merge_vectors
from taskvec.study.files import open_study, packaged, parse_study
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile

PLAIN = Finetune(steps=4, batch_size=12, warmup=2, learning_rate=0.01)


def plain_loop(backbone: Backbone, tasks: list[Task], heads: list[Head], learns: bool) -> tuple[TinyEncoder, list]:
    """Train encoder and heads with bare PyTorch: the same batches, the schedule written out."""
    module = TinyEncoder()
    module.load_state_dict(backbone.module.state_dict())
    module.norm.train(learns)  # statistics are those that a frozen head was fitted under
    own = [[p.clone().requires_grad_(learns) for p in (head.weight, head.bias)] for head in heads]
    learning = [*module.parameters(), *(p for pair in own for p in pair if learns)]
    optimizer = torch.optim.AdamW(learning, lr=PLAIN.learning_rate, weight_decay=PLAIN.weight_decay)
    streams = [training_batches(backbone, task.train, PLAIN.batch_size // len(tasks), seed=3) for task in tasks]
    factors = [0.5, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 2))]
    for factor in factors:
        optimizer.param_groups[0]["lr"] = PLAIN.learning_rate * factor
        batches = [next(stream) for stream in streams]
        features = module(torch.cat([images for images, _ in batches]))
        losses = []
        for (weight, bias), part, (_, labels) in zip(own, features.chunk(len(tasks)), batches, strict=True):
            losses.append(F.cross_entropy(F.linear(part, weight, bias), labels))
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
    return module, own


def test_full_fine_tuning_equals_a_bare_loop_over_encoder_and_head(backbone: Backbone, tasks: list[Task]) -> None:
    start = heads.random_head(backbone.width, 3, seed=3)
    tuned = finetune_tasks(backbone, tasks[:1], [None], PLAIN, seed=3, precision="float32", head_learns=True)
    module, ((weight, bias),) = plain_loop(backbone, tasks[:1], [start], learns=True)
    state = tuned.encoder.state()
    assert all(torch.allclose(state[k], v.float(), atol=1e-6) for k, v in module.state_dict().items() if v.ndim)
    assert torch.allclose(tuned.heads[0].weight, weight, atol=1e-6)
    assert torch.allclose(tuned.heads[0].bias, bias, atol=1e-6)
    assert not torch.allclose(weight, start.weight, atol=1e-3)


def test_joint_fine_tuning_equals_a_bare_loop_over_all_tasks(backbone: Backbone, tasks: list[Task]) -> None:
    probed = [tv.fit_head(backbone, task, QUICK) for task in tasks]
    tuned = finetune_tasks(backbone, tasks, probed, PLAIN, seed=3, precision="float32").encoder.state()
    module, _ = plain_loop(backbone, tasks, probed, learns=False)
    assert all(torch.allclose(tuned[k], v.float(), atol=1e-6) for k, v in module.state_dict().items() if v.ndim)
    assert torch.equal(tuned["norm.running_mean"], backbone.pretrained["norm.running_mean"])
    assert not torch.equal(tuned["norm.weight"], backbone.pretrained["norm.weight"])


def test_a_frozen_head_stays_and_a_learning_one_starts_from_what_is_given(
    backbone: Backbone, tasks: list[Task]
) -> None:
    head = tv.fit_head(backbone, tasks[0], QUICK)
    before = head.weight.clone()
    still = finetune_tasks(
        backbone, tasks[:1], [head], PLAIN.model_copy(update={"learning_rate": 1e-12}), head_learns=True
    )
    assert torch.allclose(still.heads[0].weight, before, atol=1e-6)
    moved = finetune_tasks(backbone, tasks[:1], [head], PLAIN, head_learns=True)
    assert not torch.allclose(moved.heads[0].weight, before, atol=1e-4)
    assert torch.equal(head.weight, before)
    assert not moved.heads[0].weight.requires_grad


def test_a_zero_shot_head_ranks_by_cosine_and_survives_saving(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    texts, features = torch.randn(4, 6, generator=generator), torch.randn(9, 6, generator=generator)
    head = heads.zero_shot_head(texts, 20.0)
    want = 20 * torch.cosine_similarity(features[:, None], texts[None], dim=2)
    assert torch.allclose(head.logits(features), want, atol=1e-5)
    assert torch.equal(head.predict(7 * features), want.argmax(1))
    heads.save_heads({"a": head, "b": Head(texts, torch.zeros(4))}, tmp_path / "heads.safetensors")
    again = heads.read_heads(tmp_path / "heads.safetensors")
    assert torch.equal(again["a"].logits(features), head.logits(features))
    assert torch.equal(again["b"].logits(features), features @ texts.T)


def test_one_scale_a_task_never_loses_to_the_common_one(backbone: Backbone, tasks: list[Task]) -> None:
    probed, tuned, taus = tune(backbone, tasks)
    normal = [
        tv.evaluate(backbone, w, [t], [h], "validation")[t.name] for w, t, h in zip(tuned, tasks, probed, strict=True)
    ]
    grid = [round(0.1 * i, 10) for i in range(11)]
    common = tv.search_scale(backbone, taus, tasks, probed, scales=grid)
    found = search.coordinate_search(backbone, taus, tasks, probed, normal, grid, common.scale)
    values = [search.objective(accuracies, normal) for _, accuracies in found.tried]
    assert found.tried[-1][0] == found.scales
    assert values[-1] == max(values) >= max(common.values)
    assert len({scales for scales, _ in found.tried}) == len(found.tried)
    pre = backbone.pretrained
    for scales, accuracies in found.tried:
        merged = pre.with_flat(pre.flat + sum(s * tau.flat for s, tau in zip(scales, taus, strict=True)))
        assert list(tv.evaluate(backbone, merged, tasks, probed, "validation").values()) == list(accuracies)
        assert all(scale in grid for scale in scales)


def test_coarse_search_agrees_with_a_full_one_where_it_looked(backbone: Backbone, tasks: list[Task]) -> None:
    probed, tuned, taus = tune(backbone, tasks)
    normal = [
        tv.evaluate(backbone, w, [t], [h], "validation")[t.name] for w, t, h in zip(tuned, tasks, probed, strict=True)
    ]
    full = tv.search_scale(backbone, taus, tasks, probed)
    merged = merge_vectors(backbone.pretrained, taus, "task_arithmetic")
    coarse = search.coarse_search(backbone, merged, tasks, probed, normal, full.scales)
    known = dict(zip(full.scales, full.values, strict=True))
    assert list(coarse.values) == pytest.approx([known[scale] for scale in coarse.scales])
    assert coarse.scale == search.best_candidate(coarse.scales, coarse.values)
    assert 5 <= len(coarse.scales) <= 9


def test_the_error_of_two_tasks_is_the_mean_of_the_papers(backbone: Backbone, tasks: list[Task]) -> None:
    probed, _, taus = tune(backbone, tasks)
    axis = [-3.0, -1.0, 1.0, 3.0]
    images = [task.test.sample(20).images for task in tasks]
    singles = [
        single_predictions(backbone, tau, head, own, axis) for tau, head, own in zip(taus, probed, images, strict=True)
    ]
    pair = disentanglement(backbone, (taus[0], taus[1]), (probed[0], probed[1]), (images[0], images[1]), axis)
    many = set_error(backbone, taus, probed, images, singles, axis, points=400).value
    assert many == pytest.approx(pair.xi().mean(), abs=0.04)
    assert pair.xi().mean() > 0.05


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(0, 9))
def test_points_take_all_places_of_an_axis_in_turn(axis: int, tasks: int, points: int, seed: int) -> None:
    drawn = latin_points(axis, tasks, points, seed)
    assert drawn.shape == (points, tasks)
    for column in drawn.T:
        uses = np.bincount(column, minlength=axis)
        assert uses.max() - uses.min() <= 1


def test_the_error_of_sets_does_not_grow_by_itself() -> None:
    """Were predictions changed whenever anything else is added, numbers of tasks would have the same error."""
    for tasks in (2, 3, 8):
        coefficients = np.array(BOX_AXIS)[latin_points(len(BOX_AXIS), tasks, 16, seed=tasks)]
        others = coefficients.astype(bool).sum(axis=1, keepdims=True) - coefficients.astype(bool)
        assert (others > 0).all()
    assert np.mean(BOX_AXIS) == 0
    assert np.mean(np.abs(BOX_AXIS)) == 0.5  # as of uniform coefficients


def test_the_error_of_three_tasks_equals_a_slow_sum(backbone: Backbone) -> None:
    tasks = [colour_task(str(seed), 3, seed) for seed in (1, 2, 3)]
    probed, _, taus = tune(backbone, tasks)
    axis, images = [-2.0, -0.5, 0.5], [task.test.images for task in tasks]
    singles = [
        single_predictions(backbone, tau, head, own, axis) for tau, head, own in zip(taus, probed, images, strict=True)
    ]
    got = set_error(backbone, taus, probed, images, singles, axis, points=5, seed=7).value
    places = latin_points(3, 3, 5, seed=7)
    slow = []
    for point in places:
        scales = [axis[place] for place in point]
        flat = backbone.pretrained.flat + sum(s * tau.flat for s, tau in zip(scales, taus, strict=True))
        for t, scale in enumerate(scales):
            backbone.use(tv.merge(backbone.pretrained, [taus[t]], scale))
            alone = probed[t].predict(backbone.features(images[t]))
            backbone.use(backbone.pretrained.with_flat(flat))
            slow.append((probed[t].predict(backbone.features(images[t])) != alone).double().mean())
    assert got == pytest.approx(2 * float(np.mean(slow)), abs=1e-9)
    assert 0 < got <= 2


@given(st.integers(2, 8), st.integers(1, 60))
def test_sets_are_distinct_seeded_and_spread_over_sizes(tasks: int, limit: int) -> None:
    names = [f"t{i}" for i in range(tasks)]
    sizes = range(2, tasks + 1)
    sets = spread_sets(names, sizes, limit)
    every = [one for size in sizes for one in itertools.combinations(names, size)]
    assert len(sets) == min(limit, len(every)) == len(set(sets))
    assert set(sets) <= set(every)
    assert sets == spread_sets(names, sizes, limit)
    counts = {size: sum(len(one) == size for one in sets) for size in sizes}
    open_counts = [count for size, count in counts.items() if count < math.comb(tasks, size)]
    assert not open_counts or max(counts.values()) - min(open_counts) <= 1


def test_sets_use_every_task_about_as_often() -> None:
    names = list("abcdefgh")
    for size, count in ((2, 4), (3, 8), (5, 8)):
        sets = choose_sets(names, size, count)
        uses = [sum(name in one for one in sets) for name in names]
        assert max(uses) - min(uses) <= 2


def test_wanted_sizes_are_those_that_the_tasks_allow() -> None:
    assert Subsets(sizes="all").of(4) == (2, 3, 4)
    assert Subsets(sizes=(5, 3, 3)).of(4) == (3,)
    assert Subsets().of(4) == ()


STUDY = """
name: regimes
backbones: [{{address: "lab:random", learning_rates: {{full: 0.002}}}}]
tasks: ["folder:{root}/one", "folder:{root}/two", "folder:{root}/three"]
regimes: [aligned, {{name: full, seeds: [4]}}, {{name: joint, seeds: [1], steps: 3}}]
methods: [{{name: task_arithmetic, scales: "0:1:0.25"}}]
heads: [kept]
scales: per-task
heatmap: {{pairs: 1, points: 3, range: 1, samples: 4}}
subsets: {{sizes: all, limit: 4, samples: 8, points: 2}}
seeds: [0, 1]
probe: {{steps: 20, batch_size: 16, warmup: 2, learning_rates: [0.003, 0.03]}}
finetune: {{steps: 6, batch_size: 8, warmup: 2, learning_rates: [0.0003, 0.003, 100]}}
"""
KEY = ["regime", "seed", "tasks", "method", "config", "scale", "split", "scaling"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Run a study of several regimes, seeds and sets of tasks once, and return its rows."""
    root = tmp_path_factory.mktemp("regimes")
    for name, classes in (("one", ("a", "b")), ("two", ("c", "d", "e")), ("three", ("f", "g"))):
        write_folder_task(root / name, classes, train=14, test=6)
    text = STUDY.format(root=root)
    file = StudyFile(parse_study(text, "regimes"), text, root)
    runs.run_study(file, root / "out", Store(root / "store"), 1, Quiet(), "taskvec run regimes")
    return pd.read_csv(root / "out" / "results.csv", keep_default_na=False)


def test_every_regime_and_seed_has_its_rows(rows: pd.DataFrame) -> None:
    cells = rows[["regime", "seed"]].drop_duplicates().to_numpy().tolist()
    assert cells == [["aligned", 0], ["aligned", 1], ["full", 4]]
    joint = rows[rows.method == "joint"]
    assert set(zip(joint.regime, joint.seed, strict=True)) == {("aligned", 1)}
    measured = joint[joint.metric != "learning_rate"]
    assert set(measured.split) == {"validation", "test"}
    assert len(joint) - len(measured) == 1
    for _, cell in rows.groupby(["regime", "seed"]):
        assert {"probing", "fine_tuned", "task_arithmetic"} <= set(cell[cell.split == "test"].method)


def test_means_and_normalised_rows_follow_from_the_task_rows(rows: pd.DataFrame) -> None:
    accuracy = rows[rows.metric == "accuracy"]
    tuned = accuracy[(accuracy.method == "fine_tuned") & (accuracy.config == "{}") & (accuracy.task != "")]
    mark = {(r.regime, r.seed, r.split, r.task): r.value for r in tuned.itertuples()}
    checked = 0
    for key, group in accuracy.groupby(KEY):
        mean, parts = group[group.task == ""].value, group[group.task != ""]
        if len(mean):
            assert mean.iloc[0] == pytest.approx(parts.value.mean())
            same = rows[
                (rows[KEY] == list(key)).all(axis=1) & (rows.metric == "normalised_accuracy") & (rows.task == "")
            ]
            if len(same):
                ratios = [r.value / mark[r.regime, r.seed, r.split, r.task] for r in parts.itertuples()]
                assert same.value.iloc[0] == pytest.approx(np.mean(ratios))
                checked += 1
    assert checked > 40


def test_the_full_regime_starts_from_its_own_head_and_not_from_probing(rows: pd.DataFrame) -> None:
    full = rows[
        (rows.regime == "full") & (rows.metric == "accuracy") & (rows.task == "") & (rows.split == "validation")
    ]
    at_zero = full[(full.method == "task_arithmetic") & (full.scaling == "") & (full.scale == "0.0")]
    at_zero = at_zero[(at_zero.tasks.str.count(r"\+") == 2)]
    probing = full[(full.method == "probing") & (full.config == "{}")]
    assert len(at_zero) == len(probing) == 1
    assert at_zero.value.iloc[0] != probing.value.iloc[0]
    aligned = rows[(rows.regime == "aligned") & (rows.seed == 0) & (rows.metric == "accuracy") & (rows.task == "")]
    start = aligned[(aligned.method == "task_arithmetic") & (aligned.scaling == "")]
    start = start[(start.scale == "0.0") & (start.split == "validation")]
    whole = start[start.tasks.str.count(r"\+") == 2]
    probed = aligned[(aligned.method == "probing") & (aligned.split == "validation") & (aligned.config == "{}")]
    assert whole.value.tolist() == probed.value.tolist()


def test_only_first_seeds_have_subsets_and_scales_of_each_task(rows: pd.DataFrame) -> None:
    subsets = rows[rows.tasks.str.count(r"\+") == 1]
    assert set(zip(subsets.regime, subsets.seed, strict=True)) == {("aligned", 0), ("full", 4)}
    assert set(subsets.method) == {"task_arithmetic"}
    assert not subsets[subsets.split == "validation"].metric.str.startswith("normalised").any()
    for _, one in subsets[(subsets.metric == "accuracy") & (subsets.split == "test")].groupby(
        ["regime", "tasks", "task"]
    ):
        assert len(one) == 1
    errors = rows[rows.metric == "disentanglement_error"]
    assert errors.groupby("regime").tasks.nunique().tolist() == [4, 4]
    assert errors.value.between(0, 2).all()
    own = rows[(rows.scaling == "per-task") & (rows.split == "test") & (rows.metric == "accuracy")]
    assert set(zip(own.regime, own.seed, strict=True)) == {("aligned", 0), ("full", 4)}
    assert own.config.str.contains('"scales"').all()


def test_learning_rates_are_searched_on_the_first_task_recorded_and_shared(rows: pd.DataFrame) -> None:
    used = rows[rows.metric == "learning_rate"]
    assert used[used.regime == "full"].value.unique().tolist() == [0.002]
    aligned = used[used.regime == "aligned"].value.unique().tolist()
    tried = rows[(rows.method == "fine_tuned") & rows.config.str.contains("learning_rate")]
    assert set(zip(tried.regime, tried.seed, tried.task, strict=True)) == {("aligned", 0, "one")}
    best = tried.sort_values("value", ascending=False, kind="stable").iloc[0]
    assert aligned == [float(best.config.split(":")[1].strip("} "))]
    final = rows[(rows.method == "fine_tuned") & (rows.config == "{}") & (rows.seed == 0) & (rows.task == "one")]
    final = final[(final.regime == "aligned") & (final.split == "validation") & (final.metric == "accuracy")]
    assert final.value.tolist() == [best.value]


def test_regimes_that_cannot_be_are_refused_before_any_work(tmp_path: Path) -> None:
    write_folder_task(tmp_path / "one")
    small = f"backbones: ['lab:random']\ntasks: ['folder:{tmp_path}/one']\n"
    with pytest.raises(tv.TaskvecError, match="joint fine-tuning starts from the aligned"):
        parse_study(small + "regimes: [joint]", "s")
    text = small + "regimes: [aligned, open]"
    file = StudyFile(parse_study(text, "s"), text, tmp_path)
    with pytest.raises(tv.TaskvecError, match="'open' needs a backbone with a text tower"):
        runs.run_study(file, tmp_path / "out", Store(tmp_path / "store"), 1, Quiet(), "taskvec run s")
    assert not (tmp_path / "out").exists()


OPEN = """
name: open
backbones: ["lab:contrastive", "lab:random"]
tasks: ["lab:greek", "lab:textures", "lab:signs"]
regimes: [aligned, {name: open, disentanglement: false}, open-full]
methods: [{name: task_arithmetic, scales: [0, 0.5, 1]}]
heads: [kept]
heatmap: {pairs: 1, points: 3, range: 1, samples: 4}
probe: {steps: 10, batch_size: 16, warmup: 2, learning_rates: [0.03]}
finetune: {steps: 3, batch_size: 8, warmup: 1, learning_rate: 0.0003}
limit: 40
"""


def test_open_regimes_start_from_captions_on_the_tasks_that_have_them(tmp_path: Path) -> None:
    file = StudyFile(parse_study(OPEN, "open"), OPEN, tmp_path)
    runs.run_study(file, tmp_path / "out", Store(tmp_path / "store"), 1, Quiet(), "taskvec run open")
    rows = pd.read_csv(tmp_path / "out" / "results.csv", keep_default_na=False)
    heat = pd.read_csv(tmp_path / "out" / "disentanglement.csv")
    cells = rows[["backbone", "regime", "tasks"]].drop_duplicates().to_numpy().tolist()
    assert cells == [
        ["contrastive", "aligned", "greek+textures+signs"],
        ["contrastive", "aligned", "greek+signs"],  # so that regimes compare on the same tasks
        ["contrastive", "open", "greek+signs"],
        ["contrastive", "open-full", "greek+signs"],
        ["random", "aligned", "greek+textures+signs"],
        ["random", "aligned", "greek+signs"],
    ]
    assert heat.regime.unique().tolist() == ["aligned", "open-full"]
    mean = rows[(rows.metric == "accuracy") & (rows.task == "") & (rows.config == "{}")]
    mean = mean.assign(scale=mean.scale.astype(float))
    start = mean[(mean.method == "zero_shot") & (mean.split == "validation")].set_index("regime").value
    assert start["open"] == start["open-full"] > 0.3  # of 24 letters and 24 arrows: far above chance
    at_zero = mean[(mean.method == "task_arithmetic") & (mean.split == "validation") & (mean.scale == 0)]
    assert at_zero.set_index("regime").value["open"] == start["open"]
    assert set(mean[mean.split == "test"].method) == {"probing", "zero_shot", "fine_tuned", "task_arithmetic"}
    assert set(mean[mean.method == "zero_shot"].scale) == {0}


def test_a_lab_encoder_along_its_pretraining_is_loaded_by_step() -> None:
    start, later = (tv.load_backbone(f"lab:supervised@{step}") for step in (0, 2))
    again = tv.load_backbone("lab:supervised@2")
    assert torch.equal(later.pretrained.flat, again.pretrained.flat)
    assert not torch.equal(start.pretrained.flat, later.pretrained.flat)
    assert later.name == "supervised@2"
    with pytest.raises(tv.TaskvecError, match="'@soon' in 'lab:supervised@soon' is neither a step nor a file"):
        tv.load_backbone("lab:supervised@soon")
    with pytest.raises(tv.TaskvecError, match="supervised"):
        tv.load_backbone("lab:supervized@2")
    with pytest.raises(tv.TaskvecError, match="has no step 99999\nchoose 0 to 7000"):
        describe("lab:supervised@99999", None)
    with pytest.raises(tv.TaskvecError, match="'lab:random' was not pre-trained"):
        describe("lab:random@5", None)


def test_every_packaged_study_can_be_planned(tmp_path: Path) -> None:
    for name in packaged():  # an estimate, since nobody has the paper's data here
        cells = plan(open_study(name), Store(tmp_path), estimate=True)
        assert cells, name
        assert all(cell.test and cell.model for cell in cells), name
