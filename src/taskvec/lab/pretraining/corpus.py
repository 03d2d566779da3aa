"""The images of pre-training: glyphs that share no shape with a task, and for captions the tasks' glyphs too."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Generator, Tensor

from taskvec.lab.drawing.glyphs import (
    DEJAVU_MONO,
    TEXT_FONTS,
    MaskTable,
    font_masks,
    glyph_mask,
    mask_table,
    stack_masks,
)
from taskvec.lab.drawing.looks import Look, paint, stream
from taskvec.lab.drawing.worlds import LETTERS, task_code_points

LOOK_ALIKE = 0.9
"""Correlation of two masks above which two code points count as look-alikes."""
FEWEST_MASKS = 4
"""Different masks, over all fonts, below which a code point does not serve pre-training."""
LARGEST_BLOCK = 40
"""Classes that one block gives at most, spread evenly over it, so that no script outweighs the others."""

PRETRAINING_BLOCKS = (
    (0x05D0, 0x05EB),  # Hebrew
    (0x0621, 0x06D4),  # Arabic
    (0x07C0, 0x07EB),  # N'Ko
    (0x0E81, 0x0EDE),  # Lao
    (0x10A0, 0x1100),  # Georgian
    (0x1401, 0x1677),  # Canadian syllabics
    (0x2010, 0x205F),  # punctuation
    (0x2200, 0x2300),  # mathematical operators
    (0x2300, 0x2500),  # technical
    (0x2500, 0x2600),  # boxes, blocks, shapes
    (0x2600, 0x2800),  # symbols, dingbats, brackets
    (0x2980, 0x2B60),  # more mathematics and shapes
    (0x2D30, 0x2D66),  # Tifinagh
    (0x4DC0, 0x4E00),  # hexagrams
)
ACCENTED_BLOCKS = ((0x00C0, 0x0250), (0x1E00, 0x1F00))
"""Latin-1 Supplement, Latin Extended-A and -B, Latin Extended Additional."""
HELD_OUT_SHARE = 0.15
"""Share of the letter-and-diacritic combinations that contrastive pre-training does not see."""
WELL_KNOWN = 6
"""Letters with which a diacritic occurs at least if one of its combinations may be held out."""
TASK_WORDS = frozenset({"LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "DIGIT", "NUMBER", "HARPOON"})
"""Words of a Unicode name that tie a code point to a task."""
CATEGORIES = frozenset({"Lu", "Ll", "Lo", "Nd", "No", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "So"})
"""Unicode categories of what stands alone: letters without modifiers, numbers, punctuation, symbols."""
PRETRAINING_LOOK = Look(
    turn=12, shear=0.15, shrink=0.45, stretch=0.15, shift=0.15, weight=0.6, warp=0.04, fade=0.65, colour=0.4,
    dark=0.5, gradient=0.25, texture=0.12, clutter=0.4, occlusion=0.25, disc=0.2, blur=0.8, noise=0.1
)  # fmt: skip
"""The full difficulty of the pre-training images, which the curriculum reaches."""


def tied_to_task(code_point: int) -> bool:
    """Return whether a code point is a task's, is composed of one (accents, circles), or is named after its script."""
    name = unicodedata.name(chr(code_point), "")
    parts = {ord(part) for part in unicodedata.normalize("NFKD", chr(code_point))}
    words = set(name.replace("-", " ").split())
    return not name or "ARROW" in name or bool(TASK_WORDS & words or parts & task_code_points())


def standard_rows(code_points: Iterable[int]) -> tuple[list[int], Float[Tensor, "drawn 1600"]]:
    """Return the code points that one font has, and their masks with zero mean and unit length."""
    drawn = [(code_point, glyph_mask(TEXT_FONTS[0], code_point)) for code_point in code_points]
    available = [(code_point, mask) for code_point, mask in drawn if mask is not None]
    rows = torch.from_numpy(np.stack([mask for _, mask in available])).flatten(1).float()
    rows = rows - rows.mean(1, keepdim=True)
    return [code_point for code_point, _ in available], rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-6)


def without_look_alikes(candidates: Iterable[int], taken: Iterable[int]) -> list[int]:
    """Return the candidates that look like no code point in ``taken`` and like no candidate before them."""
    _, others = standard_rows(taken)
    names, rows = standard_rows(candidates)
    shared = (rows @ others.T).amax(1) >= LOOK_ALIKE
    alike = rows @ rows.T >= LOOK_ALIKE
    distinct: list[int] = []
    for index in range(len(names)):
        if not shared[index] and not alike[index, distinct].any():
            distinct.append(index)
    return [names[index] for index in distinct]


def spread(items: Sequence[int], most: int) -> list[int]:
    """Return at most ``most`` of the items, evenly spaced."""
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]


@cache
def pretraining_code_points(few: bool = False) -> tuple[int, ...]:
    """Return the classes of supervised pre-training: 389 code points that share no shape with a task, or 130 of them.

    Left out are the tasks' scripts as a whole, so accented Latin, Greek and Cyrillic as well; every code point whose
    compatibility decomposition holds a letter, digit or arrow of a task; combining and modifier characters; and
    whatever looks like a task's glyph or like another class in one font. Every class has four masks or more. With
    ``few``, every third class: it is to all classes as ImageNet-1k is to ImageNet-21k.
    """
    if few:
        return pretraining_code_points()[::3]
    blocks = [range(start, stop) for start, stop in PRETRAINING_BLOCKS]
    free = [cp for block in blocks for cp in block if unicodedata.category(chr(cp)) in CATEGORIES]
    distinct = without_look_alikes([cp for cp in free if not tied_to_task(cp)], sorted(task_code_points()))
    varied = [cp for cp in distinct if len(font_masks([cp], TEXT_FONTS)) >= FEWEST_MASKS]
    return tuple(cp for block in blocks for cp in spread([cp for cp in varied if cp in block], LARGEST_BLOCK))


@cache
def pretraining_masks(few: bool = False) -> MaskTable:
    """Draw the masks of every pre-training class, or of the ``few``, in every text font that has it."""
    return mask_table([font_masks([code_point], TEXT_FONTS) for code_point in pretraining_code_points(few)])


def draw_pretraining(
    count: int, difficulty: float, generator: Generator, few: bool = False
) -> tuple[UInt8[Tensor, "count 3 32 32"], Int64[Tensor, " count"]]:
    """Draw images of random pre-training classes, the look eased to ``difficulty`` (0 clean, 1 full).

    With ``few``, of the 130 classes only that ``supervised-few`` learns; MAE and DINO see these images and no others,
    as the paper's saw ImageNet-1k. Labels count the classes drawn from, in the order of ``pretraining_code_points``.
    """
    table = pretraining_masks(few)
    labels = torch.randint(len(table.count), (count,), generator=generator)
    return paint(table.pick(labels, generator), PRETRAINING_LOOK.eased(difficulty), generator), labels


@cache
def accented_code_points() -> tuple[int, ...]:
    """Return the combinations of one Latin letter and one diacritic that DejaVu Sans Mono has."""
    parts = {cp: unicodedata.normalize("NFD", chr(cp)) for start, stop in ACCENTED_BLOCKS for cp in range(start, stop)}
    pairs = [cp for cp, pair in parts.items() if len(pair) == 2 and ord(pair[0]) in LETTERS]
    return tuple(cp for cp in pairs if font_masks([cp], DEJAVU_MONO))


@cache
def held_out_code_points() -> tuple[int, ...]:
    """Return the combinations kept for zero-shot classification: a fixed random choice, each with a common diacritic.

    Letter and diacritic both occur among the combinations that are seen, so every word of a held-out caption is known.
    """
    accents = {cp: unicodedata.normalize("NFD", chr(cp))[1] for cp in accented_code_points()}
    frequency = Counter(accents.values())
    known = [cp for cp, accent in accents.items() if frequency[accent] >= WELL_KNOWN]
    order = torch.randperm(len(known), generator=stream("accents", "held out")).tolist()
    return tuple(sorted(known[index] for index in order[: round(HELD_OUT_SHARE * len(accents))]))


@cache
def captioned_code_points() -> tuple[int, ...]:
    """Return what contrastive pre-training sees: the pre-training classes, the tasks' code points, accented Latin."""
    accented = [cp for cp in accented_code_points() if cp not in held_out_code_points()]
    return (*pretraining_code_points(), *sorted(task_code_points()), *accented)


@cache
def captioned_masks(held_out: bool = False) -> MaskTable:
    """Draw the masks of ``captioned_code_points`` or of the ``held_out`` combinations.

    Pre-training classes come in every text font. The tasks' code points and accented Latin come in the four cuts of
    DejaVu Sans Mono only, 4 of the 16 fonts that the tasks use. Letters that look the same, as Latin and Cyrillic A,
    keep their captions, as on the web.
    """
    if held_out:
        return stack_masks([font_masks([code_point], DEJAVU_MONO) for code_point in held_out_code_points()])
    known = set(pretraining_code_points())
    fonts = {cp: TEXT_FONTS if cp in known else DEJAVU_MONO for cp in captioned_code_points()}
    return stack_masks([font_masks([code_point], names) for code_point, names in fonts.items()])


def draw_captioned(
    labels: Int64[Tensor, " batch"], difficulty: float, generator: Generator, held_out: bool = False
) -> UInt8[Tensor, "batch 3 32 32"]:
    """Draw one image of each label, an index of ``captioned_code_points`` or of the ``held_out`` combinations."""
    return paint(captioned_masks(held_out).pick(labels, generator), PRETRAINING_LOOK.eased(difficulty), generator)
