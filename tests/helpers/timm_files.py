"""Files of timm models, and a pre-trained encoder beside a classifier that was fine-tuned from it."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn


def classifier(model: str, classes: int, seed: int) -> nn.Module:
    """Make one of timm's test models at 32 px."""
    torch.manual_seed(seed)
    size = {"img_size": 32} if "vit" in model else {}
    return timm.create_model(model, num_classes=classes, **size).eval()


def moved(module: nn.Module, distance: float = 0.02) -> nn.Module:
    """Move all floating-point entries a little, as fine-tuning does."""
    generator = torch.Generator().manual_seed(7)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value += distance * torch.randn(value.shape, generator=generator).abs()
    return module


def write(module: nn.Module, path: Path) -> None:
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, path)


def prepare(data: Path, model: str = "test_vit", classes: int = 3) -> nn.Module:
    """Write a pre-trained encoder and a classifier that was fine-tuned from it, and return the classifier."""
    start = classifier(model, classes, seed=1)
    write(start, data / "pre.safetensors")
    tuned = moved(start)
    write(tuned, data / "tuned.safetensors")
    return tuned


VIT = "vit_tiny_patch16_224"


def timm_file(folder: Path, name: str, classes: int = 7, **options: object) -> tuple[Path, torch.nn.Module]:
    """Write a timm model with seeded random weights, classifier and all, as timm itself saves it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes, **options).eval()
    for buffer in (b for n, b in model.named_buffers() if n.endswith("running_mean")):
        buffer.normal_()
    path = folder / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path, model
