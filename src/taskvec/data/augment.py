"""Random crops for training."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

ASPECT = 4 / 3
"""The widest aspect of a crop, and by its inverse the tallest."""


def crop_parts(count: int, generator: torch.Generator, smallest: float = 0.9) -> Float[Tensor, "{count} 2 3"]:
    """Return a random part of each image (area ``smallest``..1, aspect 3/4..4/3) as the affine map of its corners.

    For images whose evaluation view is the whole image, as the lab's; coordinates go from -1 to 1. The draws, on a
    continuous scale, come from the CPU's generator, so all devices see the same. ``crop_box`` is for all others.
    """
    area = torch.empty(count).uniform_(smallest, 1.0, generator=generator)
    aspect = torch.empty(count).uniform_(np.log(3 / 4), np.log(4 / 3), generator=generator).exp()
    width, height = (area * aspect).sqrt().clamp(max=1.0), (area / aspect).sqrt().clamp(max=1.0)
    shift = torch.rand(2, count, generator=generator) * 2 - 1
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = shift[0] * (1 - width), shift[1] * (1 - height)
    return theta


def crop_grids(
    images: Float[Tensor, "batch 3 size size"], parts: Float[Tensor, "batch 2 3"]
) -> Float[Tensor, "batch 3 size size"]:
    """Return a part of each image, as an affine map says, resized bicubically; on the device of both."""
    grid = F.affine_grid(parts, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def crop_box(
    height: int, width: int, generator: np.random.Generator, smallest: float = 0.9
) -> tuple[int, int, int, int]:
    """Return the top, left, height and width of a random training crop, in pixels (protocol, RandomResizedCrop).

    The rule is torchvision's ``RandomResizedCrop.get_params``: an area share of ``smallest``..1 and an aspect of
    3/4..4/3, ten tries to fit them into the image, else the largest centred part of an aspect within those limits.
    """
    least, most = 3 / 4, ASPECT
    for _ in range(10):
        area = height * width * generator.uniform(smallest, 1.0)
        aspect = math.exp(generator.uniform(math.log(least), math.log(most)))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            return int(generator.integers(height - high + 1)), int(generator.integers(width - wide + 1)), high, wide
    wide, high = width, height
    if width / height < least:
        high = round(width / least)
    elif width / height > most:
        wide = round(height * most)
    return (height - high) // 2, (width - wide) // 2, high, wide


def cut(
    image: UInt8[np.ndarray, "3 height width"], box: tuple[int, int, int, int], size: int
) -> UInt8[np.ndarray, "3 size size"]:
    """Return a part of an image, resized bicubically to a square: pixel for pixel as torchvision does with PIL.

    ``box`` is top, left, height and width.
    """
    top, left, high, wide = box
    part = Image.fromarray(np.ascontiguousarray(image[:, top : top + high, left : left + wide].transpose(1, 2, 0)))
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
