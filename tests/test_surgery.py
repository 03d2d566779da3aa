"""Representation surgery and the agreement of features: laws, and an independent reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec.core.settings import Surgery
from taskvec.data.tasks import Task
from taskvec.encoders.backbone import Backbone
from taskvec.evaluation.alignment import alignment_curves, linear_cka
from taskvec.learning.heads import random_head, read_heads, save_heads
from taskvec.learning.surgery import fit_surgery

FEATURES = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))


def reference(x: np.ndarray, y: np.ndarray) -> float:
    """Centred kernel alignment from its definition, by kernels of images."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = (centre @ (z @ z.T) @ centre for z in (x, y))
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.floats(0.01, 100), st.floats(-5, 5))
def test_agreement_is_blind_to_rotation_scale_and_shift(seed: int, factor: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(20, 6, generator=generator).double(), torch.randn(20, 4, generator=generator).double()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator).double()).Q
    found = linear_cka(x, y)
    assert 0 <= found <= 1
    assert found == pytest.approx(reference(x.numpy(), y.numpy()), abs=1e-9)
    assert linear_cka(factor * (x @ rotation) + shift, y) == pytest.approx(found, abs=1e-9)
    assert linear_cka(x @ rotation, x) == pytest.approx(1, abs=1e-9)


def test_what_does_not_vary_agrees_with_nothing() -> None:
    assert linear_cka(torch.ones(5, 3), FEATURES[:5]) == 0


def test_agreement_is_one_where_the_merge_is_the_fine_tuned_encoder(backbone: Backbone, tasks: list[Task]) -> None:
    generator = torch.Generator().manual_seed(1)
    vector = backbone.pretrained.with_flat(torch.randn(backbone.pretrained.flat.shape, generator=generator) / 5)
    tuned = backbone.pretrained.with_flat(backbone.pretrained.flat + vector.flat)
    values = alignment_curves(backbone, vector, tuned, tasks[0].train.images, [0.0, 0.5, 1.0])["agreement"]
    assert values[2] == pytest.approx(1, abs=1e-6)
    assert values[0] < values[2]
    assert torch.equal(backbone.bound.flat, backbone.pretrained.flat)


def test_surgery_brings_features_nearer_and_keeps_the_head() -> None:
    head = random_head(8, 3, 0)
    wanted = FEATURES - torch.relu(FEATURES @ torch.randn(8, 2, generator=torch.Generator().manual_seed(2)))[:, :1]
    rules = Surgery(rank=4, steps=200, learning_rate=0.01)
    [found] = fit_surgery(FEATURES[None], wanted, head, rules, 0)
    before, after = (float((z - wanted).abs().mean()) for z in (FEATURES, found.corrected(FEATURES)))
    assert after < 0.7 * before
    assert torch.equal(found.weight, head.weight)
    [again] = fit_surgery(FEATURES[None], wanted, head, rules, 0)
    assert torch.equal(again.logits(FEATURES), found.logits(FEATURES))
    assert torch.allclose(found.logits(FEATURES), head.logits(found.corrected(FEATURES)))


def test_where_nothing_differs_nothing_is_corrected() -> None:
    head = random_head(8, 3, 0)
    [found] = fit_surgery(FEATURES[None], FEATURES, head, Surgery(rank=4, steps=5), 0)
    assert torch.equal(found.logits(FEATURES), head.logits(FEATURES))


def test_corrections_of_several_scales_equal_each_alone() -> None:
    head, rules = random_head(8, 3, 0), Surgery(rank=4, steps=20, learning_rate=0.01)
    seen = torch.stack([FEATURES, FEATURES.flip(0), 3 * FEATURES.roll(1, 0)])
    together = fit_surgery(seen, FEATURES, head, rules, 0)
    for corrected, scale in zip(together, seen, strict=True):
        [alone] = fit_surgery(scale[None], FEATURES, head, rules, 0)
        assert torch.allclose(corrected.corrected(scale), alone.corrected(scale), atol=1e-5)


def test_corrections_are_kept_with_their_heads(tmp_path: Path) -> None:
    plain = random_head(8, 3, 0)
    [found] = fit_surgery(FEATURES[None], FEATURES.flip(0), random_head(8, 3, 1), Surgery(steps=3), 0)
    save_heads({"plain": plain, "found": found}, tmp_path / "heads.safetensors")
    read = read_heads(tmp_path / "heads.safetensors")
    assert read["plain"].down is None
    assert torch.equal(read["found"].logits(FEATURES), found.logits(FEATURES))
    assert not torch.equal(read["found"].logits(FEATURES), random_head(8, 3, 1).logits(FEATURES))
