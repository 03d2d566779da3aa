"""Crops by matrix products on any device, against Pillow pixel for pixel."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from taskvec.data.augment import cut
from taskvec.data.decoding import Whole
from taskvec.data.resampling import largest_scale, resized_crops

Box = tuple[int, int, int, int]


def draw(generator: np.random.Generator, size: int, kind: str) -> tuple[np.ndarray, Box]:
    """Make an image, of noise or of black and white, and a box in it that is not too large for the size."""
    height, width = generator.integers(1, 60, 2)
    image = generator.integers(0, 256, (3, height, width)).astype(np.uint8)
    image = image if kind == "noise" else (image // 128 * 255).astype(np.uint8)
    high, wide = (int(generator.integers(1, min(side, largest_scale() * size) + 1)) for side in (height, width))
    return image, (int(generator.integers(height - high + 1)), int(generator.integers(width - wide + 1)), high, wide)


def crops(images: list[np.ndarray], boxes: list[Box], size: int) -> np.ndarray:
    flat = torch.from_numpy(np.concatenate([image.ravel() for image in images]))
    shapes = torch.tensor([image.shape[1:] for image in images])
    starts = torch.tensor(np.cumsum([0, *(image.size for image in images[:-1])]))
    return resized_crops(flat, starts, shapes, torch.tensor(boxes), max(max(box[2:]) for box in boxes), size).numpy()


def rows_then_columns(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Resize a part with Pillow: rows, then columns, which it does itself in one call unless the part is tall."""
    top, left, high, wide = box
    part = Image.fromarray(np.ascontiguousarray(image[:, top : top + high, left : left + wide].transpose(1, 2, 0)))
    rows = part.resize((size, high), Image.Resampling.BICUBIC)
    return np.asarray(rows.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


@given(st.integers(0, 2**32), st.integers(2, 24), st.sampled_from(["noise", "black and white"]))
def test_crops_are_pillows_pixel_for_pixel(seed: int, size: int, kind: str) -> None:
    generator = np.random.default_rng(seed)
    images, boxes = zip(*(draw(generator, size, kind) for _ in range(3)), strict=True)
    want = [rows_then_columns(image, box, size) for image, box in zip(images, boxes, strict=True)]
    assert np.array_equal(crops(list(images), list(boxes), size), np.stack(want))


def test_the_training_transform_differs_by_a_level_or_two_where_pillow_takes_columns_first() -> None:
    """Pillow does so from version 13 on, with parts that shrink more in height than in width."""
    generator = np.random.default_rng(0)
    differences = []
    for height, width in ((80, 80), (80, 110), (110, 80), (90, 84)) * 4:
        small = generator.integers(0, 256, (height // 4, width // 4, 3)).astype(np.uint8)
        smooth = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        image = np.ascontiguousarray(np.asarray(smooth).transpose(2, 0, 1))
        whole = Whole(image.ravel(), np.array([[height, width]]))
        box = whole.box(0, 1, len(differences))
        ours, theirs = crops([image], [box], 64)[0].astype(int), cut(image, box, 64).astype(int)
        differences.append(np.abs(ours - theirs))
    assert np.max(differences) <= 4
    assert np.mean(differences) < 0.25


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 50))
def test_no_crop_is_longer_than_the_square_it_is_cut_into(height: int, width: int, step: int) -> None:
    whole = Whole(np.zeros(0, np.uint8), np.array([[height, width]]))
    assert max(whole.box(0, 0, step)[2:]) <= whole.longest_side()
