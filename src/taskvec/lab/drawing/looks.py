"""Looks: the strengths of all nuisances with which ink masks become 32 x 32 colour images, and their drawing."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Generator, Tensor

IMAGE_SIZE = 32
"""Height and width of an image, in pixels."""


@dataclass(frozen=True)
class Look:
    """The strength of every nuisance; zero throughout is clean white ink on black, as large as it gets."""

    turn: float = 0.0
    """Largest rotation, in degrees."""
    shear: float = 0.0
    """Largest horizontal shear, as a share of the height."""
    shrink: float = 0.0
    """Largest share of the size that is taken away."""
    stretch: float = 0.0
    """Largest change of the ratio of width to height, as a share."""
    shift: float = 0.0
    """Largest shift of the centre, as a share of half the image."""
    weight: float = 0.0
    """Largest change of stroke thickness: 1 moves the outline by one mask pixel."""
    outline: float = 0.0
    """Probability that only the outline is drawn."""
    hatch: float = 0.0
    """Largest share of the ink that is taken away in stripes."""
    warp: float = 0.0
    """Standard deviation of the elastic displacement, as a share of half the image."""
    fade: float = 0.0
    """Largest share of the contrast between ink and ground that is taken away."""
    colour: float = 0.0
    """Largest deviation of a colour channel from its grey, 0 to 1."""
    dark: float = 0.0
    """Probability of dark ink on light ground."""
    gradient: float = 0.0
    """Largest change of brightness from the centre of the ground to its edge."""
    texture: float = 0.0
    """Standard deviation of blotches on the ground."""
    clutter: float = 0.0
    """Probability of a stray glyph near the edge."""
    occlusion: float = 0.0
    """Probability of a bar across the image."""
    disc: float = 0.0
    """Probability of a coloured disc behind the ink."""
    blur: float = 0.0
    """Largest share of a 5 x 5 blur that is mixed in."""
    noise: float = 0.0
    """Largest standard deviation of pixel noise."""

    def eased(self, difficulty: float) -> Look:
        """Scale every strength by ``difficulty``, 0 (clean) to 1 (this look)."""
        return Look(**{field.name: getattr(self, field.name) * difficulty for field in fields(self)})


def stream(*parts: object) -> Generator:
    """Return a generator that depends on all ``parts`` and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    """Draw uniformly from [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def chance(generator: Generator, probability: float, count: int) -> Float[Tensor, "count 1 1 1"]:
    """Draw 1 with the given probability and 0 otherwise, one for each image."""
    return (torch.rand(count, 1, 1, 1, generator=generator) < probability).float()


def coordinates() -> tuple[Float[Tensor, "32 32"], Float[Tensor, "32 32"]]:
    """Return the horizontal and the vertical coordinate of every pixel's centre, -1 to 1."""
    axis = (torch.arange(IMAGE_SIZE) + 0.5) * 2 / IMAGE_SIZE - 1
    vertical, horizontal = torch.meshgrid(axis, axis, indexing="ij")
    return horizontal, vertical


@cache
def stretching(cells: int) -> Float[Tensor, "32 cells"]:
    """Return the matrix that interpolates linearly from ``cells`` knots to the pixels of one axis."""
    places = torch.linspace(0, cells - 1, IMAGE_SIZE)
    return (1 - (places[:, None] - torch.arange(cells)).abs()).clamp_min(0)


@cache
def softening() -> Float[Tensor, "32 32"]:
    """Return the matrix that blurs one axis with the weights 1 2 3 2 1, renormalised at the edges."""
    places = torch.arange(IMAGE_SIZE)
    weights = (3.0 - (places[:, None] - places).abs()).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


def blotches(count: int, channels: int, generator: Generator, cells: int = 6) -> Float[Tensor, "count channels 32 32"]:
    """Draw smooth noise of unit variance at its ``cells`` x ``cells`` knots."""
    knots = torch.randn(count, channels, cells, cells, generator=generator)
    return stretching(cells) @ knots @ stretching(cells).T


def affine(count: int, look: Look, generator: Generator) -> Float[Tensor, "count 2 3"]:
    """Draw the maps from image to mask coordinates: rotation, shear, scale and shift."""
    angle = uniform(generator, -1, 1, count) * math.radians(look.turn)
    shear = uniform(generator, -1, 1, count) * look.shear
    scale = 1 / (1 - look.shrink * torch.rand(count, generator=generator))
    ratio = torch.exp(uniform(generator, -1, 1, count) * look.stretch)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift = uniform(generator, -1, 1, 2, count) * look.shift * scale
    rows = [cos * ratio, (shear * cos - sin) * ratio, shift[0], sin / ratio, (shear * sin + cos) / ratio, shift[1]]
    return torch.stack(rows, 1).view(count, 2, 3)


def grow(ink: Float[Tensor, "batch 1 40 40"]) -> Float[Tensor, "batch 1 40 40"]:
    """Take the largest value among each pixel and its eight neighbours, as max pooling does, but faster."""
    wide = F.pad(ink, (1, 1, 1, 1), mode="replicate")
    rows = torch.maximum(torch.maximum(wide[..., :-2, :], wide[..., 2:, :]), wide[..., 1:-1, :])
    return torch.maximum(torch.maximum(rows[..., :-2], rows[..., 2:]), rows[..., 1:-1])


def thicken(
    masks: Float[Tensor, "batch 1 40 40"], weight: Float[Tensor, "batch 1 1 1"]
) -> Float[Tensor, "batch 1 40 40"]:
    """Move the outlines of the ink outwards (positive ``weight``) or inwards, by up to one pixel."""
    sign = torch.where(weight < 0, -1.0, 1.0)
    return masks + weight.abs() * (grow(masks * sign) * sign - masks)


def place(masks: Float[Tensor, "batch 40 40"], look: Look, generator: Generator) -> Float[Tensor, "batch 1 32 32"]:
    """Give every mask its own stroke thickness, affine map and elastic warp; return the ink, 0 to 1."""
    count = len(masks)
    ink = thicken(masks[:, None], uniform(generator, -1, 1, count, 1, 1, 1) * look.weight)
    if look.outline:
        ink = cover(ink, grow(ink) + grow(-ink), chance(generator, look.outline, count))
    grid = F.affine_grid(affine(count, look, generator), [count, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    warp = look.warp * blotches(count, 2, generator, cells=4).permute(0, 2, 3, 1)
    return F.grid_sample(ink, grid + warp, align_corners=False)


def tint(grey: Float[Tensor, "batch 1 1 1"], look: Look, generator: Generator) -> Float[Tensor, "batch 3 1 1"]:
    """Turn a grey into a colour near it, 0 to 1."""
    return (grey + look.colour * uniform(generator, -1, 1, len(grey), 3, 1, 1)).clamp(0, 1)


def two_greys(count: int, look: Look, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw the greys of ink and ground, each [count, 1, 1, 1] in 0 to 1, at least ``1 - fade`` apart."""
    gap = 1 - look.fade * torch.rand(count, 1, 1, 1, generator=generator)
    low = (1 - gap) * torch.rand(count, 1, 1, 1, generator=generator)
    dark = chance(generator, look.dark, count)
    return low + gap * (1 - dark), low + gap * dark


def paint_ground(
    grey: Float[Tensor, "batch 1 1 1"], look: Look, generator: Generator
) -> Float[Tensor, "batch 3 32 32"]:
    """Paint the ground: a colour, a gradient in a random direction, and blotches."""
    count, (horizontal, vertical) = len(grey), coordinates()
    angle = uniform(generator, 0, 2 * math.pi, count, 1, 1, 1)
    slope = look.gradient * torch.rand(count, 1, 1, 1, generator=generator)
    ramp = slope * (angle.cos() * horizontal + angle.sin() * vertical)
    return tint(grey, look, generator) + ramp + look.texture * blotches(count, 3, generator)


def stray_ink(masks: Float[Tensor, "batch 40 40"], generator: Generator) -> Float[Tensor, "batch 1 32 32"]:
    """Place each mask beyond the middle, left or right or above or below, as the neighbour of another."""
    count = len(masks)
    angle = uniform(generator, 0, 2 * math.pi, count)
    distance = uniform(generator, 1.4, 1.8, count)
    maps = torch.zeros(count, 2, 3)
    maps[:, 0, 0] = maps[:, 1, 1] = 1.2
    maps[:, 0, 2], maps[:, 1, 2] = distance * angle.cos(), distance * angle.sin()
    grid = F.affine_grid(maps, [count, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    return F.grid_sample(masks[:, None], grid, align_corners=False)


def bars(count: int, generator: Generator) -> Float[Tensor, "count 1 32 32"]:
    """Draw one bar across each image, in any direction, three to six pixels wide and off the centre."""
    horizontal, vertical = coordinates()
    angle = uniform(generator, 0, 2 * math.pi, count, 1, 1, 1)
    offset, half = uniform(generator, 0.1, 0.6, count, 1, 1, 1), uniform(generator, 0.09, 0.19, count, 1, 1, 1)
    return ((angle.cos() * horizontal + angle.sin() * vertical - offset).abs() < half).float()


def stripes(count: int, generator: Generator) -> Float[Tensor, "count 1 32 32"]:
    """Draw parallel stripes across each image, in any direction, as wide as their gaps, three to five pixels apart."""
    horizontal, vertical = coordinates()
    angle, phase = uniform(generator, 0, 2 * math.pi, 2, count, 1, 1, 1)
    frequency = 2 * math.pi * IMAGE_SIZE / 2 / uniform(generator, 3, 5, count, 1, 1, 1)
    ramp: Tensor = angle.cos() * horizontal + angle.sin() * vertical
    wave: Tensor = (frequency * ramp + phase).sin()
    return 0.5 + 0.5 * wave


def discs(count: int, generator: Generator) -> Float[Tensor, "count 1 32 32"]:
    """Draw one disc in each image, near the centre and 27 to 32 pixels across, with a soft edge."""
    horizontal, vertical = coordinates()
    centre = uniform(generator, -0.06, 0.06, 2, count, 1, 1, 1)
    radius = uniform(generator, 0.85, 1.0, count, 1, 1, 1)
    distance = ((horizontal - centre[0]) ** 2 + (vertical - centre[1]) ** 2).sqrt()
    return ((radius - distance) * IMAGE_SIZE / 2).clamp(0, 1)


def cover(under: Tensor, over: Tensor, opacity: Tensor) -> Tensor:
    """Lay ``over`` on ``under`` where ``opacity`` is 1."""
    return under + opacity * (over - under)


def develop(images: Float[Tensor, "batch 3 32 32"], look: Look, generator: Generator) -> UInt8[Tensor, "batch 3 32 32"]:
    """Blur, add noise, and round to bytes."""
    count = len(images)
    soft = softening() @ images @ softening().T
    images = cover(images, soft, look.blur * torch.rand(count, 1, 1, 1, generator=generator))
    level = look.noise * torch.rand(count, 1, 1, 1, generator=generator)
    images = images + level * torch.randn(images.shape, generator=generator)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def compose(
    ink: Float[Tensor, "batch 1 32 32"],
    strays: Float[Tensor, "batch 1 32 32"],
    look: Look,
    generator: Generator,
) -> UInt8[Tensor, "batch 3 32 32"]:
    """Paint ground, stray ink, disc, ink and bar over each other, then develop the images."""
    count = len(ink)
    if look.hatch:
        ink = ink * (1 - look.hatch * torch.rand(count, 1, 1, 1, generator=generator) * stripes(count, generator))
    ink_grey, ground_grey = two_greys(count, look, generator)
    ground = paint_ground(ground_grey, look, generator)
    disc = chance(generator, look.disc, count)
    scene = torch.rand(count, 3, 1, 1, generator=generator) + look.texture * blotches(count, 3, generator)
    ground = cover(ground, scene, disc * (1 - discs(count, generator)))
    stray = tint(torch.rand(count, 1, 1, 1, generator=generator), look, generator)
    image = cover(ground, stray, strays * chance(generator, look.clutter, count))
    image = cover(image, tint(ink_grey, look, generator), ink)
    bar = tint(torch.rand(count, 1, 1, 1, generator=generator), look, generator)
    image = cover(image, bar, bars(count, generator) * chance(generator, look.occlusion, count))
    return develop(image, look, generator)


def paint(masks: Float[Tensor, "batch 40 40"], look: Look, generator: Generator) -> UInt8[Tensor, "batch 3 32 32"]:
    """Make one image of each mask; the stray glyph beside it is its neighbour in the batch."""
    ink = place(masks, look, generator)
    return compose(ink, stray_ink(masks.roll(1, 0), generator), look, generator)
