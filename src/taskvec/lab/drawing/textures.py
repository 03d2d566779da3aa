"""Sixteen procedural textures: fields over the plane, cut into light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor

from taskvec.lab.drawing.looks import IMAGE_SIZE, blotches, coordinates, uniform

Plane = Float[Tensor, "batch 32 32"]
TURN = 2 * math.pi


def wave(cycles: Plane) -> Plane:
    """Return the sine of a phase given in cycles."""
    return (TURN * cycles).sin()


def rings(x: Plane, y: Plane) -> Plane:
    """Circles around the origin."""
    return wave((x**2 + y**2).sqrt())


def rays(x: Plane, y: Plane) -> Plane:
    """Nine rays from the origin."""
    return wave(torch.atan2(y, x) * 9 / TURN)


def spiral(x: Plane, y: Plane) -> Plane:
    """A spiral with three arms."""
    return wave((x**2 + y**2).sqrt() + 3 * torch.atan2(y, x) / TURN)


def bricks(x: Plane, y: Plane) -> Plane:
    """Thin joints around bricks twice as wide as high, every second row shifted by half a brick."""
    shift = 0.5 * (torch.floor(y) % 2)
    joint = torch.minimum((y % 1 - 0.5).abs(), 2 * ((x / 2 + shift) % 1 - 0.5).abs())
    return 1 - 5 * joint


def zigzag(x: Plane, y: Plane) -> Plane:
    """Horizontal stripes bent into sharp teeth."""
    return wave(y + 2 * (x / 2 % 1 - 0.5).abs())


FIELDS: dict[str, Callable[[Plane, Plane], Plane]] = {
    "horizontal stripes": lambda x, y: wave(y),
    "vertical stripes": lambda x, y: wave(x),
    "rising stripes": lambda x, y: wave((x + y) * 0.7),
    "falling stripes": lambda x, y: wave((x - y) * 0.7),
    "checkerboard": lambda x, y: 2 * wave(x / 2) * wave(y / 2),
    "grid": lambda x, y: 2 * torch.maximum(wave(x), wave(y)) - 1.3,
    "lattice": lambda x, y: 2 * torch.maximum(wave((x + y) * 0.7), wave((x - y) * 0.7)) - 1.3,
    "dots": lambda x, y: wave(x) + wave(y) - 0.7,
    "staggered dots": lambda x, y: wave((x + y) * 0.7) + wave((x - y) * 0.7) - 0.7,
    "rings": rings,
    "rays": rays,
    "spiral": spiral,
    "bricks": bricks,
    "zigzag": zigzag,
    "waves": lambda x, y: wave(y + 0.35 * wave(x / 2)),
    "clouds": lambda x, y: torch.zeros_like(x),
}
"""Name and field of every texture; coordinates are in periods, and the field is positive where the texture is inked."""


def place_plane(count: int, generator: Generator) -> tuple[Plane, Plane]:
    """Draw the coordinates of each image in periods: 3.5 to 7 periods across, slightly turned, anywhere."""
    horizontal, vertical = coordinates()
    angle = uniform(generator, -0.2, 0.2, count, 1, 1)
    periods = uniform(generator, 1.75, 3.5, count, 1, 1)
    shift = uniform(generator, -0.4, 0.4, 2, count, 1, 1)
    x, y = horizontal - shift[0], vertical - shift[1]
    return periods * (angle.cos() * x - angle.sin() * y), periods * (angle.sin() * x + angle.cos() * y)


def texture_ink(labels: Int64[Tensor, " batch"], generator: Generator) -> Float[Tensor, "batch 1 32 32"]:
    """Draw the texture of each label, its place, scale, line width and unevenness at random; ink is 0 to 1."""
    count = len(labels)
    x, y = place_plane(count, generator)
    field = torch.empty(count, IMAGE_SIZE, IMAGE_SIZE)
    for index, function in enumerate(FIELDS.values()):
        chosen = labels == index
        field[chosen] = function(x[chosen], y[chosen])
    rough = (labels == list(FIELDS).index("clouds")).float()[:, None, None] * 0.9 + 0.2
    field = field + rough * blotches(count, 1, generator, cells=12)[:, 0]
    field = field + uniform(generator, -0.4, 0.4, count, 1, 1)
    return (0.5 + 1.2 * field).clamp(0, 1)[:, None]
