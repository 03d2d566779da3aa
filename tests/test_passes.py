"""Passes: batches by rule, features that batches do not change, memory that is short, graphs of batches."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from taskvec.core.errors import TaskvecError
from taskvec.core.notes import listen
from taskvec.data.images import Preprocessing, normalise
from taskvec.encoders import backbone as backbones
from taskvec.encoders import passes
from taskvec.encoders.backbone import Backbone, linearised
from taskvec.encoders.passes import FEWEST, LARGEST, MOST, Recorded, images_per_batch, is_small


def pixels(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def test_an_array_and_a_tensor_give_equal_bits(backbone: Backbone) -> None:
    images = pixels(9)
    assert torch.equal(backbone.features(images), backbone.features(torch.from_numpy(images)))


@pytest.mark.parametrize("size", [1, 2, 5, 11])
def test_the_size_of_batches_changes_no_more_than_rounding(backbone: Backbone, size: int) -> None:
    images = pixels(11)
    torch.testing.assert_close(backbone.features(images, size), backbone.features(images), rtol=1e-5, atol=1e-6)


def test_float16_is_near_float32_and_features_are_float32(backbone: Backbone) -> None:
    images = pixels(5)
    exact = backbone.features(images)
    backbone.precision = "float16"
    features = backbone.features(images)
    assert features.dtype == torch.float32
    assert not torch.equal(features, exact)
    torch.testing.assert_close(features, exact, rtol=1e-2, atol=1e-2)


def test_float16_sees_the_encoder_move(backbone: Backbone) -> None:
    backbone.precision, images = "float16", pixels(3)
    before = backbone.features(images)
    with backbone.at():
        backbone.bound.flat.mul_(1.5)
        assert not torch.equal(backbone.features(images), before)
    assert torch.equal(backbone.features(images), before)


class Casts(TorchDispatchMode):
    """Remembers the shapes of tensors that are cast."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype):
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


def test_a_pass_casts_every_weight_once(backbone: Backbone) -> None:
    backbone.precision = "float16"
    with Casts() as casts:
        backbone.features(pixels(9), batch_size=2)
    assert casts.shapes.count(tuple(backbone.module.first.weight.shape)) == 1
    assert casts.shapes.count((6, 6)) == 1  # of two layers, whose weights are tied
    assert casts.shapes.count((2, 3, 8, 8)) >= 4  # pixels of four batches


@given(seed=st.integers(0, 99))
@settings(max_examples=5)
def test_normalised_pixels_are_those_of_the_formula(seed: int) -> None:
    to = Preprocessing(8, mean=(0.1, 0.4, 0.6), std=(0.2, 0.3, 0.9))
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (to.mean, to.std))
    assert torch.equal(normalise(images, to, "cpu"), (images.to(torch.float32) / 255 - mean) / std)


class Wide(nn.Module):
    """A module whose largest output has so many numbers an image."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), self.numbers)


@pytest.mark.parametrize(
    ("numbers", "count"),
    [(1, MOST), (LARGEST // 4 // 700, 512), (197 * 3072, 256), (257 * 4096, 128), (LARGEST, FEWEST)],
)
def test_batches_are_as_large_as_activations_allow(numbers: int, count: int) -> None:
    module = nn.Sequential(Wide(numbers), nn.Flatten())
    assert images_per_batch(module, module, 8, "cpu") == count
    assert not passes.has_hooks(module)


def test_memory_that_is_short_halves_batches_with_a_note(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def collect(look: Any, images: Any, size: int, *how: Any) -> str:
        tried.append(size)
        if size > 16:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return "features"

    monkeypatch.setattr(backbones, "collect", collect)
    monkeypatch.setattr(backbones.Backbone, "planned_pass", lambda self, size, patch: (None, size or self.passes.size))
    backbone.passes.size = 64
    with listen() as notes:
        assert Backbone.features.__wrapped__(backbone, pixels(2)) == "features"  # type: ignore[attr-defined]
    assert tried == [64, 32, 16]
    assert notes == [f"out of memory on cpu: {size} images a batch from here on" for size in (32, 16)]
    with pytest.raises(TaskvecError, match="out of memory on cpu with 40 images a batch"):
        Backbone.features.__wrapped__(backbone, pixels(2), 40)  # type: ignore[attr-defined]


class Graph:
    """A CUDA graph that computes anew what was captured."""

    made: list[Graph] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.replays = 0
        self.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        recorded = self.recorded
        recorded.features.copy_(recorded.look(recorded.pixels))

    recorded: Any = None


@pytest.fixture
def recorded(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A small encoder's pass on a device that is made up, with graphs of four images."""
    recorded = Recorded(lambda batch: backbone.look(False, "float32", batch, cache=False), backbone.module, 4)

    def capture(self: Recorded, batch: torch.Tensor) -> None:
        graph = Graph()
        graph.recorded, self.graph, self.features = self, graph, self.look(batch)  # type: ignore[assignment]

    monkeypatch.setattr(Recorded, "capture", capture)
    Graph.made.clear()
    return recorded


@torch.no_grad()
def test_a_graph_takes_over_and_gives_the_same(backbone: Backbone, recorded: Recorded) -> None:
    images = torch.from_numpy(pixels(4))
    backbone.module.eval()
    features = [recorded(images[: 1 + index % 4]).clone() for index in range(passes.EAGER + 5)]
    assert len(Graph.made) == 1
    assert Graph.made[0].replays == 5
    expected = backbone.features(images)
    assert all(torch.allclose(part, expected[: len(part)], atol=1e-6) for part in features)
    backbone.bound.flat.mul_(1.5)
    assert torch.allclose(recorded(images), backbone.features(images), atol=1e-6)


@torch.no_grad()
def test_what_listens_to_layers_hears_every_batch(backbone: Backbone, recorded: Recorded) -> None:
    images, heard = torch.from_numpy(pixels(4)), []
    for _ in range(passes.EAGER + 2):
        recorded(images)
    with backbone.module.second.register_forward_hook(lambda *_: heard.append(1)):
        recorded(images)
    assert heard == [1]


def test_a_capture_that_fails_is_noted(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(passes, "capturing", fail)
    recorded = Recorded(lambda batch: batch.flatten(1).float(), backbone.module, 4)
    with listen() as notes:
        for _ in range(passes.EAGER + 3):
            assert recorded(torch.ones(2, 3, 1, 1, dtype=torch.uint8)).shape == (2, 3)
    expected = "no CUDA graph of a TinyEncoder, which runs as before: operation not permitted when stream is capturing"
    assert notes == [expected]


def test_small_is_the_lab_and_not_what_users_bring(backbone: Backbone) -> None:
    assert is_small(backbone.module)
    assert not is_small(nn.Linear(2**11, 2**11))  # with its bias, more than 2**22


def test_copies_that_share_the_module_share_its_passes_but_linearised_ones(backbone: Backbone) -> None:
    backbone.passes.size = 512
    assert replace(backbone, name="other").passes is backbone.passes
    assert linearised(backbone).passes.size == 0
    assert copy.deepcopy(backbone).passes.size == 0
