"""The lab's tasks of other types: ``ink`` has a class for every patch, ``angle`` is the regression of a rotation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Generator, Tensor

from taskvec.lab.drawing.glyphs import (
    CAPITALS,
    DEJAVU_MONO,
    DEJAVU_SANS,
    DEJAVU_SERIF,
    MASK_SIZE,
    STIX,
    MaskTable,
    font_masks,
    mask_table,
)
from taskvec.lab.drawing.looks import Look, compose, paint, place, stray_ink, uniform

PATCH = 8
"""Height and width of a labelled patch, in pixels: that of the lab's encoders."""
COVERED = 1 / 8
"""Share of a patch that has to be glyph or clutter, whichever is more, for the patch not to be ground."""
STRAYS = 3
"""Stray glyphs at the edges of an image of ``ink``."""
UPRIGHT = DEJAVU_SANS[:2] + DEJAVU_MONO[:2] + DEJAVU_SERIF[:2] + STIX[:2]
"""Fonts without slant."""
TURNABLE = tuple(map(ord, "FGKPR"))
"""Letters that look like themselves and one another at no angle but their own."""
ROOM = 1.25
"""The factor by which a letter is drawn smaller, so that its corners stay inside when it is turned."""

INK_LOOK = Look(
    turn=12, shear=0.15, shrink=0.5, stretch=0.15, shift=0.2, weight=0.5, outline=0.4, warp=0.04, fade=0.65,
    colour=0.35, dark=0.5, gradient=0.3, texture=0.1, clutter=1.0, blur=0.6, noise=0.05
)  # fmt: skip
ANGLE_LOOK = Look(
    shrink=0.35, shift=0.15, weight=0.5, outline=0.3, hatch=0.6, warp=0.03, fade=0.6, colour=0.4, dark=0.5,
    gradient=0.2, texture=0.12, blur=0.8, noise=0.06
)  # fmt: skip
Drawn = tuple[UInt8[Tensor, "count 3 32 32"], Tensor]


@cache
def letters(code_points: tuple[int, ...]) -> MaskTable:
    """Draw the masks of every letter in the upright fonts."""
    return mask_table([font_masks([code_point], UPRIGHT) for code_point in code_points])


def pick_letters(code_points: tuple[int, ...], count: int, generator: Generator) -> Float[Tensor, "count 40 40"]:
    """Choose letters at random, each in a font at random, and return their ink, 0 to 1."""
    return letters(code_points).pick(torch.randint(len(code_points), (count,), generator=generator), generator)


def draw_ink(
    count: int, generator: Generator, look: Look = INK_LOOK
) -> tuple[UInt8[Tensor, "count 3 32 32"], Int64[Tensor, "count 16"]]:
    """Draw a capital among stray ones, which are its neighbours in the batch, and label every patch."""
    masks = pick_letters(CAPITALS, count, generator)
    ink = place(masks, look, generator)
    strays = [stray_ink(masks.roll(shift, 0), generator) for shift in range(1, STRAYS + 1)]
    clutter = torch.stack(strays).amax(0) * look.clutter
    return compose(ink, clutter, look, generator), label_patches(ink, clutter)


def label_patches(
    ink: Float[Tensor, "batch 1 32 32"], clutter: Float[Tensor, "batch 1 32 32"]
) -> Int64[Tensor, "batch 16"]:
    """Return the class of every patch, row by row: 0 ground, 1 the glyph, 2 clutter that the glyph does not hide."""
    shares = [F.avg_pool2d(layer, PATCH).flatten(1) for layer in (ink, clutter * (1 - ink))]
    glyph, stray = shares
    labels = torch.where(glyph >= stray, 1, 2)
    return labels.where(torch.maximum(glyph, stray) >= COVERED, 0)


def draw_angle(
    count: int, generator: Generator, look: Look = ANGLE_LOOK
) -> tuple[UInt8[Tensor, "count 3 32 32"], Float[Tensor, "count 2"]]:
    """Draw letters turned by any angle, counter-clockwise, and label each with the angle's cosine and sine."""
    masks = pick_letters(TURNABLE, count, generator)
    angles = uniform(generator, 0, 2 * math.pi, count)
    return paint(turned(masks, angles), look, generator), torch.stack([angles.cos(), angles.sin()], 1)


def turned(masks: Float[Tensor, "batch 40 40"], angles: Float[Tensor, " batch"]) -> Float[Tensor, "batch 40 40"]:
    """Turn each mask about its centre by an angle in radians, counter-clockwise as seen, and make it smaller."""
    cos, sin, none = angles.cos() * ROOM, angles.sin() * ROOM, torch.zeros_like(angles)
    maps = torch.stack([cos, -sin, none, sin, cos, none], 1).view(-1, 2, 3)
    grid = F.affine_grid(maps, [len(masks), 1, MASK_SIZE, MASK_SIZE], align_corners=False)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


@dataclass(frozen=True)
class Scene:
    """A task: its description, its type, the names of its classes (or of a head's outputs), and how it is drawn."""

    description: str
    kind: str
    classes: tuple[str, ...]
    draw: Callable[[int, Generator], Drawn]


SCENES: Mapping[str, Scene] = MappingProxyType(
    {
        "ink": Scene(
            "which patches show the middle capital, which stray ones",
            "segmentation",
            ("ground", "glyph", "clutter"),
            draw_ink,
        ),
        "angle": Scene(
            "by what angle a letter is turned, of the full circle", "regression", ("cosine", "sine"), draw_angle
        ),
    }
)
