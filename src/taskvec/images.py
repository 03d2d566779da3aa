"""Images: decoded once to uint8, normalised and augmented in batches on the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from taskvec.errors import TaskvecError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """What an encoder expects: square size in pixels, crop share, interpolation, mean and std of values in 0..1.

    With ``squash`` the whole image is resized to a square, whatever its aspect.
    """

    size: int
    crop: float = 1.0
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    squash: bool = False

    def decoding(self) -> dict[str, Any]:
        """Return the part that decides the decoded pixels; mean and std do not."""
        return {name: value for name, value in asdict(self).items() if name not in ("mean", "std")}

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Preprocessing:
        """Read the fields back."""
        mean, std = tuple(fields["mean"]), tuple(fields["std"])
        return Preprocessing(**{**fields, "mean": mean, "std": std})


def open_image(path: Path) -> Image.Image:
    """Open an image file as upright 8-bit RGB; a corrupt or huge one is an error that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)  # odd EXIF or ICC tags do not change the pixels
            with Image.open(path) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise TaskvecError(f"image '{path}' is suspiciously large: {error}", "shrink it or remove it") from None
    except FileNotFoundError:
        raise TaskvecError(f"no image at '{path}'", "check the path") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError, ...
        raise TaskvecError(f"image '{path}' cannot be read: {error}", "replace it or remove it") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert grey, palette, 16-bit and transparent images to 8-bit RGB; transparency is laid on white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.float64)
        deep = image.mode != "I" or values.max(initial=0) > 255
        image = Image.fromarray(np.clip((values / 257 if deep else values).round(), 0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers without a range; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, to: Preprocessing) -> UInt8[np.ndarray, "3 size size"]:
    """Resize the short side to size / crop and cut the centre: pixel for pixel timm's evaluation transform."""
    short = max(to.size, math.floor(to.size / to.crop))
    width, height = image.size
    if to.squash:
        resized = (short, short)
    elif width <= height:
        resized = (short, int(short * height / width))
    else:
        resized = (int(short * width / height), short)
    if resized != image.size:
        image = image.resize(resized, RESAMPLING[to.interpolation])
    left, top = (round((side - to.size) / 2) for side in resized)
    image = image.crop((left, top, left + to.size, top + to.size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def decode(
    items: Sequence[Path] | UInt8[np.ndarray, "count 3 height width"],
    to: Preprocessing,
    out: UInt8[np.ndarray, "count 3 size size"],
) -> None:
    """Fill ``out`` with the evaluation view of every item: paths are opened, arrays taken as RGB images."""
    for index, item in enumerate(items):
        image = open_image(item) if isinstance(item, Path) else Image.fromarray(item.transpose(1, 2, 0))
        out[index] = resize_and_crop(image, to)


def normalise(
    images: UInt8[Tensor, "batch 3 size size"], to: Preprocessing, device: str
) -> Float[Tensor, "batch 3 size size"]:
    """Turn uint8 pixels into the encoder's float32 input on the device."""
    pixels = images.to(device).to(torch.float32) / 255
    mean = torch.tensor(to.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(to.std, device=device).view(1, 3, 1, 1)
    return (pixels - mean) / std


def random_resized_crop(
    images: Float[Tensor, "batch 3 size size"], generator: torch.Generator, smallest: float = 0.9
) -> Float[Tensor, "batch 3 size size"]:
    """Cut a random part of each image (area ``smallest``..1, aspect 3/4..4/3) and resize it back bicubically.

    The paper's training transform on a whole batch; the draws come from the CPU generator, so any device sees the same.
    """
    count = len(images)
    area = torch.empty(count).uniform_(smallest, 1.0, generator=generator)
    aspect = torch.empty(count).uniform_(np.log(3 / 4), np.log(4 / 3), generator=generator).exp()
    width, height = (area * aspect).sqrt().clamp(max=1.0), (area / aspect).sqrt().clamp(max=1.0)
    shift = torch.rand(2, count, generator=generator) * 2 - 1
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = shift[0] * (1 - width), shift[1] * (1 - height)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False).to(images.device)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
