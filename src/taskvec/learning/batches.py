"""Random batches of a task's training images, augmented where labels stay right; every draw comes from the seed.

Draws are made on the CPU, so that every device sees the same images. On a GPU pixels lie on the device where they fit:
draws are then small, and a batch is gathered, normalised and cropped there. Else threads prepare pixels ahead.
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
AHEAD = 32
"""Small draws that are made and copied to a GPU at once; of draws with pixels it is one."""


@dataclass(frozen=True)
class Stream:
    """Random batches without end: ``draws`` are made on the CPU, and ``make`` turns one into a batch on the device."""

    draws: Iterator[Draw]
    make: Callable[[Draw], Batch]
    ahead: int = AHEAD

    def uploaded(self, device: str) -> Iterator[Draw]:
        """Yield the draws on the device, where ``make`` takes them."""
        return self.draws if device == "cpu" else uploads(self.draws, device, self.ahead)


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

    return Stream(drawn(), make, 1 if carried else AHEAD)


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
    return Stream(draws, lambda draw: (normalise(draw[1], to, str(labels.device)), labels[draw[0]]), 1)


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


def uploads(draws: Iterator[Draw], device: str, count: int) -> Iterator[Draw]:
    """Yield draws on a GPU: ``count`` of them are made by a thread while others are used, and copied at once."""

    def stacked() -> list[Tensor]:
        together = [torch.stack(parts) for parts in zip(*itertools.islice(draws, count), strict=True)]
        return [part.pin_memory() for part in together] if device.startswith("cuda") else together

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(stacked)
        while True:
            parts = [part.to(device, non_blocking=True) for part in coming.result()]
            coming = pool.submit(stacked)
            yield from zip(*(part.unbind() for part in parts), strict=True)
