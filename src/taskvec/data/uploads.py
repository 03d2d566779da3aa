"""Arrays on a GPU: uploaded in batches through pinned memory while it computes, and kept there while they are used."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt8
from torch import Tensor

Images = UInt8[np.ndarray, "count 3 size size"] | UInt8[Tensor, "count 3 size size"]
"""Decoded images: in memory or on disk as an array, or on a device as a tensor; both are indexed alike."""
PART = 8
"""Arrays that a process keeps on a GPU take at most one part in so many of its memory, whatever else is there."""
CHUNK = 2**25
"""Bytes that are uploaded at once where nothing looks at them meanwhile."""


@dataclass
class Resident:
    """Arrays that lie on one device as well, by the ``id`` of each; the one that was used last comes last.

    All together have at most ``budget`` bytes: a further one displaces those that were not used for longest. One whose
    array is gone goes with it.
    """

    device: str
    budget: int
    copies: dict[int, tuple[weakref.ref[np.ndarray], Tensor]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def find(self, array: np.ndarray) -> Tensor | None:
        """Return the copy of an array, which then is the one used last; None where there is none."""
        with self.lock:
            reference, copy = self.copies.pop(id(array), (None, None))
            if reference is None or copy is None or reference() is not array:
                return None
            self.copies[id(array)] = reference, copy
            return copy

    def room(self, array: np.ndarray) -> Tensor | None:
        """Return an empty tensor for the copy of an array; None where it exceeds the budget, or memory is short."""
        if array.nbytes > self.budget:
            return None
        with self.lock:
            sizes = {key: copy.nbytes for key, (_, copy) in list(self.copies.items())}
            while sizes and sum(sizes.values()) + array.nbytes > self.budget:
                oldest = next(iter(sizes))
                del sizes[oldest]
                self.copies.pop(oldest, None)
        with contextlib.suppress(torch.cuda.OutOfMemoryError):  # batches do without
            return torch.empty(array.shape, dtype=dtype_of(array), device=self.device)
        return None

    def keep(self, array: np.ndarray, copy: Tensor) -> None:
        """Remember the copy of an array for as long as the array lives."""
        key = id(array)
        with self.lock:
            self.copies[key] = weakref.ref(array, lambda _: self.copies.pop(key, None)), copy


def resident_on(device: str) -> Resident:
    """Return the arrays that this process keeps on a GPU, by whichever of its names: ``cuda`` is the present one."""
    index = torch.device(device).index
    return resident_of(torch.cuda.current_device() if index is None else index)


@functools.cache
def resident_of(index: int) -> Resident:
    """Return the arrays that this process keeps on the GPU of a number."""
    return Resident(f"cuda:{index}", torch.cuda.get_device_properties(index).total_memory // PART)


def placed(indices: Int64[np.ndarray, " count"], device: str) -> Int64[Tensor, " count"]:
    """Return places in a tensor on a device; a GPU fetches them without waiting for what it computes."""
    places = torch.from_numpy(indices)
    return places.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else places


def on_device(array: Shaped[np.ndarray, "count ..."], device: str) -> Shaped[Tensor, "count ..."]:
    """Return an array as a tensor on a device: on a CPU around the same memory, on a GPU a copy that is kept there."""
    if not fits(array, device):
        return torch.from_numpy(array).to(device)
    resident = resident_on(device)
    copy = resident.find(array)
    if copy is None:
        for _ in uploaded(array, max(1, CHUNK // max(1, array[:1].nbytes)), device):
            pass
        copy = resident.find(array)
    return torch.from_numpy(array).to(device) if copy is None else copy


def fits(array: np.ndarray, device: str) -> bool:
    """Return whether a device is a GPU that an array is small enough to be kept on."""
    return device.startswith("cuda") and array.nbytes <= resident_on(device).budget


def batches(images: Images, size: int, device: str) -> Iterator[UInt8[Tensor, "batch 3 size size"]]:
    """Yield images in batches, on a GPU already there; who takes a batch queues its work before asking for the next."""
    if isinstance(images, np.ndarray) and device.startswith("cuda"):
        yield from uploaded(images, size, device)
        return
    for start in range(0, len(images), size):
        part = images[start : start + size]
        yield part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))


def uploaded(array: Shaped[np.ndarray, "count ..."], size: int, device: str) -> Iterator[Shaped[Tensor, "batch ..."]]:
    """Yield an array in batches on a GPU, from its copy there, or while it is uploaded; a copy that fits is kept."""
    resident = resident_on(device)
    if (copy := resident.find(array)) is not None:
        yield from (copy[start : start + size] for start in range(0, len(copy), size))
        return
    room = resident.room(array)
    yield from stream(array, size, device, room)
    if room is not None:
        resident.keep(array, room)


def stream(
    array: Shaped[np.ndarray, "count ..."], size: int, device: str, room: Shaped[Tensor, "count ..."] | None
) -> Iterator[Shaped[Tensor, "batch ..."]]:
    """Yield batches of an array as they arrive on a GPU: parts of ``room``, or of two buffers that are used in turn.

    A batch is copied to pinned memory by the CPU and from there by a stream of its own, while the GPU computes with
    those before. The CPU waits only where both pinned buffers are still on their way.
    """
    computing, uploading = torch.cuda.current_stream(device), upload_stream(device)
    size = max(1, min(size, len(array)))
    shape, dtype = (size, *array.shape[1:]), dtype_of(array)
    pinned = [torch.empty(shape, dtype=dtype, pin_memory=True) for _ in range(2)]
    buffers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2)] if room is None else [room]
    arrived, finished = [torch.cuda.Event(), torch.cuda.Event()], [torch.cuda.Event(), torch.cuda.Event()]
    uploading.wait_stream(computing)  # what was in this memory before may still be read
    for buffer in buffers:
        buffer.record_stream(uploading)
    for index, start in enumerate(range(0, len(array), size)):
        turn, part = index % 2, array[start : start + size]
        arrived[turn].synchronize()
        host = pinned[turn][: len(part)]
        np.copyto(host.numpy(), part)
        batch = buffers[turn][: len(part)] if room is None else room[start : start + size]
        with torch.cuda.stream(uploading):
            uploading.wait_event(finished[turn])
            batch.copy_(host, non_blocking=True)
            arrived[turn].record(uploading)
        computing.wait_event(arrived[turn])
        yield batch
        finished[turn].record(computing)


def dtype_of(array: np.ndarray) -> torch.dtype:
    """Return torch's name for the type of an array's numbers."""
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


@functools.cache
def upload_stream(device: str) -> torch.cuda.Stream:
    """Return the stream of a GPU that uploads."""
    return torch.cuda.Stream(device)
