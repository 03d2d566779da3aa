"""Passes on a GPU: features are the CPU's, graphs are what they record, the check of precision falls back."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers.encoders import Planted, TinyEncoder
from torch import Tensor, nn

from taskvec.core.compute import PassPrecision, arithmetic
from taskvec.data import uploads
from taskvec.data.images import Preprocessing
from taskvec.data.tasks import Task
from taskvec.deploy.model import MultiTaskModel
from taskvec.encoders import passes
from taskvec.encoders.backbone import Backbone, assemble, linearised
from taskvec.evaluation.precision import choose_precision
from taskvec.evaluation.scale_search import kept_curve
from taskvec.lab.vit import VisionTransformer
from taskvec.learning.heads import random_head
from taskvec.weights import vectors

pytestmark = pytest.mark.cuda
TOLERANCE: dict[PassPrecision, float] = {"float32": 5e-5, "tf32": 1e-2, "float16": 1e-2}
"""Largest difference of a feature from the CPU's, over the largest feature."""
SCALES = (0.0, 0.05, 0.5)


def pixels(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def transformer(device: str, width: int = 128) -> Backbone:
    torch.manual_seed(0)
    module = VisionTransformer(width=width)
    return assemble("lab", module, Preprocessing(size=32), {"family": "lab", "options": {}}, device)


def tiny(device: str, module: nn.Module | None = None) -> Backbone:
    torch.manual_seed(0)
    return assemble("tiny", module or TinyEncoder(), Preprocessing(size=8), {"family": "tiny", "options": {}}, device)


def difference(features: Tensor, exact: Tensor) -> float:
    return float((features.cpu() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("precision", list(TOLERANCE))
@pytest.mark.parametrize("width", [128, 768])  # one runs as a graph, the other is too large for that
@pytest.mark.parametrize("per_patch", [False, True])
def test_features_equal_the_cpus(precision: PassPrecision, width: int, per_patch: bool) -> None:
    images, backbone = pixels(40), transformer("cuda", width)
    exact = transformer("cpu", width).features(images, per_patch=per_patch)
    assert passes.is_small(backbone.module) == (width == 128)
    backbone.precision = precision
    features = backbone.features(images, per_patch=per_patch)
    assert features.device.type == "cuda"
    assert features.dtype == torch.float32
    assert difference(features, exact) < TOLERANCE[precision]


def test_convolutions_are_float32_unless_tf32_is_asked_for() -> None:
    images, exact = pixels(64, 8), tiny("cpu").features(pixels(64, 8))
    backbone = tiny("cuda")
    with arithmetic("tf32"):  # whatever stands outside
        assert difference(backbone.features(images), exact) < TOLERANCE["float32"]


def test_resident_and_streamed_images_give_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    images, backbone = pixels(300), transformer("cuda")
    kept = backbone.resident(images)
    assert isinstance(kept, Tensor)
    assert kept.device.type == "cuda"
    assert torch.equal(kept.cpu(), torch.from_numpy(images))
    streamed = images.copy()
    resident = uploads.resident_on("cuda")
    monkeypatch.setattr(resident, "budget", 0)
    assert isinstance(backbone.resident(streamed), np.ndarray)
    for size in (None, 7):
        assert torch.equal(backbone.features(streamed, size), backbone.features(kept, size))


def test_the_first_pass_over_an_array_keeps_it() -> None:
    images, backbone = pixels(300), transformer("cuda")
    first = backbone.features(images)
    assert uploads.resident_on("cuda").find(images) is not None
    assert torch.equal(backbone.features(images), first)


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_a_graph_equals_eager_and_sees_the_encoder_move(precision: PassPrecision) -> None:
    images, backbone = pixels(300), transformer("cuda")
    backbone.precision = precision
    eager = backbone.features(images)
    vector = backbone.pretrained.with_flat(0.1 * backbone.pretrained.flat)
    with backbone.at():
        vectors.move(backbone.bound, backbone.pretrained, [vector], [0.5])
        eager_moved = backbone.features(images)
    for _ in range(passes.EAGER):
        repeated = backbone.features(images)
    recorded = backbone.passes.graphs[False, precision]
    assert recorded.graph is not None
    assert torch.equal(repeated, eager)
    with backbone.at():
        vectors.move(backbone.bound, backbone.pretrained, [vector], [0.5])
        assert torch.equal(backbone.features(images), eager_moved)
    assert not torch.equal(eager_moved, eager)
    with backbone.module.register_forward_hook(lambda *_: None):
        assert torch.equal(backbone.features(images), eager)


def test_a_linearised_encoder_runs_without_a_graph() -> None:
    images, backbone = pixels(20), linearised(transformer("cuda"))
    backbone.precision = "float16"
    for _ in range(passes.EAGER + 2):
        features = backbone.features(images)
    assert not backbone.passes.graphs
    assert difference(features, linearised(transformer("cpu")).features(images)) < TOLERANCE["float32"]


def test_nothing_waits_inside_a_pass() -> None:
    backbone = transformer("cuda")
    images = backbone.resident(pixels(300))
    backbone.features(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype, it says
        torch.cuda.set_sync_debug_mode("error")
        try:
            backbone.features(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_sound_encoder_passes_in_float16(tasks: list[Task]) -> None:
    assert choose_precision(tiny("cuda"), tasks, SCALES).precision == "float16"


def test_an_overflow_falls_back(tasks: list[Task]) -> None:
    choice = choose_precision(tiny("cuda", Planted(1e6, 0.0)), tasks, SCALES)
    assert choice.precision == "tf32"
    assert choice.agreements[0].nans > 0


def test_a_disagreement_falls_back(tasks: list[Task]) -> None:
    choice = choose_precision(tiny("cuda", Planted(1.0, 30_000.0)), tasks, SCALES)
    assert choice.precision != "float16"
    assert choice.agreements[0].differing > 0.1


def test_a_search_on_the_gpu_is_the_cpus(tasks: list[Task]) -> None:
    curves = []
    for device in ("cpu", "cuda"):
        backbone = tiny(device)
        vector = backbone.pretrained.with_flat(0.3 * backbone.pretrained.flat)
        head = random_head(backbone.width, len(tasks[0].classes), 0)
        curves.append(kept_curve(backbone, vector, tasks[0], head, (0.0, 0.5, 1.0)))
    assert np.allclose(*curves, atol=1.01 / len(tasks[0].validation))  # at most one image on a border


def test_predictions_on_the_gpu_are_the_cpus() -> None:
    answers = []
    for device in ("cpu", "cuda"):
        backbone = transformer(device)
        head = random_head(backbone.width, 3, 0).on(device)
        answers.append(
            MultiTaskModel(backbone, {"task": head}, {"task": "abc"}, {}).predict([*pixels(6).transpose(0, 2, 3, 1)])
        )
    for known, other in zip(*answers, strict=True):
        assert (known.image, known.task, known.label) == (other.image, other.task, other.label)
        assert abs(known.probability - other.probability) < 1e-4
