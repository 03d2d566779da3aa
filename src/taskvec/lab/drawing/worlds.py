"""The lab's tasks by name: eight of one class an image, their classes, fonts and looks, and those of ``scenes``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64, Shaped, UInt8
from torch import Generator, Tensor

from taskvec.core.compute import threads
from taskvec.core.errors import TaskvecError, unknown
from taskvec.core.task_types import CLASSIFICATION
from taskvec.lab.drawing.glyphs import (
    CAPITALS,
    DEJAVU_MONO,
    DEJAVU_SANS,
    DEJAVU_SERIF,
    STIX,
    TEXT_FONTS,
    MaskTable,
    caption,
    font_masks,
    mask_table,
)
from taskvec.lab.drawing.looks import IMAGE_SIZE, Look, compose, paint, stream
from taskvec.lab.drawing.scenes import SCENES
from taskvec.lab.drawing.textures import FIELDS, texture_ink

SPLITS = ("train", "test")
VERSION = 1
"""The version of the drawing: raise it when the same task, split, count and seed would give other images."""
CHUNK = 500
"""Images that are drawn at a time."""
TEST_DIGITS = 500
"""Handwritten digits in the test split; the other 1297 are to train."""

LETTERS = CAPITALS + tuple(range(0x61, 0x7B))
FAMILIES = {
    "DejaVu Sans": DEJAVU_SANS[:2],
    "DejaVu Sans Mono": DEJAVU_MONO[:2],
    "DejaVu Serif": DEJAVU_SERIF[:2],
    "STIX General": STIX[:2],
    "STIX General Italic": STIX[2:],
    "Computer Modern Sans": ("cmss10",),
    "Computer Modern Typewriter": ("cmtt10",),
    "Computer Modern Italic": ("cmti10",),
}
"""The classes of the task ``fonts``."""


@dataclass(frozen=True)
class Script:
    """A task whose classes are code points."""

    code_points: tuple[int, ...]
    look: Look


STREET_LOOK = Look(
    turn=12, shear=0.15, shrink=0.4, stretch=0.15, shift=0.15, weight=0.5, outline=0.6, warp=0.04, fade=0.65,
    colour=0.35, dark=0.5, gradient=0.3, texture=0.1, clutter=1.0, blur=0.6, noise=0.05
)  # fmt: skip
GREEK_LOOK = Look(
    turn=10, shear=0.15, shrink=0.5, stretch=0.15, shift=0.2, weight=0.6, hatch=1.0, warp=0.05, fade=0.65,
    colour=0.05, dark=1.0, gradient=0.2, texture=0.04, blur=1.0, noise=0.08
)  # fmt: skip
CHALK_LOOK = Look(
    turn=12, shear=0.2, shrink=0.35, stretch=0.15, shift=0.12, weight=0.6, warp=0.06, fade=0.4, colour=0.08,
    gradient=0.1, texture=0.05, occlusion=0.5, blur=0.4, noise=0.12
)  # fmt: skip
ARMENIAN_LOOK = Look(
    turn=12, shear=0.15, shrink=0.35, stretch=0.15, shift=0.15, weight=0.5, outline=0.5, hatch=0.8, warp=0.04,
    fade=0.55, colour=0.5, dark=0.5, gradient=0.2, texture=0.16, blur=0.5, noise=0.05
)  # fmt: skip
SIGNS_LOOK = Look(
    turn=12, shear=0.1, shrink=0.5, stretch=0.1, shift=0.15, weight=0.5, outline=0.5, hatch=0.6, warp=0.04, fade=0.6,
    colour=0.4, dark=0.5, gradient=0.2, texture=0.15, disc=1.0, blur=0.8, noise=0.06
)  # fmt: skip
FONTS_LOOK = Look(turn=4, shrink=0.2, shift=0.08, fade=0.4, colour=0.3, dark=0.5, gradient=0.1, blur=0.2, noise=0.03)
TEXTURES_LOOK = Look(fade=0.7, colour=0.4, dark=0.5, gradient=0.3, occlusion=0.2, blur=0.6, noise=0.15)

SCRIPTS = {
    "street": Script(CAPITALS, STREET_LOOK),
    "greek": Script(tuple(cp for cp in range(0x3B1, 0x3CA) if cp != 0x3C2), GREEK_LOOK),
    "chalk": Script(tuple(range(0x410, 0x430)), CHALK_LOOK),
    "armenian": Script(tuple(range(0x531, 0x557)), ARMENIAN_LOOK),
    "signs": Script(
        (*range(0x2190, 0x219A), *range(0x21B0, 0x21B4), 0x21B6, 0x21B7, 0x21BA, 0x21BB, *range(0x21D0, 0x21D6)),
        SIGNS_LOOK,
    ),
}
"""The tasks whose classes are code points, drawn in every text font."""

DESCRIPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "digits": "handwritten digits, light on dark: scikit-learn's 1797 real images, enlarged",
        "street": "Latin capitals in any colour on cluttered ground",
        "greek": "Greek small letters, dark blurred print on light paper",
        "chalk": "Cyrillic capitals, light and grainy on dark, often crossed out",
        "armenian": "Armenian capitals in strong colours on blotches",
        "signs": "arrows in discs",
        "fonts": "which of eight type faces, whatever the letter",
        "textures": "sixteen procedural textures",
        **{name: scene.description for name, scene in SCENES.items()},
    }
)
"""The description of every task by name."""
TASKS: tuple[str, ...] = tuple(name for name in DESCRIPTIONS if name not in SCENES)
"""The tasks with a class an image."""


def task_code_points() -> frozenset[int]:
    """Return every code point whose shape some task shows, the decimal digits included."""
    drawn = {code_point for script in SCRIPTS.values() for code_point in script.code_points}
    return frozenset(drawn | set(LETTERS) | set(range(0x30, 0x3A)))


@cache
def task_masks(task: str) -> MaskTable:
    """Draw the masks of every class of a task that shows glyphs."""
    if task == "fonts":
        return mask_table([font_masks(LETTERS, fonts) for fonts in FAMILIES.values()])
    return mask_table([font_masks([code_point], TEXT_FONTS) for code_point in SCRIPTS[task].code_points])


def classes(task: str) -> list[str]:
    """Return the class names of a task in the order of its labels; glyphs go by their Unicode names."""
    check_task(task)
    if task in SCENES:
        return list(SCENES[task].classes)
    if task in SCRIPTS:
        return [caption(code_point) for code_point in SCRIPTS[task].code_points]
    return {"digits": [str(digit) for digit in range(10)], "fonts": list(FAMILIES), "textures": list(FIELDS)}[task]


def captions(task: str) -> list[str] | None:
    """Return a caption for each class of a task, in label order; None where classes have no Unicode name."""
    if task == "digits":
        return [caption(ord(digit)) for digit in classes(task)]
    return classes(task) if task in SCRIPTS else None


def kind(task: str) -> str:
    """Return the kind of a task: classification, but for the scenes."""
    check_task(task)
    return SCENES[task].kind if task in SCENES else CLASSIFICATION


def packages(task: str) -> tuple[str, ...]:
    """Return the packages whose version may change a task's images: fonts are matplotlib's, digits scikit-learn's."""
    check_task(task)
    return ("torch", {"textures": "numpy", "digits": "scikit-learn"}.get(task, "matplotlib"))


def check_task(task: str) -> None:
    """Raise with the nearest names if the lab has no such task."""
    if task not in DESCRIPTIONS:
        raise unknown("lab task", task, DESCRIPTIONS)


def draw_batch(task: str, labels: Int64[Tensor, " batch"], generator: Generator) -> UInt8[Tensor, "batch 3 32 32"]:
    """Draw one image of each label of a drawn task (every task but ``digits``)."""
    if task == "textures":
        ink = texture_ink(labels, generator)
        return compose(ink, torch.zeros_like(ink), TEXTURES_LOOK, generator)
    look = FONTS_LOOK if task == "fonts" else SCRIPTS[task].look
    return paint(task_masks(task).pick(labels, generator), look, generator)


@cache
def handwritten_digits() -> Any:
    """Return scikit-learn's 1797 digits: images of 8 x 8 pixels and 17 greys, with their labels."""
    from sklearn.datasets import load_digits

    return load_digits()


@cache
def digit_split() -> dict[str, Int64[np.ndarray, " images"]]:
    """Return the indices of 1297 handwritten digits to train and 500 to test, divided by class and a fixed seed."""
    from sklearn.model_selection import train_test_split

    target = handwritten_digits().target
    train, test = train_test_split(np.arange(len(target)), test_size=TEST_DIGITS, stratify=target, random_state=0)
    return {"train": train, "test": test}


def digit_sources(split: str, count: int, seed: int) -> Int64[np.ndarray, " images"]:
    """Return the indices of up to ``count`` of a split's digits in random order, balanced over the classes."""
    indices = digit_split()[split]
    indices = indices[torch.randperm(len(indices), generator=stream("digits", split, count, seed)).numpy()]
    target = handwritten_digits().target[indices]
    turn = np.array([(target[:place] == label).sum() for place, label in enumerate(target)])
    chosen: Int64[np.ndarray, " images"] = indices[np.argsort(turn, kind="stable")[:count]]
    return chosen


def draw_digits(split: str, count: int, seed: int) -> tuple[UInt8[Tensor, "images 3 32 32"], Int64[Tensor, " images"]]:
    """Enlarge handwritten digits of 8 x 8 pixels and 17 greys to the lab's images, light on dark."""
    digits, sources = handwritten_digits(), digit_sources(split, count, seed)
    small = torch.from_numpy(digits.images[sources]).float()[:, None] / 16
    large = F.interpolate(small, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    grey = (large.clamp(0, 1) * 255).round().to(torch.uint8)
    return grey.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(digits.target[sources]).long()


def draw_glyphs(
    task: str, split: str, count: int, seed: int
) -> tuple[UInt8[Tensor, "count 3 32 32"], Int64[Tensor, " count"]]:
    """Draw a balanced sample of a drawn task in a random order, a chunk at a time."""
    generator = stream(task, split, count, seed)
    labels = torch.arange(count) % len(classes(task))
    labels = labels[torch.randperm(count, generator=generator)]
    images = [draw_batch(task, chunk, generator) for chunk in labels.split(CHUNK)]
    return torch.cat(images), labels


def draw_scenes(task: str, split: str, count: int, seed: int) -> tuple[UInt8[Tensor, "count 3 32 32"], Tensor]:
    """Draw a task of ``scenes``, a chunk at a time."""
    generator = stream(task, split, count, seed)
    chunks = [SCENES[task].draw(min(CHUNK, count - start), generator) for start in range(0, count, CHUNK)]
    images, labels = zip(*chunks, strict=True)
    return torch.cat(images), torch.cat(labels)


def draw(
    task: str, split: str, count: int, seed: int = 0
) -> tuple[UInt8[np.ndarray, "count 3 32 32"], Shaped[np.ndarray, "count ..."]]:
    """Draw ``count`` labelled images of a task's ``train`` or ``test`` split, the same ones for the same arguments.

    Neither torch's global generator nor its number of threads matters. No image is in both splits: drawn tasks share
    glyphs and fonts between them but no random stream; ``digits`` has 1297 images to train and 500 others to test, and
    returns no more. An unknown task or split raises ``TaskvecError``.
    """
    check_task(task)
    if split not in SPLITS:
        raise unknown("lab split", split, SPLITS)
    if count < 1:
        raise TaskvecError(f"cannot draw {count} images of '{task}'", "ask for one or more")
    with threads(1):
        drawing = draw_digits if task == "digits" else partial(draw_scenes if task in SCENES else draw_glyphs, task)
        images, labels = drawing(split, count, seed)
    return images.numpy(), labels.numpy()
