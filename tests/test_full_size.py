"""The architectures of the paper's checkpoints at full size, each written by its own library: `pytest -m slow`.

Weights are seeded and random. What the library computes from its file and what our address gives are the same to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from taskvec.addresses import PAPER
from taskvec.backbones import load_backbone
from taskvec.images import normalise

pytestmark = pytest.mark.slow
Features = Callable[[torch.Tensor], torch.Tensor]


def by_timm(name: str, classes: int, folder: Path) -> tuple[Path, Features]:
    import timm

    model = timm.create_model(name, num_classes=classes).eval()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors", lambda x: model.forward_features(x)[:, 0]


def by_transformers(model: str, config: str, folder: Path, **options: Any) -> tuple[Path, Features]:
    import transformers

    made = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    made.save_pretrained(folder)
    encoder = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    return folder, lambda x: encoder(x).last_hidden_state[:, 0]


def by_open_clip(name: str, folder: Path) -> tuple[Path, Features]:
    import open_clip

    model = open_clip.create_model(name, pretrained=None).eval()
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "w.pt")
    return folder / "w.pt", model.encode_image


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ROWS: dict[str, tuple[Callable[[Path], tuple[Path, Features]], int]] = {
    "vit-b16-in1k": (lambda folder: by_timm("vit_base_patch16_224.augreg_in1k", 1000, folder), 768),
    "vit-b16-in21k": (lambda folder: by_timm("vit_base_patch16_224.augreg_in21k", 21843, folder), 768),
    "vit-b16-mae": (lambda folder: by_transformers("ViTMAEForPreTraining", "ViTMAEConfig", folder), 768),
    "vit-b16-dino": (lambda folder: by_timm("vit_base_patch16_224.dino", 0, folder), 768),
    "vit-b16-clip-400m": (lambda folder: by_open_clip("ViT-B-16", folder), 512),
    "vit-b16-clip-2b": (lambda folder: by_open_clip("ViT-B-16", folder), 512),
    "vit-l16-in21k": (lambda folder: by_transformers("ViTModel", "ViTConfig", folder, **LARGE), 1024),
    "vit-l14-clip-2b": (lambda folder: by_open_clip("ViT-L-14", folder), 768),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("row", PAPER)
def test_features_are_the_librarys_own_at_full_size(tmp_path: Path, row: str) -> None:
    torch.manual_seed(0)
    write, width = ROWS[row]
    path, features = write(tmp_path)
    backbone = load_backbone(f"paper:{row}@{path}", allow_pickle=True)
    assert (backbone.width, backbone.preprocessing.size) == (width, 224)
    assert (backbone.preprocessing.mean, backbone.preprocessing.std) == (PAPER[row].mean, PAPER[row].std)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8)
    with torch.inference_mode():
        want = features(normalise(torch.from_numpy(images), backbone.preprocessing, "cpu"))
    assert torch.allclose(backbone.features(images), want, atol=1e-5)
