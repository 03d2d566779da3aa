"""Random batches of a task's training images, augmented where labels stay right; every draw comes from the seed.

Draws are made on the CPU, so that every device sees the same images. On a GPU pixels lie on the device where they fit:
draws are then small, and a batch is gathered, normalised and cropped there. Else a thread prepares pixels ahead.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

from taskvec.core.machine import cores
from taskvec.core.task_types import CLASSIFICATION, TASK_TYPES
from taskvec.core.training import index_batches
from taskvec.data.augment import crop_grids, crop_parts
from taskvec.data.decoding import Whole
from taskvec.data.images import Preprocessing, normalise
from taskvec.data.resampling import largest_scale, resized_crops
from taskvec.data.tasks import Split
from taskvec.data.uploads import Images, fits, on_device
from taskvec.encoders.backbone import Backbone

Batch = tuple[Float[Tensor, "batch 3 size size"], Shaped[Tensor, "batch ..."]]
Draw = tuple[Tensor, ...]
"""What is drawn for a batch: indices of images, then perhaps how they are cropped, or their pixels."""
AHEAD = 100
"""Batches of nothing but indices that are copied to a GPU at once: they take little to draw."""
TOGETHER = 4
"""Small draws that are copied to a GPU at once: more would keep the CPU from launching steps for too long."""


@dataclass(frozen=True)
class Stream:
    """Random batches without end: ``draws`` are made on the CPU, and ``make`` turns one into a batch on the device.

    Draws that are ``heavy`` hold pixels.
    """

    draws: Iterator[Draw]
    make: Callable[[Draw], Batch]
    heavy: bool = False

    def uploaded(self, device: str) -> Iterator[Draw]:
        """Yield the draws on the device, where ``make`` takes them.

        A thread makes heavy ones ahead. Small ones take less time than threads that wait for each other; while they are
        made a GPU has steps to do.
        """
        if device == "cpu":
            return self.draws
        return uploads(prefetched(stacks(self.draws, 1)) if self.heavy else stacks(self.draws, TOGETHER), device)


def training_batches(
    backbone: Backbone, split: Split, batch_size: int, seed: int, kind: str = CLASSIFICATION
) -> Iterator[Batch]:
    """Yield normalised batches forever, on the backbone's device, augmented where the kind's labels stay right."""
    stream = training_stream(backbone, split, batch_size, seed, kind)
    return map(stream.make, stream.uploaded(backbone.device))


def training_stream(backbone: Backbone, split: Split, batch_size: int, seed: int, kind: str = CLASSIFICATION) -> Stream:
    """Return the random batches of a split.

    Where it has whole images, crops are cut from them, else from the evaluation views.
    """
    labels, crops = torch.from_numpy(split.labels).to(backbone.device), TASK_TYPES[kind].crops
    to, on_gpu = backbone.preprocessing, backbone.device != "cpu"
    if split.whole is None or not crops:
        pixels = backbone.resident(split.images)
        return views(pixels, labels, to, batch_size, seed, crops, on_gpu and not isinstance(pixels, Tensor))
    small = split.whole.longest_side() <= largest_scale() * to.size
    there = small and fits(split.whole.pixels, backbone.device)
    return (crops_there if there else crops_here)(split.whole, labels, to, batch_size, seed)


def views(
    pixels: Images,
    labels: Shaped[Tensor, "count ..."],
    to: Preprocessing,
    batch_size: int,
    seed: int,
    crops: bool,
    carried: bool = False,
) -> Stream:
    """Return batches of evaluation views, cropped where ``crops``.

    Draws have indices of pixels that lie where batches are made; those from elsewhere are ``carried`` by the draws.
    """

    def drawn() -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(seed)
        for indices in index_batches(len(labels), batch_size, seed):
            parts = (crop_parts(len(indices), generator),) if crops else ()
            yield indices, *parts, *((gathered(pixels, indices),) if carried else ())

    def make(draw: Draw) -> Batch:
        indices, *parts = draw
        images = parts.pop() if carried else gathered(pixels, indices)
        inputs = normalise(images, to, str(labels.device))
        return crop_grids(inputs, parts[0]) if crops else inputs, labels[indices]

    return Stream(drawn(), make, heavy=carried)


def gathered(
    images: UInt8[np.ndarray, "count 3 size size"] | UInt8[Tensor, "count 3 size size"],
    indices: Int64[Tensor, " batch"],
) -> UInt8[Tensor, "batch 3 size size"]:
    """Return some images of an array or a tensor."""
    return images[indices] if isinstance(images, Tensor) else torch.from_numpy(images[indices.numpy()])


def crops_here(
    whole: Whole, labels: Shaped[Tensor, "count ..."], to: Preprocessing, batch_size: int, seed: int
) -> Stream:
    """Return batches of crops that Pillow makes on the CPU's cores."""
    cropped = cropped_batches(whole, batch_size, to.size, seed)
    draws = ((indices, torch.from_numpy(crops)) for indices, crops in cropped)
    return Stream(draws, lambda draw: (normalise(draw[1], to, str(labels.device)), labels[draw[0]]), heavy=True)


def crops_there(
    whole: Whole, labels: Shaped[Tensor, "count ..."], to: Preprocessing, batch_size: int, seed: int
) -> Stream:
    """Return batches of crops that a device makes of whole images which lie there, as the labels do."""
    device, side = str(labels.device), whole.longest_side()
    pixels, starts, shapes = (on_device(array, device) for array in (whole.pixels, whole.starts, whole.shapes))

    def drawn() -> Iterator[Draw]:
        for step, indices in enumerate(index_batches(len(whole.shapes), batch_size, seed)):
            yield indices, torch.tensor([whole.box(index, seed, step) for index in indices.tolist()])

    def make(draw: Draw) -> Batch:
        indices, boxes = draw
        crops = resized_crops(pixels, starts[indices], shapes[indices], boxes, side, to.size)
        return normalise(crops, to, device), labels[indices]

    return Stream(drawn(), make)


def cropped_batches(
    whole: Whole, batch_size: int, size: int, seed: int, workers: int = 0
) -> Iterator[tuple[Int64[Tensor, " batch"], UInt8[np.ndarray, "batch 3 size size"]]]:
    """Yield indices and random crops of whole images forever, each batch made while the one before is trained on.

    They come from the seed alone, whatever the number of ``workers`` (all cores for 0).
    """
    with ThreadPoolExecutor(workers or cores()) as pool, ThreadPoolExecutor(1) as ahead:
        coming: deque[tuple[Tensor, Future[UInt8[np.ndarray, "batch 3 size size"]]]] = deque()
        for step, indices in enumerate(index_batches(len(whole.shapes), batch_size, seed)):
            coming.append((indices, ahead.submit(whole.crops, indices.tolist(), seed, step, size, pool)))
            if step:
                chosen, images = coming.popleft()
                yield chosen, images.result()


def stacks(draws: Iterator[Draw], count: int) -> Iterator[Draw]:
    """Yield so many draws at a time, stacked."""
    while True:
        yield tuple(torch.stack(parts) for parts in zip(*itertools.islice(draws, count), strict=True))


def prefetched(draws: Iterator[Draw]) -> Iterator[Draw]:
    """Yield draws, each made by a thread while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, draws)
        while True:
            draw = coming.result()
            coming = pool.submit(next, draws)
            yield draw


def uploads(stacked: Iterator[Draw], device: str) -> Iterator[Draw]:
    """Yield single draws on a device out of stacked ones, which a GPU copies from pinned memory when it comes to it."""
    for parts in stacked:
        pinned = [part.pin_memory() for part in parts] if device.startswith("cuda") else parts
        yield from zip(*(part.to(device, non_blocking=True).unbind() for part in pinned), strict=True)


def index_stream(count: int, batch_size: int, seed: int, device: str) -> Iterator[Int64[Tensor, " batch"]]:
    """Yield the batches of ``index_batches`` on a device: many are copied to a GPU at once."""
    batches = index_batches(count, batch_size, seed)
    if device == "cpu":
        return batches
    return (indices for (indices,) in uploads(stacks(((indices,) for indices in batches), AHEAD), device))
