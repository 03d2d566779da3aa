"""How a folder of transformers wants images to be seen: what the library's own image processor does to them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from taskvec.core.errors import TaskvecError, first_line
from taskvec.core.notes import note
from taskvec.data.images import RESAMPLING, Preprocessing, resize_and_crop
from taskvec.encoders.loaders.requests import LARGEST, check_view
from taskvec.paper.checkpoints import CLIP, HALF, IMAGENET, Channels

FILES = ("preprocessor_config.json", "processor_config.json")
"""What image processors are saved as; the second is transformers 5's for a model with texts."""
CLOSE = 0.02
"""How far pixels of 0..1 may be from the library's: resizing rounds differently, another view is tenths away."""
FIX = "resize the images yourself, or give a folder whose processor cuts squares out of them"


def preprocessing(folder: Path, kind: str, size: int | None) -> Preprocessing:
    """Return how a model wants to see images: as its folder's processor does, or else as most of its type do."""
    if any((folder / name).is_file() for name in FILES):
        return translated(read_processor(folder), str(folder))
    mean, std = usual(kind)
    note(f"'{folder}' has no {FILES[0]}: taking mean {list(mean)} and std {list(std)}, as usual for '{kind}'")
    return Preprocessing(size or 224, mean=mean, std=std)


def usual(kind: str) -> tuple[Channels, Channels]:
    """Return mean and standard deviation of most checkpoints of a type."""
    if kind.startswith("clip"):
        return CLIP
    halves = kind.startswith(("vit", "siglip", "beit", "data2vec", "mobilenet")) and kind not in ("vit_mae", "vit_msn")
    return (HALF, HALF) if halves else IMAGENET


def read_processor(folder: Path) -> Any:
    """Let transformers read the image processor of a folder; no code of the folder is run."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its readers raise errors of many kinds
        raise TaskvecError(
            f"the image processor in '{folder}' cannot be read: {first_line(error)[:200]}",
            f"copy {FILES[0]} again from where the model is from",
        ) from None


def translated(processor: Any, source: str) -> Preprocessing:
    """Return the view that gives what a processor gives, tried on an image that is not square; none raises."""
    image = ramps()
    check_sizes(processor, source)
    try:
        seen = np.asarray(processor(image, return_tensors="np")["pixel_values"][0], dtype=np.float64)
    except Exception as error:
        raise TaskvecError(f"the image processor in '{source}' fails: {first_line(error)[:200]}", FIX) from None
    name = type(processor).__name__
    if seen.ndim != 3 or seen.shape[1] != seen.shape[2]:
        raise TaskvecError(f"'{source}': {name} makes {list(seen.shape)} of an image, which is no square", FIX)
    views = [check_view(view, f"'{source}': {name}") for view in candidates(processor, seen.shape[1], source)]
    errors = [distance(view, image, seen) for view in views]
    if min(errors) > CLOSE:
        raise TaskvecError(f"'{source}': {name} sees images in a way that is not known here", FIX)
    return views[int(np.argmin(errors))]


def check_sizes(processor: Any, source: str) -> None:
    """Raise for sizes and shares that no processor has, before an image is made so large."""
    sizes = [*dict(processor.size or {}).values(), *dict(getattr(processor, "crop_size", None) or {}).values()]
    share = getattr(processor, "crop_pct", None)
    for size in (size for size in sizes if size is not None):
        if not isinstance(size, int) or not 0 < size <= LARGEST:
            raise TaskvecError(f"the image processor in '{source}' has a size of '{size}' px", FIX)
    if share is not None and (not isinstance(share, int | float) or not 0.1 <= share <= 1):
        raise TaskvecError(f"the image processor in '{source}' keeps a share of '{share}' of an image", FIX)


def ramps(width: int = 500, height: int = 300) -> Image.Image:
    """Return an image whose colours tell the place of a pixel: across, down, and both."""
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((255 * np.stack([across, down, across * down], axis=-1)).round().astype(np.uint8))


def candidates(processor: Any, size: int, source: str) -> Iterator[Preprocessing]:
    """Yield the views of ``size`` pixels that a processor's settings may mean: squashed or not, cropped or not."""
    mean, std = statistics(processor)
    given = dict(processor.size or {})
    side = int(given.get("shortest_edge") or given.get("height") or size)
    share = getattr(processor, "crop_pct", None) or 1.0
    for short in sorted({size, side, int(side / share), int(256 / 224 * side)}):  # the last is LeViT's
        for squash in (False, True):
            if short >= size:
                yield Preprocessing(size, crop_share(size, short), resampling(processor, source), mean, std, squash)


def crop_share(size: int, short: int) -> float:
    """Return the share of the short side that is kept, such that dividing by it gives ``short`` again."""
    share = size / short
    return share if math.floor(size / share) == short else math.nextafter(share, 0)


def resampling(processor: Any, source: str) -> str:
    """Return the name of a processor's way to resize; one that is not known raises."""
    value = Image.Resampling.BILINEAR if processor.resample is None else processor.resample
    names = [name for name, known in RESAMPLING.items() if known == value]
    if not names:
        raise TaskvecError(
            f"'{source}' wants images resized by PIL's method {value}", f"known: {', '.join(sorted(RESAMPLING))}"
        )
    return names[0]


def statistics(processor: Any) -> tuple[Channels, Channels]:
    """Return mean and standard deviation of pixels in 0..1: what a processor scales, shifts and divides by."""
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    offset = 1.0 if processor.do_rescale and getattr(processor, "rescale_offset", False) else 0.0
    mean, std = channels(processor.image_mean), channels(processor.image_std)
    division = std if getattr(processor, "include_top", False) else (1.0, 1.0, 1.0)  # EfficientNet's divides once more
    if not processor.do_normalize:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    first, second, third = ((m + offset) / scale for m in mean)
    one, two, three = (s * again / scale for s, again in zip(std, division, strict=True))
    return (first, second, third), (one, two, three)


def channels(values: Any) -> Channels:
    """Return three numbers, one a channel, from one for all or three."""
    try:
        first, second, third = np.broadcast_to(np.array(HALF if values is None else values, float), 3).tolist()
    except (ValueError, TypeError, OverflowError):
        raise TaskvecError(f"an image processor has '{values}' for three numbers, one a channel", FIX) from None
    return first, second, third


def distance(view: Preprocessing, image: Image.Image, seen: np.ndarray) -> float:
    """Return the largest difference between a view and what the library made of an image, in pixels of 0..1."""
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (view.mean, view.std))
    return float(np.abs(resize_and_crop(image, view) / 255 - (seen * std + mean)).max())
