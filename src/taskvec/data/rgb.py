"""The pixels of an opened image file as upright 8-bit RGB, whatever its bits, colours and transparency."""

from __future__ import annotations

import contextlib
import io
import struct
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile

PEAK = "taskvec-peak"
"""The key of an image's ``info`` under which the highest value of a 16-bit file stands."""
PHOTOMETRIC, BITS_PER_SAMPLE, SAMPLE_FORMAT, LOWEST, HIGHEST = 262, 258, 339, 340, 341
"""Tags of a TIFF: whether zero is white, what its numbers are, and their range."""
BITS = "taskvec-bits"
"""The key of an image's ``info`` under which a PNG's number of significant bits stands."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns an image upright, by its orientation in EXIF."""
UNBOUNDED = "its values are {} numbers without a range; save it with 8 or 16 unsigned bits"
GREY_FACTORS = {"L;2": 85, "L;4": 17}
"""The factors by which Pillow scales greys of 2 and 4 bits to 8; it forgets the transparent grey."""


def upright(image: Image.Image) -> Image.Image:
    """Return an image with its pixels read, turned upright by its EXIF; a damaged EXIF is ignored."""
    deep = prepare(image)
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


def prepare(image: Image.Image) -> bool:
    """Return whether an image has 16 bits a channel, and mend what Pillow leaves out; its pixels are not read yet.

    Mended are the ``info`` of a PNG: its number of significant bits, and which grey is transparent.
    """
    layouts = [str(tile[3]) for tile in getattr(image, "tile", ())]
    deep = any(";16" in layout for layout in layouts)
    if isinstance(image, ImageFile.ImageFile) and image.format == "PNG":
        if deep:
            image.info[BITS] = significant_bits(image.fp)
        if "transparency" in image.info and layouts and layouts[0] in GREY_FACTORS:
            image.info["transparency"] *= GREY_FACTORS[layouts[0]]
    if tag(image, BITS_PER_SAMPLE, 1) == 8 and tag(image, SAMPLE_FORMAT, 1) == 2:
        raise ValueError(UNBOUNDED.format("signed"))
    return deep


def is_grey(image: Image.Image) -> bool:
    """Return whether an image has one channel of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def significant_bits(file: Any) -> int:
    """Return how many of a PNG's 16 bits are significant, by its sBIT chunk; the file's position is restored."""
    position, bits = file.tell(), 16
    file.seek(8)
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind == b"sBIT":
            bits = int.from_bytes(file.read(1), "big")
        if kind in (b"sBIT", b"IDAT"):
            break
        file.seek(length + 4, io.SEEK_CUR)
    file.seek(position)
    return bits if 0 < bits < 16 else 16


def grey(image: Image.Image, source: Image.Image) -> Image.Image:
    """Return an image of one deep channel with 8 bits, scaled by the range of its file; zero may be white."""
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
    result = Image.fromarray(scaled.astype(np.uint8))
    if (low, high) == (0, 65535):
        result.info[PEAK] = int(values.max(initial=0))
    return result


def tag(image: Image.Image, number: int, default: Any) -> Any:
    """Return a TIFF tag's value, for the first channel where there are several; the default for other images."""
    value = image.tag_v2.get(number, default) if hasattr(image, "tag_v2") else default
    return value[0] if isinstance(value, tuple) else value


def sample_range(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """Return the values of black and white: a TIFF's own, or the smallest and largest number of so many unsigned bits.

    A PNG's 16 bits are full range by the standard, but some writers leave fewer significant bits in the lower places.
    They do where the sBIT chunk says fewer, no value exceeds them, and places below the upper ones are used.
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
    """Return an 8-bit image of any mode as RGB; transparency is composited on white."""
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
    """Return a CIELAB image as sRGB."""
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert converted is not None
    return converted
