"""Which encoders a GPU trains as CUDA graphs, and which it compiles: rules, whose answers need no GPU."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from helpers.encoders import TinyEncoder

from taskvec.core.notes import listen
from taskvec.core.settings import Finetune
from taskvec.encoders.backbone import Backbone, linearised
from taskvec.learning import finetuning
from taskvec.learning.heads import random_head

LONG = Finetune(steps=finetuning.COMPILED_STEPS)


@pytest.fixture
def large(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """Return an encoder that says it is on a GPU, and is larger than those that are trained as graphs."""
    monkeypatch.setattr(finetuning, "GRAPHED", backbone.pretrained.flat.numel() - 1)
    monkeypatch.setattr(finetuning.importlib.util, "find_spec", lambda name: name == "triton" or None)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "gcc" else None)
    backbone.module.eval()
    return replace(backbone, device="cuda")


def pays(backbone: Backbone, settings: Finetune = LONG, kind: str = "classification") -> bool:
    head = random_head(6, 3, 0, kind)
    return finetuning.pays_to_compile(backbone, backbone.module, [head], settings)


def test_a_small_encoder_is_a_graph_and_a_large_one_is_compiled_for_many_steps(
    backbone: Backbone, large: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pays(large)
    assert not finetuning.graphed(large)
    assert not pays(large, Finetune(steps=finetuning.COMPILED_STEPS - 1))
    assert not pays(replace(large, device="cpu"))
    assert not pays(large, kind="segmentation")
    assert not pays(linearised(large))
    large.module.train()  # batch norm would see a pass that is no step
    assert not pays(large)
    monkeypatch.setattr(finetuning, "GRAPHED", large.pretrained.flat.numel())
    assert finetuning.graphed(large)
    assert not finetuning.graphed(linearised(large))
    large.module.eval()
    assert not pays(large)


@pytest.mark.parametrize("lacking", ["triton", "gcc"])
def test_nothing_is_compiled_without_a_compiler(large: Backbone, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    if lacking == "gcc":
        monkeypatch.setattr(shutil, "which", lambda _: None)
    else:
        monkeypatch.setattr(finetuning.importlib.util, "find_spec", lambda _: None)
    assert not pays(large)


@pytest.mark.parametrize("fails", [True, False])
def test_an_encoder_that_cannot_be_compiled_is_trained_as_it_is(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    module = TinyEncoder()
    calls = []

    def compiled(call: object, dynamic: bool) -> object:
        def run(*inputs: torch.Tensor) -> torch.Tensor:
            calls.append(dynamic)
            if fails:
                raise RuntimeError("no kernel for this\nand more")
            return call(*inputs)  # type: ignore[operator]

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    other = torch.ones(6, requires_grad=True)
    with listen() as notes:
        loss = lambda images: (module(images) * other).sum()  # noqa: E731
        finetuning.compile_encoder(module, loss, torch.rand(4, 3, 8, 8), [other], "cpu")  # type: ignore[arg-type]
    assert calls == [False]
    assert notes == ["the encoder is trained as it is, since it cannot be compiled: no kernel for this"] * fails
    assert all(parameter.grad is None for parameter in (*module.parameters(), other))
    module(torch.rand(4, 3, 8, 8))
    assert len(calls) == (1 if fails else 2)
