"""Images: files and arrays opened as RGB, and what an encoder sees of them: resized, cropped, normalised."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from taskvec.core.errors import TaskvecError
from taskvec.data.rgb import tag, to_rgb, upright

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "PPM", "WEBP")
"""The formats that are opened, whatever a file is called; some others of Pillow start programs."""
LARGEST_TEXT = 2**26
"""Bytes of the largest text or colour profile in a PNG, uncompressed; Pillow's own limit is a megabyte."""
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, LARGEST_TEXT)
for order in (TiffImagePlugin.II, TiffImagePlugin.MM):  # grey modes that Pillow can unpack and does not list
    for white in (0, 1):
        TiffImagePlugin.OPEN_INFO.setdefault((order, white, (1,), 1, (12,), ()), ("I;16", "I;12"))
TiffImagePlugin.OPEN_INFO.setdefault((TiffImagePlugin.MM, 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))
PIXELS = 100_000_000
"""Pixels that all threads together may have open at once, at up to sixteen bytes each; one image may take them all."""
Image.core.set_block_size(2**26)  # type: ignore[attr-defined]  # larger parts go back to the system when freed
TILE_WIDTH, TILE_HEIGHT = 322, 323
"""Tags of a TIFF: the size of a tile, which may be larger than the image."""
RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """The input of an encoder: square size in pixels, crop share, interpolation, mean and std of values in 0..1.

    With ``squash`` the whole image is resized to a square, whatever its aspect.
    """

    size: int
    crop: float = 1.0
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    squash: bool = False

    @property
    def short_side(self) -> int:
        """The short side of a resized image, of which the centre is seen, in pixels."""
        return max(self.size, math.floor(self.size / self.crop))

    def decoding(self) -> dict[str, Any]:
        """Return the fields that determine decoded pixels, which mean and std do not."""
        return {name: value for name, value in asdict(self).items() if name not in ("mean", "std")}

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Preprocessing:
        """Return what ``to_json`` wrote as a preprocessing."""
        mean, std = tuple(fields["mean"]), tuple(fields["std"])
        return Preprocessing(**{**fields, "mean": mean, "std": std})


@dataclass(frozen=True)
class Encoded:
    """The bytes of an image file that lies in a table or in memory, with a name for messages."""

    data: bytes
    name: str

    def __str__(self) -> str:
        """Return the name."""
        return self.name


class CorruptImage(TaskvecError):
    """An image that cannot be decoded and may be left out; other errors of reading stop the work."""


class WarningFilters:
    """The state of ``quiet``: how many threads are inside, and what restores the filters after the last one."""

    def __init__(self) -> None:
        self.lock, self.inside, self.restore = threading.Lock(), 0, contextlib.ExitStack()


_FILTERS = WarningFilters()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow's warnings: odd EXIF or ICC tags do not change pixels, and large images are errors here.

    Python keeps its filters for all threads at once: the first thread inside sets them, the last puts them back.
    """
    with _FILTERS.lock:
        if not _FILTERS.inside:
            _FILTERS.restore.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", category=UserWarning)
            warnings.simplefilter("ignore", category=Image.DecompressionBombWarning)
        _FILTERS.inside += 1
    try:
        yield
    finally:
        with _FILTERS.lock:
            _FILTERS.inside -= 1
            if not _FILTERS.inside:
                _FILTERS.restore.close()


def open_image(source: Path | Encoded, to: Preprocessing | None = None) -> Image.Image:
    """Return an image file as upright 8-bit RGB; a corrupt or huge one is an error that names the file.

    It may be huge by itself, or once it is resized ``to`` the input of an encoder.
    """
    with quiet(), opened(source, to) as image:
        return image


@contextlib.contextmanager
def opened(source: Path | Encoded, to: Preprocessing | None = None) -> Iterator[Image.Image]:
    """Yield an image as ``open_image`` returns it; the caller silences warnings (``quiet``).

    Sizes are checked before pixels are read; threads with large images wait for each other.
    """
    with corrupt(source), byte_stream(source) as file, Image.open(file, formats=FORMATS) as image:
        check_sizes(image, to)
        with PIXEL_BUDGET.taken(math.prod(image.size)):
            yield to_rgb(upright(image))


def byte_stream(source: Path | Encoded) -> BinaryIO:
    """Return a stream of an image's bytes; by name, Pillow would map the file and scramble TIFFs that need turning."""
    file: BinaryIO = source.open("rb") if isinstance(source, Path) else io.BytesIO(source.data)
    if isinstance(source, Encoded) and not source.data:
        fix = "replace it or remove it; a file that was read to its end has to be opened again"
        raise CorruptImage(f"image '{source}' is empty", fix)
    return file


class PixelBudget:
    """A number of pixels that threads share; a thread that needs more than all of them takes all."""

    def __init__(self, pixels: int) -> None:
        self.pixels = self.left = pixels
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Hold so many pixels during a block, once they are free."""
        share = min(pixels, self.pixels)
        with self.changed:
            self.changed.wait_for(lambda: self.left >= share)
            self.left -= share
        try:
            yield
        finally:
            with self.changed:
                self.left += share
                self.changed.notify_all()


PIXEL_BUDGET = PixelBudget(PIXELS)
LOADING = threading.Lock()
"""Held while a given Pillow image reads its pixels, which it does when first used: threads may share one."""
Source = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray | Tensor
"""An image as users give it: a path, an encoded file or its bytes, a Pillow image, or uint8 pixels."""
ARRAYS = "uint8 values as [height, width], [height, width, 3] or, with transparency, [height, width, 4]"
CHANNELS_FIRST = "uint8 values as [3, height, width] (or 1 or 4 channels), as torchvision reads them"


def named(images: Source | Iterable[Source]) -> Iterator[tuple[str, Source]]:
    """Yield every image with its name: its path, or its number such as ``image 0``; a single image is taken as one."""
    pixels = isinstance(images, np.ndarray | Tensor) and images.ndim in (0, 2, 3)
    single = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)
    if pixels or single or hasattr(images, "read"):
        images = [images]  # type: ignore[list-item]
    if not isinstance(images, Iterable):
        raise TaskvecError(f"a {type(images).__name__} is no image", "give an image, or several in a list")
    for place, image in enumerate(images):
        yield str(os.fsdecode(image)) if isinstance(image, str | os.PathLike) else f"image {place}", image


def decode(image: Source, name: str, to: Preprocessing) -> Image.Image:
    """Return an image of any source as upright 8-bit RGB; anything else is an error with its name."""
    with quiet(), corrupt(name):
        if isinstance(image, str | os.PathLike):
            if Path(name).is_dir():
                raise TaskvecError(f"'{name}' is a folder, not an image", f"give the images in it, such as {name}/*")
            return open_image(Path(name), to)
        content = image.read() if hasattr(image, "read") else image
        if isinstance(content, bytes | bytearray | memoryview):
            return open_image(Encoded(bytes(content), name), to)
        if isinstance(content, np.ndarray | Tensor):
            content = from_pixels(content, name)
        if isinstance(content, Image.Image):
            check_sizes(content, to)
            with LOADING:
                content = upright(content)
            return to_rgb(content)
    fix = "give a path, an image of Pillow, an array of pixels, a file opened in binary mode, or its bytes"
    raise TaskvecError(f"{name} is a {type(content).__name__}", fix)


def from_pixels(pixels: np.ndarray | Tensor, name: str) -> Image.Image:
    """Return an array of pixels, or a tensor with channels first, as an image; other shapes or types raise."""
    tensor = isinstance(pixels, Tensor)
    shape = (*pixels.shape[1:], pixels.shape[0]) if tensor and pixels.ndim == 3 else tuple(pixels.shape)
    sides, channels = shape[:2], shape[2:]
    fits = len(sides) == 2 and all(sides) and channels in ((), (1,), (3,), (4,))
    if pixels.dtype not in (np.uint8, torch.uint8) or not fits:
        what, wanted = ("a tensor", CHANNELS_FIRST) if tensor else ("an array", ARRAYS)
        raise TaskvecError(
            f"{name} is {what} of {pixels.dtype} values in the shape {list(pixels.shape)}",
            f"give {wanted}; for values from 0 to 1 round 255 times as much",
        )
    array = pixels.numpy(force=True) if isinstance(pixels, Tensor) else pixels
    array = array.transpose(1, 2, 0) if tensor and channels else array
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if channels == (1,) else array))


@contextlib.contextmanager
def corrupt(source: object) -> Iterator[None]:
    """Turn what decoders raise into a ``CorruptImage`` with the image's name.

    Where the system refuses to read it, or memory is short, it is a plain error: the image may be sound.
    """
    try:
        yield
    except TaskvecError:
        raise
    except Image.DecompressionBombError as error:
        raise CorruptImage(f"image '{source}' is suspiciously large: {error}", "shrink it or remove it") from None
    except UnidentifiedImageError:
        what = f"cannot be read: it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, or of a kind that is not read"
        raise CorruptImage(f"image '{source}' {what}", "save it as PNG or JPEG, replace it or remove it") from None
    except FileNotFoundError:
        raise CorruptImage(f"no image at '{source}'", "check the path; is it a link to nothing?") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError, ...
        system = isinstance(error, MemoryError) or getattr(error, "errno", None)
        kind = TaskvecError if system else CorruptImage
        what = str(error) or ("no memory is left" if system else "is its file closed?")
        fix = "mend what is said there and run again" if system else "replace it or remove it"
        raise kind(f"image '{source}' cannot be read: {what}", fix) from None


def check_sizes(image: Image.Image, to: Preprocessing | None) -> None:
    """Raise where an image, a tile of its file, or the image once resized ``to`` an encoder's input, is too large."""
    check_size(image.size)
    check_size((tag(image, TILE_WIDTH, 1), tag(image, TILE_HEIGHT, 1)))
    if to is not None:
        check_size(resized(image.size, to))


def check_size(size: tuple[int, int]) -> None:
    """Raise for no pixels, and for a decompression bomb; Pillow itself allows twice the pixels that it warns of."""
    limit = Image.MAX_IMAGE_PIXELS
    if not all(size):
        raise ValueError("it has no pixels")
    if limit is not None and math.prod(size) > limit:
        raise Image.DecompressionBombError(f"{size[0]} x {size[1]} pixels, more than {limit}")


def resized(size: tuple[int, int], to: Preprocessing) -> tuple[int, int]:
    """Return the size of an image with its short side at size / crop, or of a square where it is squashed."""
    short = to.short_side
    width, height = size
    if to.squash:
        return short, short
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)


def resize_and_crop(image: Image.Image, to: Preprocessing) -> UInt8[np.ndarray, "3 size size"]:
    """Resize the short side to size / crop and cut the centre: pixel for pixel timm's evaluation transform.

    An image so long that it would become a decompression bomb raises Pillow's error for those.
    """
    size = resized(image.size, to)
    if size != image.size:
        check_size(size)  # one side of a very long image grows many times
        image = image.resize(size, RESAMPLING[to.interpolation])
    left, top = (round((side - to.size) / 2) for side in size)
    image = image.crop((left, top, left + to.size, top + to.size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def shrink(image: Image.Image, to: Preprocessing) -> UInt8[np.ndarray, "3 height width"]:
    """Return the whole image with its short side at size / crop pixels, never upscaled: what training crops from."""
    short = to.short_side
    width, height = image.size
    if min(width, height) > short:
        scale = short / min(width, height)
        size = (max(short, round(width * scale)), max(short, round(height * scale)))
        image = image.resize(size, RESAMPLING[to.interpolation])
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def normalise(
    images: UInt8[Tensor, "batch 3 size size"], to: Preprocessing, device: str
) -> Float[Tensor, "batch 3 size size"]:
    """Return uint8 pixels as the encoder's float32 input on the device."""
    mean, std = statistics(to.mean, to.std, device)
    return (images.to(device).to(torch.float32) / 255).sub_(mean).div_(std)


@functools.cache
def statistics(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: str
) -> tuple[Float[Tensor, "1 3 1 1"], Float[Tensor, "1 3 1 1"]]:
    """Return the mean and standard deviation of pixels on the device, where they are put once."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))  # type: ignore[return-value]
