"""Linearised encoders: laws of a first-order expansion, and everything that is done with one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.encoders import TinyEncoder
from helpers.learning import QUICK, TUNE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import taskvec as tv
from taskvec.core.errors import TaskvecError
from taskvec.data.tasks import Task
from taskvec.deploy import model
from taskvec.encoders.backbone import Backbone, encode, linearised, load_backbone
from taskvec.encoders.linearised import jvp_features
from taskvec.engine.store import Store
from taskvec.evaluation import scale_search as search
from taskvec.learning.external import read_finetuned
from taskvec.merging.in_memory import merge_vectors
from taskvec.study.files import parse_study
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile
from taskvec.weights import vectors
from taskvec.weights.flat import Weights, bind


def parts() -> tuple[nn.Module, Weights, Weights, Tensor]:
    """Return a transformer, its bound weights, a copy of them, and images."""
    torch.manual_seed(0)
    module = load_backbone("lab:random", device="cpu").module.eval()
    bound = bind(module)
    return module, bound, bound.clone(), torch.randn(2, 3, 32, 32)


MODULE, BOUND, START, IMAGES = parts()


def at(vector: Tensor, per_patch: bool = False) -> Tensor:
    BOUND.flat.copy_(START.flat + vector)
    with torch.no_grad():
        return encode(MODULE, IMAGES, per_patch, START)


def random_vector(seed: int, length: float = 1e-2) -> Tensor:
    return length * torch.randn(START.flat.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("per_patch", [False, True])
def test_at_the_start_the_features_are_the_encoders(per_patch: bool) -> None:
    found = at(torch.zeros_like(START.flat), per_patch)
    with torch.no_grad():
        assert torch.allclose(found, encode(MODULE, IMAGES, per_patch), atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 99), st.integers(100, 199), st.floats(-3, 3), st.floats(-3, 3))
def test_features_are_affine_in_the_weights(first: int, second: int, a: float, b: float) -> None:
    tau, other = random_vector(first), random_vector(second)
    start = at(torch.zeros_like(tau))
    want = start + a * (at(tau) - start) + b * (at(other) - start)
    assert torch.allclose(at(a * tau + b * other), want, atol=1e-3)


def test_the_slope_is_that_of_a_finite_difference_in_float64() -> None:
    torch.manual_seed(0)
    module = TinyEncoder().double().eval()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    start = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    change = {name: 0.1 * torch.randn_like(p) for name, p in module.named_parameters()}  # tied weights once

    def move(scale: float) -> None:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(start[name] + scale * change[name])

    ends = []
    for scale in (1e-5, -1e-5):
        move(scale)
        ends.append(module(images))
    slope = (ends[0] - ends[1]) / 2e-5
    move(0.0)
    middle = module(images)
    move(1.0)
    found = jvp_features(module, lambda part, x: part(x), images, _Float64(start))  # type: ignore[arg-type]
    assert found.dtype == torch.float64
    assert torch.allclose(found - middle, slope, atol=1e-8)
    assert not torch.allclose(module(images), found, atol=1e-4)


class _Float64:
    """Weights of another precision than the package's, for a reference."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.held = state

    def state(self) -> dict[str, Tensor]:
        return self.held


def test_the_gradient_of_training_is_that_of_the_linear_model(backbone: Backbone) -> None:
    module, images = backbone.module.eval(), torch.randn(4, 3, 8, 8)
    backbone.bound.flat.add_(0.05 * torch.randn(backbone.bound.flat.shape, generator=torch.Generator().manual_seed(1)))
    encode(module, images, False, backbone.pretrained).sum().backward()
    moved = module.second.weight.grad.clone()
    module.zero_grad()
    backbone.use(backbone.pretrained)
    module(images).sum().backward()
    assert torch.allclose(moved, module.second.weight.grad, atol=1e-5)


def test_an_operation_without_a_derivative_is_told() -> None:
    class Stuck(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x

        @staticmethod
        def setup_context(ctx: object, inputs: object, output: object) -> None:
            pass

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return Stuck.apply(self.layer(x))

    module = Plain()
    base = bind(module).clone()
    with pytest.raises(TaskvecError, match="a Plain cannot be linearised"):
        jvp_features(module, lambda part, x: part(x), torch.ones(1, 4), base)


def tuned(backbone: Backbone, tasks: list[Task]) -> tuple[Backbone, list, list[Weights]]:
    flat = linearised(backbone)
    heads = [tv.fit_head(flat, task, QUICK) for task in tasks]
    encoders = [tv.finetune(flat, task, head, TUNE) for task, head in zip(tasks, heads, strict=True)]
    return flat, heads, [tv.task_vector(flat, encoder) for encoder in encoders]


def test_fine_tuning_lowers_the_loss_and_leaves_statistics_of_batch_norm(backbone: Backbone, tasks: list[Task]) -> None:
    flat, (head, _), (vector, _) = tuned(backbone, tasks)
    images, labels = tasks[0].train.images, torch.from_numpy(tasks[0].train.labels)
    before = head.loss(flat.features(images), labels)
    vectors.move(flat.bound, flat.pretrained, [vector], [1.0])
    assert head.loss(flat.features(images), labels) < before
    assert not vector["norm.running_mean"].any()
    assert not vector["norm.running_var"].any()
    assert not torch.allclose(flat.features(images), replace(flat, base=None).features(images), atol=1e-5)


def test_a_line_search_by_two_passes_equals_one_pass_a_scale(backbone: Backbone, tasks: list[Task]) -> None:
    flat, heads, taus = tuned(backbone, tasks)
    merged, split = merge_vectors(flat.pretrained, taus, "task_arithmetic"), tasks[0].validation
    scales = [-1.0, 0.0, 0.3, 1.7]
    for scale, (found, labels) in zip(
        scales, search.features_along(flat, merged, split, tasks[0].kind, scales), strict=True
    ):
        vectors.move(flat.bound, flat.pretrained, [merged], [scale])
        assert torch.allclose(found, flat.features(split.images), atol=1e-4)
        assert torch.equal(labels, torch.from_numpy(split.labels))
    curve = search.kept_curve(flat, merged, tasks[0], heads[0], scales)
    slow = [search.kept_curve(flat, merged, tasks[0], heads[0], [scale])[0] for scale in scales]
    assert curve == pytest.approx(slow, abs=1.5 / len(split))


def test_a_kept_model_answers_as_the_linearised_encoder_does(tmp_path: Path) -> None:
    flat = linearised(load_backbone("lab:random", device="cpu"))
    head = tv.Head(torch.randn(3, flat.width, generator=torch.Generator().manual_seed(0)), torch.zeros(3))
    weights = flat.pretrained.with_flat(flat.pretrained.flat + random_vector(3))
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32)).astype(np.uint8)
    flat.use(weights)
    want = head.logits(flat.features(images))
    about = {"method": "m", "heads": "kept", "scale": 1.0, "validation": 0.5}
    model.save_model(tmp_path, flat, weights, {"t": head}, [("a", "b", "c")], about)
    again = model.load(tmp_path, "cpu").scores(images, ["t"])["t"]
    assert torch.allclose(again, want, atol=1e-4)
    with pytest.raises(TaskvecError, match="is of a linearised encoder"):
        read_finetuned(tmp_path / "encoder.safetensors", flat)
    plain = replace(flat, base=None)
    assert not torch.allclose(head.logits(plain.features(images)), want, atol=1e-3)


def test_every_step_that_evaluates_a_linearised_encoder_is_told(tmp_path: Path) -> None:
    text = """
backbones: ["lab:random"]
tasks: ["lab:greek", "lab:street"]
regimes: [linearised]
heads: [kept, reprobed, surgery]
scales: per-task
agreement: 8
negation: {forget: greek, control: street}
"""
    [cell] = plan(StudyFile(parse_study(text, "s"), text, tmp_path), Store(tmp_path))
    told = {step.type.name: getattr(step.config, "linearised", False) for step in cell.steps()}
    assert {"surgery_curve", "agreement", "reprobed_curve", "test_task"} <= set(told)
    assert {name for name, linear in told.items() if not linear} == {
        "choose_scale",
        "heatmap_errors",
        "gains",
        "pick_head",
        "probe_task",
    }


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("methods: [task_arithmetic, fisher]", "'fisher' measures layers or gradients"),
        ("backbones: [{address: 'lab:random', batch_norm: reestimated}]", "keeps its statistics"),
        ("tasks: [{address: 'lab:greek', finetuned: a.safetensors}]", "not one of a linearised encoder"),
        ("lora: {rank: 2}", "does not run the regime lora"),
        ("negation: {forget: a, control: a}", "cannot be forgotten and be the control"),
        ("negation: {forget: a, control: b, scales: '-1:1:0.5'}", "0 or more"),
    ],
)
def test_what_a_study_cannot_do_is_told(more: str, told: str) -> None:
    known = {"backbones": "backbones: ['lab:random']", "tasks": "tasks: ['lab:greek']"}
    lines = [line for key, line in known.items() if not more.startswith(key)]
    with pytest.raises(TaskvecError, match=told):
        parse_study("\n".join([*lines, "regimes: [linearised]", more]), "s")
