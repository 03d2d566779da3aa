"""Images: decoded once to uint8, normalised and augmented in batches on the device."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
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


@dataclass(frozen=True)
class Encoded:
    """An image file that lies in a data set's table: its bytes, and a name for messages."""

    data: bytes
    name: str

    def __str__(self) -> str:
        """Return the name."""
        return self.name


class CorruptImage(TaskvecError):
    """An image that cannot be used, and may be left out; what else goes wrong in reading stops the work."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow's warnings: odd EXIF or ICC tags do not change pixels, and large images are errors here.

    Python keeps its filters for all threads at once: enter it before they start.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)
        warnings.simplefilter("ignore", category=Image.DecompressionBombWarning)
        yield


def open_image(source: Path | Encoded) -> Image.Image:
    """Open an image file as upright 8-bit RGB; a corrupt or huge one is an error that names the file."""
    with quiet():
        return read_image(source)


def read_image(source: Path | Encoded) -> Image.Image:
    """Open an image as ``open_image`` does, in a thread for which somebody else has silenced the warnings."""
    with corrupt(source), Image.open(source if isinstance(source, Path) else io.BytesIO(source.data)) as image:
        check_size(image.size)
        return to_rgb(ImageOps.exif_transpose(image))


@contextlib.contextmanager
def corrupt(source: object) -> Iterator[None]:
    """Turn what decoders raise into a ``CorruptImage`` that names the image.

    Where the system refuses to read it, or has no memory, the error is another: the image may be sound.
    """
    try:
        yield
    except TaskvecError:
        raise
    except Image.DecompressionBombError as error:
        raise CorruptImage(f"image '{source}' is suspiciously large: {error}", "shrink it or remove it") from None
    except FileNotFoundError:
        raise CorruptImage(f"no image at '{source}'", "check the path; is it a link to nothing?") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError, ...
        system = isinstance(error, MemoryError) or getattr(error, "errno", None)
        kind, what = (TaskvecError, str(error) or "no memory is left") if system else (CorruptImage, str(error))
        fix = "mend what is said there and run again" if system else "replace it or remove it"
        raise kind(f"image '{source}' cannot be read: {what}", fix) from None


def check_size(size: tuple[int, int]) -> None:
    """Raise for a decompression bomb: Pillow itself refuses only twice as many pixels as it warns about."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and math.prod(size) > limit:
        raise Image.DecompressionBombError(f"{size[0]} x {size[1]} pixels, more than {limit}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert grey, palette, 16-bit and transparent images to 8-bit RGB; transparency is laid on white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.float64)
        if values.max(initial=0) > 65535:
            raise ValueError("its values are 32-bit numbers without a range; save it with 8 or 16 bits")
        deep = image.mode != "I" or values.max(initial=0) > 255
        image = Image.fromarray(np.clip((values / 257 if deep else values).round(), 0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers without a range; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, to: Preprocessing) -> UInt8[np.ndarray, "3 size size"]:
    """Resize the short side to size / crop and cut the centre: pixel for pixel timm's evaluation transform.

    An image so long that it would become a decompression bomb raises Pillow's error for those.
    """
    short = max(to.size, math.floor(to.size / to.crop))
    width, height = image.size
    if to.squash:
        resized = (short, short)
    elif width <= height:
        resized = (short, int(short * height / width))
    else:
        resized = (int(short * width / height), short)
    if resized != image.size:
        check_size(resized)  # one side of a very long image grows many times
        image = image.resize(resized, RESAMPLING[to.interpolation])
    left, top = (round((side - to.size) / 2) for side in resized)
    image = image.crop((left, top, left + to.size, top + to.size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def shrink(image: Image.Image, to: Preprocessing) -> UInt8[np.ndarray, "3 height width"]:
    """Return the whole image with its short side at size / crop pixels, never upscaled: what training crops from."""
    short = max(to.size, math.floor(to.size / to.crop))
    width, height = image.size
    if min(width, height) > short:
        scale = short / min(width, height)
        size = (max(short, round(width * scale)), max(short, round(height * scale)))
        image = image.resize(size, RESAMPLING[to.interpolation])
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


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

    For images whose evaluation view is the whole image, as the lab's: the draws, on a continuous scale, come from the
    CPU generator, so any device sees the same. ``crop_box`` is the transform of all others.
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


def crop_box(
    height: int, width: int, generator: np.random.Generator, smallest: float = 0.9
) -> tuple[int, int, int, int]:
    """Draw the top, left, height and width of a training crop, in pixels (protocol, RandomResizedCrop).

    The rule is torchvision's ``RandomResizedCrop.get_params``: an area share of ``smallest``..1 and an aspect of
    3/4..4/3, ten tries to fit them into the image, else the largest centred part of an aspect within those limits.
    """
    least, most = 3 / 4, 4 / 3
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
    """Cut a part out of an image and resize it bicubically to a square, pixel for pixel as torchvision does with PIL.

    ``box`` is top, left, height and width.
    """
    top, left, high, wide = box
    part = Image.fromarray(np.ascontiguousarray(image[:, top : top + high, left : left + wide].transpose(1, 2, 0)))
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
