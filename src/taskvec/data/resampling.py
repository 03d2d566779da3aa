"""Crops of whole images on any device, resized bicubically: bit for bit as Pillow resizes, in two matrix products.

Pillow resizes rows, rounds to 8 bits, then columns. Its coefficients are whole numbers of 2**-22, and its sums whole
numbers too. Here each coefficient is split in two numbers of at most 11 significant bits, so that float32 products of
pixels are exact in any order of summation, with TF32 or without.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32, Int64, UInt8
from torch import Tensor

BITS = 22
"""Fractional bits of Pillow's coefficients."""
LOW = 12
"""Bits of a coefficient that its lower half holds."""
MOST_TAPS = 32
"""Coefficients a pixel up to which the sum of the lower halves is exact in float32."""
SQUARES = 2**24
"""Pixels of the squares that images are cut into at once: what is held is some fifty bytes for each."""
A = -0.5
"""The parameter of Pillow's bicubic filter."""


def largest_scale() -> float:
    """Return how many times larger than the result a crop may be."""
    return (MOST_TAPS - 1) / 4


def resized_crops(
    pixels: UInt8[Tensor, " bytes"],
    starts: Int64[Tensor, " batch"],
    shapes: Int64[Tensor, "batch 2"],
    boxes: Int64[Tensor, "batch 4"],
    side: int,
    size: int,
) -> UInt8[Tensor, "batch 3 {size} {size}"]:
    """Return a part of each image, resized to size x size pixels.

    Images lie one behind the other in ``pixels``, channels first, at ``starts``; their ``shapes`` are height and width.
    Boxes are top, left, height and width, neither longer than ``side``.
    """
    together = max(1, SQUARES // side**2)
    groups = zip(starts.split(together), shapes.split(together), boxes.split(together), strict=True)
    return torch.cat([resized(pixels, *group, side, size) for group in groups])


def resized(
    pixels: UInt8[Tensor, " bytes"],
    starts: Int64[Tensor, " batch"],
    shapes: Int64[Tensor, "batch 2"],
    boxes: Int64[Tensor, "batch 4"],
    side: int,
    size: int,
) -> UInt8[Tensor, "batch 3 {size} {size}"]:
    """Return the parts of a few images, all at once, resized to size x size pixels."""
    parts = cut_parts(pixels, starts, shapes, boxes, side).float()
    narrow = combined(parts.flatten(1, 2) @ halves(boxes[:, 3], side, size))
    narrow = narrow.view(-1, side, 3 * size).float()
    tall = combined(narrow.mT @ halves(boxes[:, 2], side, size))
    crops: Tensor = tall.view(-1, 3, size, size).mT.contiguous().to(torch.uint8)
    return crops


def cut_parts(
    pixels: UInt8[Tensor, " bytes"],
    starts: Int64[Tensor, " batch"],
    shapes: Int64[Tensor, "batch 2"],
    boxes: Int64[Tensor, "batch 4"],
    side: int,
) -> UInt8[Tensor, "batch {side} 3 {side}"]:
    """Return the part of each image in the upper left of a square, its last row and column repeated; row by row."""
    top, left, high, wide = (column[:, None] for column in boxes.unbind(1))
    places, channels = torch.arange(side, device=pixels.device), torch.arange(3, device=pixels.device)
    rows, columns = top + places.minimum(high - 1), left + places.minimum(wide - 1)
    height, width = shapes[:, 0, None, None], shapes[:, 1, None, None]
    lines = starts[:, None, None] + (channels * height + rows[:, :, None]) * width
    return pixels[lines[..., None] + columns[:, None, None, :]]


def halves(lengths: Int64[Tensor, " batch"], side: int, size: int) -> Float[Tensor, "batch {side} {2*size}"]:
    """Return the upper and lower halves of all coefficients that take so many pixels to ``size``, as whole numbers."""
    whole = coefficients(lengths, side, size)
    upper = (whole + 2 ** (LOW - 1)) >> LOW
    return torch.cat([upper, whole - (upper << LOW)], dim=2).float()


def coefficients(lengths: Int64[Tensor, " batch"], side: int, size: int) -> Int64[Tensor, "batch {side} {size}"]:
    """Return what each pixel of a line gives to each pixel of the result, in 2**-22: Pillow's ``precompute_coeffs``."""
    scale = (lengths.double() / size)[:, None, None]
    wide = scale.clamp(min=1.0)
    centre = (torch.arange(size, device=lengths.device) + 0.5) * scale
    first = (centre - 2 * wide + 0.5).trunc().clamp(min=0)
    last = (centre + 2 * wide + 0.5).trunc().minimum(lengths[:, None, None].double())
    places = torch.arange(side, device=lengths.device, dtype=torch.float64)[:, None]
    values = bicubic((places - centre + 0.5) / wide).where((places >= first) & (places < last), 0.0)
    scaled = values / values.sum(dim=1, keepdim=True) * 2**BITS
    rounded: Tensor = (scaled + 0.5 * scaled.sign()).trunc().long()
    return rounded


def bicubic(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the bicubic filter at a distance, which is zero from 2 on."""
    x = x.abs()
    near = ((A + 2) * x - (A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * A
    values: Tensor = near.where(x < 1, far.where(x < 2, 0.0))
    return values


def combined(products: Float[Tensor, "batch lines columns"]) -> Int32[Tensor, "batch lines half"]:
    """Return the sums of both halves as whole numbers from 0 to 255, rounded as Pillow does."""
    upper, lower = products.to(torch.int32).chunk(2, dim=2)
    sums: Tensor = ((upper << LOW) + lower + 2 ** (BITS - 1)) >> BITS
    return sums.clamp(0, 255)
