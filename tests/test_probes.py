"""Heads of several learning rates and scales as one problem: the same as each alone, and as PyTorch written out."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import taskvec as tv
from taskvec.core.notes import listen
from taskvec.core.settings import Probe, Surgery
from taskvec.core.training import Schedule, index_batches
from taskvec.data.tasks import Split, Task
from taskvec.encoders.backbone import Backbone
from taskvec.evaluation import scale_search
from taskvec.learning import heads
from taskvec.learning.batches import AHEAD, index_stream
from taskvec.learning.heads import Head, fit, joint_loss, probe, random_head, summed_loss
from taskvec.weights.flat import Weights

KINDS = ("classification", "segmentation", "regression")
RATES = (0.003, 0.01, 0.03)
SHORT = Probe(steps=30, batch_size=16, warmup=3)


def problem(kind: str, scales: int, count: int, width: int, classes: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Return random features of several scales, labels of a kind of task, and how many outputs its heads have."""
    generator = torch.Generator().manual_seed(seed)
    patches = (5,) if kind == "segmentation" else ()
    features = torch.randn(scales, count, *patches, width, generator=generator)
    if kind == "regression":
        return features, nn.functional.normalize(torch.randn(count, 2, generator=generator)), 2
    return features, torch.randint(classes, (count, *patches), generator=generator), classes


def gradients(heads: list[Head], loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for head in heads for p in (head.weight, head.bias)]))


@settings(max_examples=40)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 8),
    st.integers(2, 6),
    st.integers(0, 2**31),
)
def test_one_product_gives_the_loss_and_the_gradients_of_every_head(
    kind: str, scales: int, rates: int, count: int, width: int, classes: int, seed: int
) -> None:
    features, labels, outputs = problem(kind, scales, count, width, classes, seed)
    made = [random_head(width, outputs, seed + i, kind).on("cpu", learns=True) for i in range(scales * rates)]
    apart, joint = summed_loss(made, features, labels), joint_loss(made, features, labels)
    assert torch.allclose(joint, apart, rtol=1e-5)
    for expected, gradient in zip(gradients(made, apart), gradients(made, joint), strict=True):
        assert torch.allclose(expected, gradient, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("joint", [False, True])
def test_heads_of_all_rates_and_scales_equal_each_alone(
    monkeypatch: pytest.MonkeyPatch, kind: str, joint: bool
) -> None:
    features, labels, outputs = problem(kind, 2, 50, 8, 4, 0)
    alone = [fit(scale[None], labels, outputs, [rate], SHORT, 0, kind=kind)[0] for scale in features for rate in RATES]
    if joint:
        monkeypatch.setattr(heads, "summed_loss", joint_loss)
    together = fit(features, labels, outputs, RATES, SHORT, 0, kind=kind)
    for expected, head in zip(alone, together, strict=True):
        assert torch.allclose(expected.weight, head.weight, atol=1e-5 if joint else 0, rtol=0)
        assert torch.allclose(expected.bias, head.bias, atol=1e-5 if joint else 0, rtol=0)
        assert head.kind == kind


def test_a_probe_equals_pytorch_written_out() -> None:
    features, labels, classes = problem("classification", 1, 40, 6, 3, 1)
    layer = nn.Linear(6, classes)
    start = random_head(6, classes, 0)
    layer.load_state_dict({"weight": start.weight, "bias": start.bias})
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=SHORT.weight_decay)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, Schedule(SHORT.steps, SHORT.warmup).factor)
    for batch in itertools.islice(index_batches(40, SHORT.batch_size, 0), SHORT.steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(features[0][batch]), labels[batch]).backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        rates.step()
    probed = probe(
        features[0], labels, features[0], labels, classes, SHORT.model_copy(update={"learning_rates": RATES})
    )
    assert torch.allclose(probed.heads[1].weight, layer.weight, atol=1e-6)
    predicted = layer(features[0]).argmax(1)
    assert probed.validation[1] == pytest.approx(float((predicted == labels).double().mean()))


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 5))
def test_batches_that_are_copied_ahead_are_those_drawn(count: int, size: int, seed: int) -> None:
    steps = AHEAD + 3
    ahead = itertools.islice(index_stream(count, size, seed, "cpu:0"), steps)  # "cpu" itself copies nothing
    for batch, drawn in zip(ahead, itertools.islice(index_batches(count, size, seed), steps), strict=True):
        assert torch.equal(batch, drawn)


def test_features_that_are_not_finite_spoil_no_head() -> None:
    features, labels, classes = problem("classification", 2, 40, 6, 3, 2)
    spoilt, notes = features.clone(), []
    spoilt[1, :10, 0] = torch.tensor([torch.nan, torch.inf] * 5)
    with listen(notes.append):
        good, bad = fit(spoilt, labels, classes, [0.01], SHORT, 0)
    assert torch.equal(good.weight, fit(features[:1], labels, classes, [0.01], SHORT, 0)[0].weight)
    assert bad.weight.isfinite().all()
    assert (bad.predict(spoilt[1]) == -1).tolist() == [True] * 10 + [False] * 30
    assert "12.50% of the training features hold NaN or infinity" in notes[0]


def curves(backbone: Backbone, vector: Weights, task: Task) -> tuple[list[float], list[Head]]:
    """Return what is measured, and all heads, of re-probing and of surgery at five scales."""
    scales = [0.0, 0.1, 0.2, 0.3, 1.0]
    probed = scale_search.reprobed_curve(backbone, vector, task, 0.03, SHORT, scales)
    tuned = backbone.pretrained.with_flat(backbone.pretrained.flat + vector.flat)
    surgery, head = Surgery(rank=2, steps=5), random_head(backbone.width, len(task.classes), 0)
    corrected = scale_search.corrected_curve(backbone, vector, tuned, task, head, surgery, scales)
    return probed[0] + corrected[0], probed[1] + corrected[1]


@pytest.mark.parametrize("together", [2, 3, 8])
def test_scales_in_groups_equal_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, backbone: Backbone, tasks: list[Task], together: int
) -> None:
    vector = backbone.pretrained.with_flat(torch.randn(backbone.pretrained.flat.shape) / 5)
    values, alone = curves(backbone, vector, tasks[0])
    monkeypatch.setattr(scale_search, "scales_together", lambda *_: together)
    monkeypatch.setattr(heads, "summed_loss", joint_loss)
    grouped, fitted = curves(backbone, vector, tasks[0])
    assert grouped == pytest.approx(values, abs=2 / len(tasks[0].validation))
    for expected, head in zip(alone, fitted, strict=True):
        for part in heads.PARTS:
            if getattr(expected, part) is not None:
                assert torch.allclose(getattr(expected, part), getattr(head, part), atol=1e-4)
    assert len(fitted) == 10


def test_a_probed_head_comes_back_among_scales(
    monkeypatch: pytest.MonkeyPatch, backbone: Backbone, tasks: list[Task]
) -> None:
    monkeypatch.setattr(scale_search, "scales_together", lambda *_: 3)
    settings = SHORT.model_copy(update={"learning_rates": (0.03,)})
    vector = backbone.pretrained.with_flat(torch.ones_like(backbone.pretrained.flat))
    probed = tv.fit_head(backbone, tasks[0], settings)
    _, fitted = scale_search.reprobed_curve(backbone, vector, tasks[0], 0.03, settings, [1.0, 0.0, 0.5])
    assert torch.equal(fitted[1].weight, probed.weight)


def test_how_many_scales_share_a_gpu_follows_from_its_whole_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(total_memory=8 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    images = np.zeros((64, 3, 2, 2), np.uint8)
    plain, patches = Split(images, np.zeros(64, np.int64)), Split(images, np.zeros((64, 16), np.int64))
    assert scale_search.scales_together(plain, "classification", 256, "cuda:0") == 16
    assert scale_search.scales_together(patches, "segmentation", 256, "cuda:0") == 1
    assert scale_search.scales_together(plain, "classification", 256, "cpu") == 1
