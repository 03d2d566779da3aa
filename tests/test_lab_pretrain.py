"""The lab's encoder and its pre-training: shapes, reproducible bytes, and the shipped files."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taskvec.errors import TaskvecError
from taskvec.lab import encoders, pretrain, worlds
from taskvec.lab.vit import VisionTransformer, sine_positions


def test_encoder_shapes() -> None:
    encoder = VisionTransformer()
    images = torch.rand(2, 3, 32, 32)
    assert encoder(images).shape == (2, 128)
    assert encoder.tokens(images).shape == (2, 16, 128)
    torch.testing.assert_close(encoder(images), encoder.tokens(images).mean(1))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 875648
    assert not any("positions" in key for key in encoder.state_dict())


def test_other_architectures_and_grids() -> None:
    encoder = VisionTransformer(size=24, patch=4, width=16, depth=2, heads=2)
    assert encoder(torch.rand(1, 3, 24, 24)).shape == (1, 16)
    assert encoder.tokens(torch.rand(1, 3, 16, 8)).shape == (1, 8, 16)
    assert VisionTransformer(**encoder.architecture).state_dict().keys() == encoder.state_dict().keys()
    with pytest.raises(ValueError, match="must divide"):
        VisionTransformer(size=30)


def test_positions_of_a_finer_grid_cover_the_same_square() -> None:
    coarse, fine = sine_positions(2, 2, 16, 4), sine_positions(6, 6, 16, 4)
    assert fine.shape == (36, 16)
    torch.testing.assert_close(fine.view(6, 6, 16)[1::3, 1::3].reshape(4, 16), coarse)
    assert len({tuple(row.tolist()) for row in fine}) == 36


def test_patches_are_cut_row_by_row() -> None:
    encoder = VisionTransformer(size=4, patch=2, width=4, depth=1, heads=1)
    image = torch.arange(48.0).view(1, 3, 4, 4)
    patches = encoder.patches(image)
    assert patches.shape == (1, 4, 12)
    torch.testing.assert_close(patches[0, 1].view(3, 2, 2), image[0, :, :2, 2:])


def test_two_short_runs_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "HELD_OUT", 64)
    shares: list[float] = []
    first = pretrain.pretrain("supervised", tmp_path / "a", steps=3, progress=shares.append)
    torch.manual_seed(5)
    second = pretrain.pretrain("supervised", tmp_path / "b", steps=3)
    other = pretrain.pretrain("supervised", tmp_path / "c", steps=3, seed=1)
    assert shares == [1 / 3, 2 / 3, 1.0]
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    assert sorted(path.name for path in first.parent.iterdir()) == ["supervised.json", "supervised.safetensors"]
    known = json.loads(first.with_suffix(".json").read_text())
    assert known["sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert known["command"] == "taskvec lab pretrain supervised --steps 3 --seed 0"
    assert math.isfinite(known["figures"]["final_loss"])


@pytest.mark.parametrize("name", pretrain.PRETRAININGS)
def test_shipped_encoder_is_the_recorded_one(name: str) -> None:
    known = encoders.record(name)
    assert hashlib.sha256(encoders.WEIGHTS.joinpath(f"{name}.safetensors").read_bytes()).hexdigest() == known["sha256"]
    assert known["steps"] == pretrain.PRETRAININGS[name].steps
    assert known["mean"] == known["std"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("name", pretrain.PRETRAININGS)
def test_shipped_encoder_tells_classes_apart(name: str) -> None:
    encoder = VisionTransformer(**encoders.options(name))
    encoder.load_state_dict(load_file(encoders.WEIGHTS / f"{name}.safetensors"))
    images, labels = worlds.draw("textures", "test", 160)
    with torch.no_grad():
        features = encoder(pretrain.normalised(torch.from_numpy(images)))
    assert features.isfinite().all()
    near = torch.cdist(features, features).fill_diagonal_(torch.inf).argmin(1)
    assert (torch.from_numpy(labels) == torch.from_numpy(labels)[near]).float().mean() > 3 / 16


def test_mistakes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(TaskvecError, match="did you mean 'supervised'"):
        pretrain.pretrain("supervized", tmp_path)
    with pytest.raises(TaskvecError, match="cannot pre-train for 0 steps"):
        pretrain.pretrain("supervised", tmp_path, steps=0)
