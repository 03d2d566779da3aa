"""Shared fixtures: tiny encoders and tasks, made in memory."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from taskvec.data.images import Preprocessing
from taskvec.data.tasks import Split, Task
from taskvec.encoders.backbone import Backbone, assemble

torch.set_num_threads(1)


class TinyEncoder(nn.Module):
    """A two-layer encoder with batch norm, so that it has float and integer buffers, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 4, stride=4)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.third.weight = self.second.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(images)).relu().mean((2, 3))
        return self.third(self.second(hidden).tanh())


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return assemble("tiny", TinyEncoder(), Preprocessing(size=8), {"family": "tiny", "options": {}}, "cpu")


def colour_task(name: str, classes: int, seed: int, counts: tuple[int, int, int] = (60, 24, 24)) -> Task:
    """Make a learnable task: each class is a colour with noise."""
    generator = np.random.default_rng(seed)
    colours = generator.integers(30, 226, (classes, 3))

    def split(count: int) -> Split:
        labels = np.arange(count) % classes
        noise = generator.integers(-25, 26, (count, 3, 8, 8))
        return Split((colours[labels][:, :, None, None] + noise).clip(0, 255).astype(np.uint8), labels.astype(np.int64))

    return Task(name, tuple(f"c{i}" for i in range(classes)), *(split(count) for count in counts))


@pytest.fixture
def tasks() -> list[Task]:
    return [colour_task("warm", 3, 1), colour_task("cold", 5, 2)]


def write_folder_task(
    root: Path, classes: tuple[str, ...] = ("ant", "bee", "cow"), train: int = 12, test: int = 4
) -> Path:
    """Write a task of class folders: every class is a colour with noise."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for index, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                base = np.full((20, 26, 3), 40 + 80 * index) + generator.integers(-30, 31, (20, 26, 3))
                Image.fromarray(base.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")
    return root
