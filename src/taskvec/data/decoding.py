"""The two decoded caches: evaluation views, size x size, and whole training images that crops are cut from.

Both are built on all cores. An image is a row of a uint8 file that is opened as a memory map; the evaluation view is
bit-equal to what PIL gives without a cache. A whole image is kept with its short side at size / crop, never upscaled.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from jaxtyping import Int64, UInt8
from numpy.lib.format import write_array_header_1_0
from PIL import Image

from taskvec.core.errors import TaskvecError
from taskvec.core.formatting import bytes_text
from taskvec.core.machine import cores
from taskvec.core.progress import Progress
from taskvec.data.augment import crop_box, cut
from taskvec.data.images import CorruptImage, Preprocessing, corrupt, opened, quiet, resize_and_crop, shrink
from taskvec.data.index import Items, Labels, name_of
from taskvec.data.rgb import PEAK

CHUNK = 64
"""Images that are decoded between two reports of progress."""
SAMPLE = 32
"""Images whose size is looked at to estimate the size of a cache of whole images."""
DARK = 2**14
"""A value of 16 bits below which the brightest image of a split is suspiciously dark."""
SPARE = 0.02
"""Share of an estimate that must be free beside it."""
Pixels = UInt8[np.ndarray, "3 height width"]
Views = Callable[[Image.Image, Preprocessing], Pixels]


@contextlib.contextmanager
def opened_item(items: Items, place: int, to: Preprocessing) -> Iterator[Image.Image]:
    """Hold an item as an RGB image: files are read, arrays taken as they are."""
    item = items[place]
    if isinstance(item, np.ndarray):
        with corrupt(f"number {place}"):
            yield Image.fromarray(item.transpose(1, 2, 0))
    else:
        with opened(item, to) as image:
            yield image


@dataclass
class Skipped:
    """Images that could not be read, by place in their split, with what was wrong; None in place of it to refuse."""

    places: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def decode(
    items: Items,
    to: Preprocessing,
    make: Views = resize_and_crop,
    skipped: Skipped | None = None,
    workers: int = 0,
    peaks: list[int] | None = None,
) -> Iterator[tuple[int, Pixels]]:
    """Yield the place and the decoded view of every item, in order, made on ``workers`` threads (all cores for 0).

    A corrupt image raises, or is left out and noted in ``skipped``. The highest values of files with 16 bits are
    added to ``peaks``.
    """
    peaks = [] if peaks is None else peaks

    def one(place: int) -> Pixels | TaskvecError:
        try:
            with opened_item(items, place, to) as image:
                peaks.extend([image.info[PEAK]] if PEAK in image.info else [])
                return make(image, to)
        except TaskvecError as error:
            return error

    with quiet(), ThreadPoolExecutor(workers or cores()) as pool:
        for start in range(0, len(items), CHUNK):
            places = range(start, min(start + CHUNK, len(items)))
            for place, pixels in zip(places, pool.map(one, places), strict=True):
                if not isinstance(pixels, TaskvecError):
                    yield place, pixels
                elif not isinstance(pixels, CorruptImage):
                    raise pixels
                elif skipped is None:
                    raise TaskvecError(pixels.problem, f"{pixels.fix}, or let the study say skip_corrupt: true")
                else:
                    skipped.places.append(place)
                    skipped.problems.append(pixels.problem)


@dataclass(frozen=True)
class Written:
    """What became of a split: the places of the images that were kept, a digest of each view, and what was skipped.

    ``peaks`` are the highest values of files with 16 bits, in no order.
    """

    kept: Int64[np.ndarray, " kept"]
    digests: tuple[bytes, ...]
    skipped: Skipped
    peaks: tuple[int, ...] = ()


def write_views(items: Items, to: Preprocessing, path: Path, skip: bool, progress: Progress) -> Written:
    """Decode the evaluation views of a split into an .npy file of uint8, count x 3 x size x size."""
    kept, digests, skipped = [], [], Skipped()
    peaks: list[int] = []
    with path.open("wb") as file:  # written, not mapped: a full disk is an error, not a crash
        _header(file, (len(items), 3, to.size, to.size))
        for place, pixels in decode(items, to, skipped=skipped if skip else None, peaks=peaks):
            file.write(pixels.tobytes())
            kept.append(place)
            digests.append(hashlib.blake2b(pixels.tobytes(), digest_size=16).digest())
            report(place, len(items), progress)
        _header(file, (len(kept), 3, to.size, to.size))
    return Written(np.array(kept, np.int64), tuple(digests), skipped, tuple(peaks))


def write_whole(
    items: Items, to: Preprocessing, folder: Path, skip: bool, progress: Progress
) -> Int64[np.ndarray, " kept"]:
    """Decode whole images into ``pixels.npy``, one after another, with sizes in ``shapes.npy``; return those kept."""
    shapes, kept, skipped = [], [], Skipped()
    with (folder / "pixels.npy").open("wb") as file:
        _header(file, (0,))
        for place, pixels in decode(items, to, shrink, skipped if skip else None):
            file.write(pixels.tobytes())
            shapes.append(pixels.shape[1:])
            kept.append(place)
            report(place, len(items), progress)
        _header(file, (sum(3 * height * width for height, width in shapes),))
    np.save(folder / "shapes.npy", np.array(shapes, np.int64).reshape(-1, 2))
    return np.array(kept, np.int64)


def report(place: int, count: int, progress: Progress) -> None:
    """Report progress once a chunk."""
    if (place + 1) % CHUNK == 0 or place + 1 == count:
        progress((place + 1) / count)


def _header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write the header of an .npy file, or write it again: numpy leaves room for the first axis to grow."""
    file.seek(0)
    write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


@dataclass(frozen=True)
class Whole:
    """Whole training images on disk; ``crops`` is the protocol's training transform."""

    pixels: UInt8[np.ndarray, " bytes"]
    shapes: Int64[np.ndarray, "count 2"]

    @cached_property
    def starts(self) -> Int64[np.ndarray, " count"]:
        """Where each image begins."""
        sizes: Int64[np.ndarray, " count"] = 3 * self.shapes.prod(axis=1)
        starts: Int64[np.ndarray, " count"] = sizes.cumsum() - sizes
        return starts

    def image(self, index: int) -> Pixels:
        """Return one image."""
        (height, width), start = self.shapes[index].tolist(), self.starts[index]
        image: Pixels = self.pixels[start : start + 3 * height * width].reshape(3, height, width)
        return image

    def crops(
        self, indices: Sequence[int], seed: int, step: int, size: int, pool: ThreadPoolExecutor
    ) -> UInt8[np.ndarray, "batch 3 size size"]:
        """Return a random crop of each image, resized to size x size.

        An image's draw comes from the seed, the step and its index alone: any number of workers gives the same.
        """

        def one(index: int) -> Pixels:
            image = self.image(index)
            generator = np.random.default_rng((seed, step, index))
            return cut(image, crop_box(image.shape[1], image.shape[2], generator), size)

        return np.stack(list(pool.map(one, map(int, indices))))


def read_whole(folder: Path, mmap_mode: Literal["r"] | None = "r") -> Whole:
    """Open a cache of whole images; they stay on disk until they are looked at."""
    return Whole(np.load(folder / "pixels.npy", mmap_mode=mmap_mode), np.load(folder / "shapes.npy"))


def view_bytes(images: float, size: int) -> float:
    """Return the bytes of a cache of evaluation views."""
    return images * 3 * size * size


def whole_bytes(items: Items, to: Preprocessing) -> float:
    """Estimate the bytes of a cache of whole images from a few of them; what cannot be read counts for nothing."""
    places = np.unique(np.linspace(0, len(items) - 1, min(SAMPLE, len(items))).astype(int))
    sample = [items[place] for place in places.tolist()]
    sizes = [pixels.size for _, pixels in decode(sample, to, shrink, Skipped())]  # type: ignore[arg-type]
    return float(np.mean(sizes)) * len(items) if sizes else 0.0


def check_room(needed: float, folder: Path, what: str) -> None:
    """Raise if a cache would not fit on its disk."""
    free = shutil.disk_usage(folder).free
    if needed * (1 + SPARE) > free:
        raise TaskvecError(
            f"decoding {what} takes about {bytes_text(needed)}, and '{folder}' has {bytes_text(free)} free",
            "free some space (taskvec store lists and clears), choose another --store, or set a smaller size or limit",
        )


def twins(written: dict[str, Written], items: dict[str, Items]) -> list[str]:
    """Say which images are in two splits, pixel for pixel as the encoder sees them, with the first pair's paths."""
    found, splits = [], list(written)
    places: dict[str, dict[bytes, int]] = {
        split: dict(zip(reversed(one.digests), reversed(one.kept.tolist()), strict=True))
        for split, one in written.items()
    }
    for index, first in enumerate(splits):
        for second in splits[index + 1 :]:
            both = [digest for digest in written[second].digests if digest in places[first]]
            if both:
                pair = [name_of(items[split], split, places[split][both[0]]) for split in (first, second)]
                found.append(
                    f"{len(both)} images of the {second} split are in the {first} split too, "
                    f"such as '{pair[1]}', which is '{pair[0]}'"
                )
    return found


def doubles(written: dict[str, Written], items: dict[str, Items], labels: dict[str, Labels]) -> list[str]:
    """Say which images of a split have two labels, pixel for pixel as the encoder sees them, with a pair's paths."""
    found = []
    for split, one in written.items():
        first: dict[bytes, int] = {}
        pairs = [(first.setdefault(digest, place), place) for digest, place in zip(one.digests, one.kept, strict=True)]
        two = [pair for pair in pairs if np.any(labels[split][pair[0]] != labels[split][pair[1]])]
        if two:
            names = [name_of(items[split], split, int(place)) for place in two[0]]
            found.append(
                f"{len(two)} images of the {split} split are there with another label too, "
                f"such as '{names[1]}', which is '{names[0]}'"
            )
    return found


def dark(written: dict[str, Written]) -> list[str]:
    """Say in which splits no image of 16 bits has a value above a quarter of what they hold."""
    peaks = {split: max(one.peaks) for split, one in written.items() if one.peaks and max(one.peaks) < DARK}
    if not peaks:
        return []
    bits = max(max(peaks.values()).bit_length(), 1)
    return [
        f"images of 16 bits in the {', '.join(peaks)} split have no value above {max(peaks.values())}, and are seen "
        f"nearly black: where they are numbers of {bits} bits, multiply them by {65535 / (2**bits - 1):.4g}"
    ]


def skips(written: dict[str, Written]) -> list[str]:
    """Say how many images could not be read, and which came first."""
    return [
        f"left out {len(one.skipped.places)} images of the {split} split: {one.skipped.problems[0]}"
        for split, one in written.items()
        if one.skipped.places
    ]
