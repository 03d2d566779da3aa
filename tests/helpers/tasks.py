"""Tiny tasks, in memory and as folders of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from taskvec.data.tasks import Split, Task


def colour_task(name: str, classes: int, seed: int, counts: tuple[int, int, int] = (60, 24, 24)) -> Task:
    """Make a learnable task: each class is a colour with noise."""
    generator = np.random.default_rng(seed)
    colours = generator.integers(30, 226, (classes, 3))

    def split(count: int) -> Split:
        labels = np.arange(count) % classes
        noise = generator.integers(-25, 26, (count, 3, 8, 8))
        return Split((colours[labels][:, :, None, None] + noise).clip(0, 255).astype(np.uint8), labels.astype(np.int64))

    return Task(name, tuple(f"c{i}" for i in range(classes)), *(split(count) for count in counts))


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


CLASSES = ("ant", "bee", "cow")


def make_task(classes: tuple[str, ...], name: str = "one") -> Task:
    empty = Split(np.zeros((0, 3, 8, 8), np.uint8), np.zeros(0, np.int64))
    return Task(name, classes, empty, empty, empty)
