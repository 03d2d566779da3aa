"""Images: decoded once to uint8, normalised and augmented in batches on the device."""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from taskvec.core.errors import TaskvecError

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "PPM", "WEBP")
"""What is opened, whatever a file is called: Pillow knows formats that start other programs."""
TEXT = 2**26
"""Bytes that a text or colour profile in a PNG may have, uncompressed; Pillow refuses what is over a megabyte."""
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, TEXT)
for order in (TiffImagePlugin.II, TiffImagePlugin.MM):  # kinds of grey that Pillow can unpack and does not list
    for white in (0, 1):
        TiffImagePlugin.OPEN_INFO.setdefault((order, white, (1,), 1, (12,), ()), ("I;16", "I;12"))
TiffImagePlugin.OPEN_INFO.setdefault((TiffImagePlugin.MM, 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))
PIXELS = 100_000_000
"""Pixels of files that all threads together hold at once, at up to sixteen bytes each; one image may have them all."""
Image.core.set_block_size(2**26)  # type: ignore[attr-defined]  # larger parts go back to the system when freed
PEAK = "taskvec-peak"
"""Where an opened image has the highest value of its file, which had 16 bits of unknown use."""
BITS = "taskvec-bits"
"""Where an opened PNG has the number of bits that were measured."""
PHOTOMETRIC, BITS_PER_SAMPLE, SAMPLE_FORMAT, LOWEST, HIGHEST = 262, 258, 339, 340, 341
"""Tags of a TIFF: whether zero is white, what its numbers are, and their range."""
TILE_WIDTH, TILE_HEIGHT = 322, 323
"""Tags of a TIFF: the size of a part, which may be larger than the image."""
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


class Hush:
    """Who is inside ``quiet``: how many, and what puts the filters of warnings back when the last one leaves."""

    def __init__(self) -> None:
        self.turn, self.inside, self.filters = threading.Lock(), 0, contextlib.ExitStack()


_HUSH = Hush()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow's warnings: odd EXIF or ICC tags do not change pixels, and large images are errors here.

    Python keeps its filters for all threads at once: the first thread inside sets them, the last puts them back.
    """
    with _HUSH.turn:
        if not _HUSH.inside:
            _HUSH.filters.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", category=UserWarning)
            warnings.simplefilter("ignore", category=Image.DecompressionBombWarning)
        _HUSH.inside += 1
    try:
        yield
    finally:
        with _HUSH.turn:
            _HUSH.inside -= 1
            if not _HUSH.inside:
                _HUSH.filters.close()


def open_image(source: Path | Encoded, to: Preprocessing | None = None) -> Image.Image:
    """Open an image file as upright 8-bit RGB; a corrupt or huge one is an error that names the file.

    It may be huge as it is, or once it is resized ``to`` what an encoder expects.
    """
    with quiet(), opened(source, to) as image:
        return image


@contextlib.contextmanager
def opened(source: Path | Encoded, to: Preprocessing | None = None) -> Iterator[Image.Image]:
    """Hold an image as ``open_image`` returns it, where somebody else has silenced the warnings.

    Sizes are looked at before pixels are; threads with large images wait for each other.
    """
    with corrupt(source), data_of(source) as file, Image.open(file, formats=FORMATS) as image:
        check_sizes(image, to)
        with ROOM.taken(math.prod(image.size)):
            yield to_rgb(upright(image))


def data_of(source: Path | Encoded) -> BinaryIO:
    """Open an image's bytes: Pillow maps what it opens by name, and scrambles TIFFs that lie on their side."""
    file: BinaryIO = source.open("rb") if isinstance(source, Path) else io.BytesIO(source.data)
    if isinstance(source, Encoded) and not source.data:
        fix = "replace it or remove it; a file that was read to its end has to be opened again"
        raise CorruptImage(f"image '{source}' is empty", fix)
    return file


class Room:
    """A number of pixels that threads share; who needs more than there are waits for all of them."""

    def __init__(self, pixels: int) -> None:
        self.pixels = self.left = pixels
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Take pixels for a while."""
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


ROOM = Room(PIXELS)
LOADING = threading.Lock()
"""Held while pixels of an image of Pillow are read: threads may share one, and Pillow reads it when it is looked at."""
Source = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray | Tensor
"""What an image may be given as: a path, an encoded file or its bytes, an image of Pillow, or uint8 pixels."""
ARRAYS = "uint8 values as [height, width], [height, width, 3] or, with transparency, [height, width, 4]"
CHANNELS_FIRST = "uint8 values as [3, height, width] (or 1 or 4 channels), as torchvision reads them"


def named(images: Source | Iterable[Source]) -> Iterator[tuple[str, Source]]:
    """Yield every image with its path, or its place among all as ``image 0``; a single one is one, not its parts."""
    pixels = isinstance(images, np.ndarray | Tensor) and images.ndim in (0, 2, 3)
    single = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)
    if pixels or single or hasattr(images, "read"):
        images = [images]  # type: ignore[list-item]
    if not isinstance(images, Iterable):
        raise TaskvecError(f"a {type(images).__name__} is no image", "give an image, or several in a list")
    for place, image in enumerate(images):
        yield str(os.fsdecode(image)) if isinstance(image, str | os.PathLike) else f"image {place}", image


def decode(image: Source, name: str, to: Preprocessing) -> Image.Image:
    """Return an image that is given in any way as upright 8-bit RGB; what is none is an error that names it."""
    with quiet(), corrupt(name):
        if isinstance(image, str | os.PathLike):
            if Path(name).is_dir():
                raise TaskvecError(f"'{name}' is a folder, not an image", f"give the images in it, such as {name}/*")
            return open_image(Path(name), to)
        content = image.read() if hasattr(image, "read") else image
        if isinstance(content, bytes | bytearray | memoryview):
            return open_image(Encoded(bytes(content), name), to)
        if isinstance(content, np.ndarray | Tensor):
            content = of_pixels(content, name)
        if isinstance(content, Image.Image):
            check_sizes(content, to)
            with LOADING:
                content = upright(content)
            return to_rgb(content)
    fix = "give a path, an image of Pillow, an array of pixels, a file opened in binary mode, or its bytes"
    raise TaskvecError(f"{name} is a {type(content).__name__}", fix)


def of_pixels(pixels: np.ndarray | Tensor, name: str) -> Image.Image:
    """Return an array of pixels, or a tensor with its channels first, as an image; other values are an error."""
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
    """Turn what decoders raise into a ``CorruptImage`` that names the image.

    Where the system refuses to read it, or has no memory, the error is another: the image may be sound.
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
    """Raise where an image, a part of it in its file, or what it becomes once it is resized ``to``, is too large."""
    check_size(image.size)
    check_size((tag(image, TILE_WIDTH, 1), tag(image, TILE_HEIGHT, 1)))
    if to is not None:
        check_size(resized(image.size, to))


def check_size(size: tuple[int, int]) -> None:
    """Raise for no pixels, and for a decompression bomb; Pillow refuses only twice as many pixels as it warns about."""
    limit = Image.MAX_IMAGE_PIXELS
    if not all(size):
        raise ValueError("it has no pixels")
    if limit is not None and math.prod(size) > limit:
        raise Image.DecompressionBombError(f"{size[0]} x {size[1]} pixels, more than {limit}")


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How an image is turned upright, by its orientation in EXIF."""


UNBOUNDED = "its values are {} numbers without a range; save it with 8 or 16 unsigned bits"
STEPS = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies greys of 2 and 4 bits by, but not the one of them that is transparent."""


def upright(image: Image.Image) -> Image.Image:
    """Read an image's pixels and turn them as its EXIF says; an EXIF that cannot be read says nothing."""
    deep = prepared(image)
    image.load()
    orientation = 1
    with contextlib.suppress(Exception):  # as many kinds as there are ways to damage it
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    turned = image.transpose(TURNS[orientation]) if orientation in TURNS else image
    if is_grey(image):
        return grey(turned, image)
    if deep and image.mode in ("RGB", "RGBA"):  # Pillow keeps the upper eight of 16 bits
        turned.info[PEAK] = 255 + 256 * max(high for _, high in image.getextrema()[:3])  # type: ignore[misc]
    return turned


def prepared(image: Image.Image) -> bool:
    """Note beside an image whose pixels are not read yet what Pillow leaves out; say whether it has 16 bits a channel.

    That is how many bits of a PNG were measured, and which of its greys is transparent.
    """
    layouts = [str(tile[3]) for tile in getattr(image, "tile", ())]
    deep = any(";16" in layout for layout in layouts)
    if isinstance(image, ImageFile.ImageFile) and image.format == "PNG":
        if deep:
            image.info[BITS] = significant_bits(image.fp)
        if "transparency" in image.info and layouts and layouts[0] in STEPS:
            image.info["transparency"] *= STEPS[layouts[0]]
    if tag(image, BITS_PER_SAMPLE, 1) == 8 and tag(image, SAMPLE_FORMAT, 1) == 2:
        raise ValueError(UNBOUNDED.format("signed"))
    return deep


def is_grey(image: Image.Image) -> bool:
    """Say whether an image is one channel of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def significant_bits(file: Any) -> int:
    """Return how many of a PNG's 16 bits were measured, as its sBIT chunk says; the place in the file is kept."""
    place, found = file.tell(), 16
    file.seek(8)
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind == b"sBIT":
            found = int.from_bytes(file.read(1), "big")
        if kind in (b"sBIT", b"IDAT"):
            break
        file.seek(length + 4, io.SEEK_CUR)
    file.seek(place)
    return found if 0 < found < 16 else 16


def grey(image: Image.Image, source: Image.Image) -> Image.Image:
    """Convert a channel of more than 8 bits to 8, by the range that the file gives its numbers; white may be zero."""
    values = np.asarray(image)
    low, high = sample_range(source, values)
    scaled: np.ndarray[Any, np.dtype[np.floating[Any]]]
    scaled = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    np.subtract(scaled, low, out=scaled)
    np.multiply(scaled, 255 / (high - low), out=scaled)
    np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled)
    if tag(source, PHOTOMETRIC, 1) == 0:
        np.subtract(255, scaled, out=scaled)
    if "transparency" in source.info:
        scaled[values == source.info["transparency"]] = 255
    found = Image.fromarray(scaled.astype(np.uint8))
    if (low, high) == (0, 65535):
        found.info[PEAK] = int(values.max(initial=0))
    return found


def tag(image: Image.Image, number: int, default: Any) -> Any:
    """Return a tag of the first channel of a TIFF; another image has the default."""
    found = image.tag_v2.get(number, default) if hasattr(image, "tag_v2") else default
    return found[0] if isinstance(found, tuple) else found


def sample_range(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """Return the numbers that are black and white: what a TIFF says, or all that so many unsigned bits can hold.

    A PNG's 16 bits are full range by the standard, but some writers leave measured bits in the lower places: they do
    where bits are said that are fewer, no value is beyond them, and the places below them are used.
    """
    if image.format != "TIFF":
        bits = image.info.get(BITS, 16)
        lower = bits < 16 and values.max(initial=0) < 2**bits and bool((values % 2 ** (16 - bits)).any())
        unknown = image.mode == "F" or (image.mode == "I" and image.format is None)
        known: tuple[float, float] | None = None if unknown else (0, 2 ** (bits if lower else 16) - 1)
    else:
        bits, unsigned = tag(image, BITS_PER_SAMPLE, 1), tag(image, SAMPLE_FORMAT, 1) == 1
        low, high = tag(image, LOWEST, 0 if unsigned else None), tag(image, HIGHEST, None)
        known = (0, 2**bits - 1) if unsigned and bits <= 16 else None
        known = known if low is None or high is None else (float(low), float(high))
    if known is None or not known[0] < known[1] or not np.isfinite(values).all():
        raise ValueError(UNBOUNDED.format("floating-point" if image.mode == "F" else "signed or 32-bit"))
    return known


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert 8-bit images of all kinds to RGB; transparency is laid on white."""
    peak: dict[str | tuple[int, int], Any] = {PEAK: image.info[PEAK]} if PEAK in image.info else {}
    if image.mode == "LAB":
        image = lab_to_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = peak
    return image


def lab_to_rgb(image: Image.Image) -> Image.Image:
    """Convert CIELAB to sRGB."""
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    found = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert found is not None
    return found


def resized(size: tuple[int, int], to: Preprocessing) -> tuple[int, int]:
    """Return the size of an image with its short side at size / crop, or of a square where it is squashed."""
    short = max(to.size, math.floor(to.size / to.crop))
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
