"""A kept encoder on a GPU: opened without random weights, uploaded once, moved and shared as on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from taskvec.encoders.backbone import load_backbone
from taskvec.encoders.records import read_backbone, write_backbone
from taskvec.study import artifacts
from taskvec.weights import vectors
from taskvec.weights.flat import open_saved, save

pytestmark = pytest.mark.cuda


def test_an_encoder_opened_on_a_gpu_is_the_one_that_was_kept(tmp_path: Path) -> None:
    backbone = load_backbone("lab:random", device="cpu")
    write_backbone(backbone, tmp_path)
    opened = read_backbone(tmp_path, "cuda")
    assert opened.pretrained.flat.is_cuda
    assert torch.equal(opened.pretrained.flat.cpu(), backbone.pretrained.flat)
    assert opened.pretrained.flat.data_ptr() != opened.bound.flat.data_ptr()
    assert all(tensor.is_cuda for tensor in (*opened.module.parameters(), *opened.module.buffers()))
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    assert torch.allclose(opened.features(images).cpu(), backbone.features(images), atol=1e-2)
    with opened.at():
        vectors.move(opened.bound, opened.pretrained, [opened.pretrained], [1.0])
        assert torch.equal(next(opened.module.parameters()).cpu(), 2 * next(backbone.module.parameters()))
    assert torch.equal(opened.bound.flat, opened.pretrained.flat)


def test_saved_weights_are_uploaded_and_shared_steps_hold_one_encoder(tmp_path: Path) -> None:
    backbone = load_backbone("lab:random", device="cpu")
    write_backbone(backbone, tmp_path)
    artifacts.close()
    config = artifacts.OnDevice(device="cuda")
    first, again = (artifacts.open_backbone({"backbone": tmp_path}, config) for _ in range(2))
    assert first.module is again.module
    moved = first.pretrained.with_flat(first.pretrained.flat * 2)
    save(moved, tmp_path / "moved.safetensors")
    opened = open_saved(tmp_path / "moved.safetensors", first.pretrained, "cuda")
    assert torch.equal(opened.flat, moved.flat)
    assert opened.flat.is_cuda
    artifacts.close()
