"""The encoder is moved by whatever measures, and is afterwards where it was: a law over all of it, threads included."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import taskvec as tv
from taskvec.core.settings import Finetune, Probe, Surgery
from taskvec.data.tasks import Task
from taskvec.encoders import batch_norm
from taskvec.encoders.backbone import Backbone, linearised
from taskvec.evaluation import accuracy as evaluation
from taskvec.evaluation import alignment, negation, racing
from taskvec.evaluation import disentanglement as disentangling
from taskvec.evaluation import scale_search as search
from taskvec.learning import batches, finetuning, heads
from taskvec.learning import external as brought
from taskvec.merging.entries import Data
from taskvec.merging.methods import measuring
from taskvec.merging.methods.adaptive import Adamerging, Fisher, Regmean
from taskvec.weights.flat import Weights

PROBE = Probe(steps=3, batch_size=8, warmup=1, learning_rates=(0.01,))
TUNE = Finetune(steps=2, batch_size=8, warmup=0, learning_rate=0.01)
SURGERY = Surgery(rank=2, steps=2, batch_size=8)
SCALES = [0.0, 0.5, 1.0]
MODULES = (
    alignment,
    batch_norm,
    batches,
    disentangling,
    evaluation,
    finetuning,
    heads,
    measuring,
    negation,
    racing,
    search,
)
PRESENT = {
    "features_along",
    "write_merged",
    "scored",
    "gradients",
    "mean_squares",
    "encode_all",
    "loss_of",
    "pays_to_compile",
    "training_copy",
    "changes_at",
}
"""What looks through the present weights in the present mode, or moves them, for others that put them back."""


class Ground:
    """A backbone that is at other weights than the pre-trained ones, partly in training mode, and what calls take."""

    def __init__(self, backbone: Backbone, tasks: list[Task]) -> None:
        self.backbone, self.tasks = backbone, tasks
        self.heads = [heads.random_head(backbone.width, len(task.classes), seed) for seed, task in enumerate(tasks)]
        generator = torch.Generator().manual_seed(3)
        pre = backbone.pretrained
        self.taus = [pre.with_flat(torch.randn(pre.flat.shape, generator=generator) / 10) for _ in tasks]
        self.images = [task.test.images for task in tasks]
        self.data = Data(backbone, self.taus, tasks, self.heads)
        backbone.use(pre.with_flat(0.9 * pre.flat.abs()))
        backbone.module.train()
        backbone.module.second.eval()  # type: ignore[union-attr]

    @property
    def pair(self) -> tuple[Any, Any]:
        return (self.heads[0], self.heads[1]), (self.images[0], self.images[1])

    def state(self) -> tuple[torch.Tensor, list[bool], dict[str, torch.Tensor]]:
        carried = {name: value.clone() for name, value in self.backbone.bound.carried.items()}
        return self.backbone.bound.flat.clone(), [part.training for part in self.backbone.module.modules()], carried


def singles(g: Ground) -> list[Any]:
    alone = [disentangling.predictions(g.backbone, head, images) for head, images in zip(*g.pair, strict=True)]
    return [classes.numpy()[None].repeat(3, 0) for classes in alone]


CALLS: dict[str, Callable[[Ground], object]] = {
    "alignment_curves": lambda g: alignment.alignment_curves(g.backbone, g.taus[0], g.taus[1], g.images[0], SCALES),
    "negate": lambda g: negation.negate(g.backbone, g.taus[0], tuple(g.tasks), g.pair[0], SCALES),
    "check": lambda g: batch_norm.check(g.backbone),
    "reestimate": lambda g: batch_norm.reestimate(g.backbone, g.taus[0], g.images[0], 8),
    "predictions": lambda g: disentangling.predictions(g.backbone, g.heads[0], g.images[0]),
    "single_predictions": lambda g: disentangling.single_predictions(
        g.backbone, g.taus[0], g.heads[0], g.images[0], SCALES
    ),
    "compared": lambda g: disentangling.compared(g.backbone, g.taus, *g.pair, singles(g)),
    "changes": lambda g: disentangling.changes(
        g.backbone, disentangling.compared(g.backbone, g.taus, *g.pair, singles(g)), [(1, 1), (1, 2)], SCALES
    ),
    "sampled_accuracies": lambda g: evaluation.sampled_accuracies(
        g.backbone, g.taus[0], [task.test for task in g.tasks], g.heads, 1.5
    ),
    "disentanglement": lambda g: disentangling.disentanglement(g.backbone, tuple(g.taus), *g.pair, SCALES),
    "set_error": lambda g: disentangling.set_error(g.backbone, g.taus, *g.pair, singles(g), SCALES, 2),
    "per_image_scores": lambda g: evaluation.per_image_scores(g.backbone, g.taus[0], g.tasks[0].test, g.heads[0]),
    "accuracy": lambda g: evaluation.accuracy(g.backbone, g.taus[0], g.tasks[0].test, g.heads[0]),
    "evaluate": lambda g: evaluation.evaluate(g.backbone, g.taus[0], g.tasks, g.heads),
    "training_batches": lambda g: next(batches.training_batches(g.backbone, g.tasks[0].train, 4, 0)),
    "training_stream": lambda g: batches.training_stream(g.backbone, g.tasks[0].train, 4, 0),
    "graphed": lambda g: finetuning.graphed(g.backbone),
    "finetune": lambda g: finetuning.finetune(g.backbone, g.tasks[0], g.heads[0], TUNE),
    "finetune_tasks": lambda g: finetuning.finetune_tasks(
        g.backbone, g.tasks, g.heads, TUNE, head_learns=True, lora=finetuning.Lora(rank=2, layers=["first"])
    ),
    "training_precision": lambda g: finetuning.training_precision(g.backbone, "auto"),
    "task_vector": lambda g: finetuning.task_vector(g.backbone, g.taus[0]),
    "features_of": lambda g: heads.features_of(g.backbone, g.tasks[0].test),
    "fit_head": lambda g: heads.fit_head(g.backbone, g.tasks[0], PROBE),
    "summed": lambda g: measuring.summed(
        g.data, lambda *_: {"": g.backbone.features(g.images[0]).clone()}, lambda found, vector: iter(found.items())
    ),
    "fisher": lambda g: measuring.fisher(g.data, Fisher(examples=2)),
    "grams": lambda g: measuring.grams(g.data, Regmean(examples=8)),
    "coefficients": lambda g: measuring.coefficients(g.data, Adamerging(steps=2, batch_size=4)),
    "kept_curve": lambda g: search.kept_curve(g.backbone, g.taus[0], g.tasks[0], g.heads[0], SCALES),
    "accuracies": lambda g: evaluation.accuracies(g.backbone, g.tasks, g.heads),
    "fine_tuned_accuracies": lambda g: evaluation.fine_tuned_accuracies(g.backbone, g.taus, g.tasks, g.heads),
    "coordinate_search": lambda g: search.coordinate_search(
        g.backbone, g.taus, g.tasks, g.heads, [1, 1], SCALES, 0.5
    ),
    "coarse_search": lambda g: search.coarse_search(g.backbone, g.taus[0], g.tasks, g.heads, [1, 1], SCALES),
    "scores_along": lambda g: racing.scores_along(
        g.backbone, g.taus[0], g.tasks[0], g.heads[0], SCALES, np.arange(4)
    ),
    "race_scale": lambda g: racing.race_scale(g.backbone, g.taus[0], g.tasks, g.heads, [1, 1], SCALES),
    "reprobed_curve": lambda g: search.reprobed_curve(g.backbone, g.taus[0], g.tasks[0], 0.01, PROBE, SCALES),
    "corrected_curve": lambda g: search.corrected_curve(
        g.backbone, g.taus[0], g.taus[1], g.tasks[0], g.heads[0], SURGERY, SCALES
    ),
    "search_scale": lambda g: search.search_scale(g.backbone, g.taus, g.tasks, g.heads, scales=SCALES),
}  # fmt: skip


def looks(function: object, module: object) -> bool:
    """Say whether a module's own function is handed a backbone."""
    if not inspect.isfunction(function) or function.__module__ != module.__name__:  # type: ignore[attr-defined]
        return False
    return any(str(p.annotation) in ("Backbone", "Data") for p in inspect.signature(function).parameters.values())


def test_the_law_is_asked_of_everything_that_looks_through_a_backbone() -> None:
    found = {name for module in MODULES for name, function in vars(module).items() if looks(function, module)}
    assert {name for name in found if not name.startswith("_")} == set(CALLS) | PRESENT


def same(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    carried = all(torch.equal(value, after[2][name]) for name, value in before[2].items())
    return torch.equal(before[0], after[0]) and before[1] == after[1] and carried


@pytest.mark.parametrize("name", CALLS)
def test_the_encoder_is_afterwards_where_and_as_it_was(backbone: Backbone, tasks: list[Task], name: str) -> None:
    ground = Ground(backbone, tasks)
    before = ground.state()
    CALLS[name](ground)
    assert same(before, ground.state())


@pytest.mark.parametrize("moment", [1, 2, 4])
@pytest.mark.parametrize("name", CALLS)
def test_so_it_is_where_the_call_is_interrupted(backbone: Backbone, tasks: list[Task], name: str, moment: int) -> None:
    ground, passes = Ground(backbone, tasks), []

    def interrupt(*_: object) -> None:
        passes.append(1)
        if len(passes) == moment:
            raise KeyboardInterrupt

    backbone.module.second.register_forward_pre_hook(interrupt)  # type: ignore[union-attr]
    before = ground.state()
    try:
        CALLS[name](ground)
    except KeyboardInterrupt:
        assert len(passes) == moment
    assert same(before, ground.state())


@pytest.mark.parametrize("fails", [False, True])
def test_so_it_is_where_a_classifier_is_compared(backbone: Backbone, tasks: list[Task], fails: bool) -> None:
    ground = Ground(backbone, tasks)
    before, head = ground.state(), ground.heads[0]
    whole = torch.nn.Sequential(copy.deepcopy(backbone.module), torch.nn.Linear(6, 3))
    whole[1].load_state_dict({"weight": head.weight, "bias": head.bias})
    if fails:
        backbone.module.second.register_forward_hook(lambda *_: 1 / 0)  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        assert brought.same_scores(whole, backbone.bound.clone(), head, backbone)
    assert same(before, ground.state())


def test_moves_within_moves_come_back_one_by_one(backbone: Backbone) -> None:
    pre = backbone.pretrained
    one, two = pre.with_flat(pre.flat + 1), pre.with_flat(pre.flat + 2)
    with backbone.at(one):
        with pytest.raises(RuntimeError, match="inside"), backbone.at(two):
            assert torch.equal(backbone.bound.flat, two.flat)
            raise RuntimeError("inside")
        assert torch.equal(backbone.bound.flat, one.flat)
        with backbone.at():
            assert torch.equal(backbone.bound.flat, one.flat)
            backbone.use(two)
        assert torch.equal(backbone.bound.flat, one.flat)
    assert torch.equal(backbone.bound.flat, pre.flat)


def test_only_a_kept_model_is_moved_for_good() -> None:
    source = Path(tv.__file__).parent
    callers = {str(p.relative_to(source)) for p in source.rglob("*.py") if "backbone.use(" in p.read_text("utf-8")}
    assert callers == {"deploy/model.py"}


def test_a_head_is_fitted_on_the_same_features_before_and_after_an_evaluation(
    backbone: Backbone, tasks: list[Task]
) -> None:
    first = tv.fit_head(backbone, tasks[0], PROBE)
    tv.evaluate(backbone, backbone.pretrained.with_flat(2 * backbone.pretrained.flat), tasks[:1], [first])
    assert torch.equal(tv.fit_head(backbone, tasks[0], PROBE).weight, first.weight)


@pytest.mark.parametrize("linear", [False, True])
def test_threads_that_share_a_backbone_measure_what_one_alone_does(
    backbone: Backbone, tasks: list[Task], linear: bool
) -> None:
    ground = Ground(linearised(backbone) if linear else backbone, tasks)
    backbone.module.eval()
    jobs: list[Callable[[], object]] = [lambda: ground.backbone.features(ground.images[0]).tolist()]
    for place, tau in enumerate(ground.taus):
        where: Weights = tau.with_flat(backbone.pretrained.flat + tau.flat)
        jobs += [
            lambda w=where, p=place: evaluation.per_image_scores(  # type: ignore[misc]
                ground.backbone, w, ground.tasks[p].test, ground.heads[p]
            ).tolist(),
            lambda t=tau: disentangling.single_predictions(  # type: ignore[misc]
                ground.backbone, t, ground.heads[0], ground.images[0], SCALES
            ).tolist(),
        ]
    want = [job() for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            assert list(pool.map(lambda job: job(), jobs * 4)) == want * 4


def test_a_backbone_can_be_copied_and_pickled(backbone: Backbone, tasks: list[Task]) -> None:
    images, moved = tasks[0].test.images, backbone.pretrained.with_flat(2 * backbone.pretrained.flat)
    want = backbone.features(images)
    for again in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone)), replace(backbone)):
        with again.at(moved):
            assert not torch.equal(again.features(images), want)
        assert torch.equal(again.features(images), want)


def test_a_random_head_is_what_torch_makes_whatever_other_threads_draw() -> None:
    def torchs(seed: int, width: int) -> torch.Tensor:
        torch.manual_seed(seed)
        layer = torch.nn.Linear(width, 5)
        return torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1)

    def ours(seed: int, width: int) -> torch.Tensor:
        head = heads.random_head(width, 5, seed)
        return torch.cat([head.weight, head.bias[:, None]], 1)

    cases = [(seed, width) for seed in range(20) for width in (1, 3, 6, 192, 768)]
    with torch.random.fork_rng(devices=[]):
        want = [torchs(*case) for case in cases]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda case: ours(*case), cases))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
