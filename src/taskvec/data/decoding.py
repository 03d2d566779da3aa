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
from itertools import combinations
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
from taskvec.data.augment import ASPECT, crop_box, cut
from taskvec.data.images import CorruptImage, Preprocessing, corrupt, opened, quiet, resize_and_crop, shrink
from taskvec.data.index import Items, Labels, name_of
from taskvec.data.rgb import PEAK

CHUNK = 64
"""Images between two reports of progress."""
SAMPLES = 32
"""Images that are decoded to estimate the size of a cache of whole images."""
DARK = 2**14
"""The value of 16 bits below which the brightest image of a split is suspiciously dark."""
SPARE = 0.02
"""Share of an estimate that must stay free on the disk."""
Pixels = UInt8[np.ndarray, "3 height width"]
MakeView = Callable[[Image.Image, Preprocessing], Pixels]


@contextlib.contextmanager
def opened_item(items: Items, place: int, to: Preprocessing) -> Iterator[Image.Image]:
    """Yield an item as an RGB image: files are decoded, arrays taken as they are."""
    item = items[place]
    if isinstance(item, np.ndarray):
        with corrupt(f"number {place}"):
            yield Image.fromarray(item.transpose(1, 2, 0))
    else:
        with opened(item, to) as image:
            yield image


@dataclass
class Skipped:
    """Images of a split that could not be read: their indices, and what was wrong with each."""

    places: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def decode(
    items: Items,
    to: Preprocessing,
    make: MakeView = resize_and_crop,
    skipped: Skipped | None = None,
    workers: int = 0,
    peaks: list[int] | None = None,
) -> Iterator[tuple[int, Pixels]]:
    """Yield the index and the decoded view of every item, in order, made on ``workers`` threads (all cores for 0).

    A corrupt image is left out and added to ``skipped``; it raises where there is no ``skipped``. The highest values of
    files with 16 bits are added to ``peaks``.
    """
    peaks = [] if peaks is None else peaks

    def view(place: int) -> Pixels | TaskvecError:
        try:
            with opened_item(items, place, to) as image:
                peaks.extend([image.info[PEAK]] if PEAK in image.info else [])
                return make(image, to)
        except TaskvecError as error:
            return error

    with quiet(), ThreadPoolExecutor(workers or cores()) as pool:
        for start in range(0, len(items), CHUNK):
            places = range(start, min(start + CHUNK, len(items)))
            for place, pixels in zip(places, pool.map(view, places), strict=True):
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
class DecodedSplit:
    """The record of a decoded split: the indices of the images ``kept``, a digest of each view, the images skipped.

    ``peaks`` are the highest values of files with 16 bits, in no order.
    """

    kept: Int64[np.ndarray, " kept"]
    digests: tuple[bytes, ...]
    skipped: Skipped
    peaks: tuple[int, ...] = ()


def write_views(items: Items, to: Preprocessing, path: Path, skip: bool, progress: Progress) -> DecodedSplit:
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
    return DecodedSplit(np.array(kept, np.int64), tuple(digests), skipped, tuple(peaks))


def write_whole(
    items: Items, to: Preprocessing, folder: Path, skip: bool, progress: Progress
) -> Int64[np.ndarray, " kept"]:
    """Decode whole images into ``pixels.npy``, with sizes in ``shapes.npy``; return the indices of those kept."""
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
    """Report progress at the end of every chunk."""
    if (place + 1) % CHUNK == 0 or place + 1 == count:
        progress((place + 1) / count)


def _header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write the header of an .npy file, or write it anew: numpy leaves room for the first axis to grow."""
    file.seek(0)
    write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


@dataclass(frozen=True)
class Whole:
    """Whole training images on disk; ``crops`` is the protocol's training transform."""

    pixels: UInt8[np.ndarray, " bytes"]
    shapes: Int64[np.ndarray, "count 2"]

    @cached_property
    def starts(self) -> Int64[np.ndarray, " count"]:
        """The index of each image's first byte."""
        sizes: Int64[np.ndarray, " count"] = 3 * self.shapes.prod(axis=1)
        starts: Int64[np.ndarray, " count"] = sizes.cumsum() - sizes
        return starts

    def image(self, index: int) -> Pixels:
        """Return the pixels of one image."""
        (height, width), start = self.shapes[index].tolist(), self.starts[index]
        image: Pixels = self.pixels[start : start + 3 * height * width].reshape(3, height, width)
        return image

    def box(self, index: int, seed: int, step: int) -> tuple[int, int, int, int]:
        """Return a random part of one image: top, left, height and width.

        It comes from the seed, the step and the image's index alone.
        """
        height, width = self.shapes[index].tolist()
        return crop_box(height, width, np.random.default_rng((seed, step, index)))

    def longest_side(self) -> int:
        """Return how long a side of a crop can be: an aspect of 4/3 bounds it by the image's shorter side."""
        short, long = self.shapes.min(axis=1), self.shapes.max(axis=1)
        return int(np.minimum(long, np.ceil(ASPECT * short) + 1).max())

    def crops(
        self, indices: Sequence[int], seed: int, step: int, size: int, pool: ThreadPoolExecutor
    ) -> UInt8[np.ndarray, "batch 3 size size"]:
        """Return a random crop of each image, resized to size x size.

        Any number of workers gives the same.
        """

        def crop(index: int) -> Pixels:
            return cut(self.image(index), self.box(index, seed, step), size)

        return np.stack(list(pool.map(crop, map(int, indices))))


def read_whole(folder: Path, mmap_mode: Literal["r"] | None = "r") -> Whole:
    """Return a cache of whole images, which stay on disk until they are read."""
    return Whole(np.load(folder / "pixels.npy", mmap_mode=mmap_mode), np.load(folder / "shapes.npy"))


def view_bytes(images: float, size: int) -> float:
    """Return the size of a cache of evaluation views, in bytes."""
    return images * 3 * size * size


def whole_bytes(items: Items, to: Preprocessing) -> float:
    """Return an estimate of the size of a cache of whole images, in bytes, from a few that can be read."""
    places = np.unique(np.linspace(0, len(items) - 1, min(SAMPLES, len(items))).astype(int))
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


def decoding_notes(decoded: dict[str, DecodedSplit], items: dict[str, Items], labels: dict[str, Labels]) -> list[str]:
    """Return notes for the user on the decoded splits of a task: what is left out, dark, contradictory, or shared."""
    return [
        *left_out_images(decoded),
        *dark_images(decoded),
        *contradictory_labels(decoded, items, labels),
        *shared_images(decoded, items),
    ]


def left_out_images(decoded: dict[str, DecodedSplit]) -> list[str]:
    """Return a note for every split with images that could not be read: how many, and the first problem."""
    return [
        f"left out {len(split.skipped.places)} images of the {name} split: {split.skipped.problems[0]}"
        for name, split in decoded.items()
        if split.skipped.places
    ]


def dark_images(decoded: dict[str, DecodedSplit]) -> list[str]:
    """Return a note on splits whose 16-bit images use less than a quarter of their range."""
    peaks = {name: max(split.peaks) for name, split in decoded.items() if split.peaks and max(split.peaks) < DARK}
    if not peaks:
        return []
    bits = max(max(peaks.values()).bit_length(), 1)
    return [
        f"images of 16 bits in the {', '.join(peaks)} split have no value above {max(peaks.values())}, and are seen "
        f"nearly black: where they are numbers of {bits} bits, multiply them by {65535 / (2**bits - 1):.4g}"
    ]


def contradictory_labels(
    decoded: dict[str, DecodedSplit], items: dict[str, Items], labels: dict[str, Labels]
) -> list[str]:
    """Return a note for every split where images of equal pixels have different labels, with one pair of them."""
    notes = []
    for name, split in decoded.items():
        first: dict[bytes, int] = {}
        images = zip(split.digests, split.kept.tolist(), strict=True)
        pairs = [(first.setdefault(digest, place), place) for digest, place in images]
        differing = [pair for pair in pairs if np.any(labels[name][pair[0]] != labels[name][pair[1]])]
        if differing:
            original, copy = (name_of(items[name], name, place) for place in differing[0])
            notes.append(
                f"{len(differing)} images of the {name} split are there with another label too, "
                f"such as '{copy}', which is '{original}'"
            )
    return notes


def shared_images(decoded: dict[str, DecodedSplit], items: dict[str, Items]) -> list[str]:
    """Return a note for every two splits that share images of equal pixels, with one pair of them."""
    notes = []
    places: dict[str, dict[bytes, int]] = {
        name: dict(zip(reversed(split.digests), reversed(split.kept.tolist()), strict=True))
        for name, split in decoded.items()
    }
    for first, second in combinations(decoded, 2):
        shared = [digest for digest in decoded[second].digests if digest in places[first]]
        if shared:
            original, copy = (name_of(items[name], name, places[name][shared[0]]) for name in (first, second))
            notes.append(
                f"{len(shared)} images of the {second} split are in the {first} split too, "
                f"such as '{copy}', which is '{original}'"
            )
    return notes
