"""Glyph masks from the fonts in matplotlib's wheel: Unicode code points in, 40 x 40 ink masks out."""

from __future__ import annotations

import importlib.util
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from taskvec.core.errors import TaskvecError

MASK_SIZE = 40
"""Height and width of a mask, in pixels."""
INK_SIZE = 34
"""Longest side of the ink box within a mask, in pixels."""
DRAWING_SIZE = 64
"""Font size at which a glyph is drawn before it is scaled to the ink box, in pixels."""
MISSING = 0x10FFFF
"""A code point that no text font has: it shows how the font draws a missing glyph."""

CAPITALS = tuple(range(0x41, 0x5B))
"""The Latin capitals."""
DEJAVU_SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique")
DEJAVU_MONO = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique")
DEJAVU_SERIF = ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic")
STIX = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")
TEXT_FONTS = DEJAVU_SANS + DEJAVU_MONO + DEJAVU_SERIF + STIX


def caption(code_point: int) -> str:
    """Return the Unicode name of a code point in lower case, such as ``greek small letter alpha``."""
    return unicodedata.name(chr(code_point)).lower()


def font_folder() -> Path:
    """Return matplotlib's font folder without importing matplotlib, which would make a folder in the user's home."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise TaskvecError("the lab draws with matplotlib's fonts, which are missing", "pip install matplotlib")
    return Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"


@cache
def load_font(name: str) -> ImageFont.FreeTypeFont:
    """Open one font by its file name without suffix; the basic layout engine draws every glyph alone."""
    path = font_folder() / f"{name}.ttf"
    return ImageFont.truetype(path, DRAWING_SIZE, layout_engine=ImageFont.Layout.BASIC)


def draw_ink(font: str, code_point: int) -> Image.Image | None:
    """Draw a code point and crop it to its ink; None if it has no ink."""
    canvas = Image.new("L", (3 * DRAWING_SIZE, 3 * DRAWING_SIZE))
    ImageDraw.Draw(canvas).text((DRAWING_SIZE, DRAWING_SIZE), chr(code_point), fill=255, font=load_font(font))
    box = canvas.getbbox()
    return canvas.crop(box) if box else None


@cache
def missing_ink(font: str) -> bytes:
    """Return the pixels with which a font draws a code point that it lacks."""
    ink = draw_ink(font, MISSING)
    return ink.tobytes() if ink else b""


@cache
def glyph_mask(font: str, code_point: int) -> UInt8[np.ndarray, "40 40"] | None:
    """Draw a code point into a mask, its ink scaled to one box and centred; None if the font lacks it."""
    ink = draw_ink(font, code_point)
    if ink is None or ink.tobytes() == missing_ink(font):
        return None
    scale = INK_SIZE / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    mask = Image.new("L", (MASK_SIZE, MASK_SIZE))
    mask.paste(ink.resize((width, height), Image.Resampling.BOX), ((MASK_SIZE - width) // 2, (MASK_SIZE - height) // 2))
    return np.array(mask)


def font_masks(code_points: Iterable[int], fonts: Iterable[str]) -> list[UInt8[np.ndarray, "40 40"]]:
    """Draw every code point in every font that has it; the same mask appears once."""
    fonts = tuple(fonts)
    drawn = (glyph_mask(font, code_point) for code_point in code_points for font in fonts)
    return list({mask.tobytes(): mask for mask in drawn if mask is not None}.values())


@dataclass(frozen=True)
class MaskTable:
    """The masks of several classes, one class after the other; a class owns ``count`` masks from ``first`` on."""

    masks: UInt8[Tensor, "masks 40 40"]
    first: Int64[Tensor, " classes"]
    count: Int64[Tensor, " classes"]

    def pick(self, labels: Int64[Tensor, " batch"], generator: torch.Generator) -> Float[Tensor, "batch 40 40"]:
        """Choose one mask of each label's class at random and return its ink, 0 to 1."""
        shares = torch.rand(len(labels), generator=generator)
        chosen = self.first[labels] + (shares * self.count[labels]).long()
        return self.masks[chosen].float() / 255


def stack_masks(classes: Sequence[Sequence[UInt8[np.ndarray, "40 40"]]]) -> MaskTable:
    """Build the table of all classes as they are; a mask may belong to several."""
    count = torch.tensor([len(masks) for masks in classes])
    pixels = np.stack([mask for masks in classes for mask in masks])
    return MaskTable(torch.from_numpy(pixels), count.cumsum(0) - count, count)


def mask_table(classes: Sequence[Sequence[UInt8[np.ndarray, "40 40"]]]) -> MaskTable:
    """Build the table of all classes; a mask that two classes share says nothing of the class and is left out."""
    owners = Counter(mask.tobytes() for masks in classes for mask in masks)
    return stack_masks([[mask for mask in masks if owners[mask.tobytes()] == 1] for masks in classes])
