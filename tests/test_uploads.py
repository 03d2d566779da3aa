"""Arrays on a GPU: what is kept there and for how long, with a device that is made up."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taskvec.data import uploads
from taskvec.data.uploads import Resident, batches, on_device

DEVICE = "cuda:7"


class Stream:
    """A stream that orders nothing."""

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...


class Event:
    """An event, and what happened to it."""

    log: list[tuple[str, int]] = []  # noqa: RUF012

    def record(self, stream: Any) -> None:
        self.log.append(("record", id(self)))

    def synchronize(self) -> None:
        self.log.append(("synchronize", id(self)))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resident]:
    """A GPU that is in truth the CPU, with room for 1,000 bytes of arrays."""
    resident, empty = Resident("cpu", 1000), torch.empty
    monkeypatch.setattr(uploads, "resident_on", lambda device: resident)
    monkeypatch.setattr(uploads, "upload_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    def on_cpu(*shape: Any, device: str = "", pin_memory: bool = False, **how: Any) -> torch.Tensor:
        assert device in ("", "cpu", DEVICE)
        return empty(*shape, **how)

    monkeypatch.setattr(torch, "empty", on_cpu)
    Event.log.clear()
    yield resident


def images(count: int, seed: int = 0) -> np.ndarray:
    """Return images of 12 bytes."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 2, 2), dtype=np.uint8)


def together(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.clone() for part in parts])


@pytest.mark.parametrize("count", [1, 7, 8, 50, 200])  # 200 are more than are kept
@pytest.mark.parametrize("size", [3, 8, 300])
def test_every_image_arrives_whether_copies_are_kept_or_not(device: Resident, count: int, size: int) -> None:
    array = images(count)
    for _ in range(2):
        assert torch.equal(together(batches(array, size, DEVICE)), torch.from_numpy(array))
    assert bool(device.copies) == (count < 200)


def test_a_copy_is_made_once_and_ends_with_its_array(device: Resident) -> None:
    array = images(10)
    first = on_device(array, DEVICE)
    assert on_device(array, DEVICE).data_ptr() == first.data_ptr()
    assert next(iter(batches(array, 4, DEVICE))).data_ptr() == first.data_ptr()
    del array
    gc.collect()
    assert device.copies == {}


def test_those_not_used_for_longest_make_room(device: Resident) -> None:
    arrays = [images(30, seed) for seed in range(3)]  # 360 bytes each: two fit
    on_device(arrays[0], DEVICE)
    on_device(arrays[1], DEVICE)
    on_device(arrays[0], DEVICE)
    on_device(arrays[2], DEVICE)
    assert [device.find(array) is not None for array in arrays] == [True, False, True]


def test_an_upload_that_is_cut_short_is_not_kept(device: Resident) -> None:
    array = images(20)
    next(iter(batches(array, 4, DEVICE)))
    assert device.find(array) is None


def test_where_memory_is_short_batches_arrive_all_the_same(device: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    array, empty = images(20), torch.empty

    def short(*shape: Any, **how: Any) -> torch.Tensor:
        if shape == (array.shape,):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return empty(*shape, **how)

    monkeypatch.setattr(torch, "empty", short)
    assert torch.equal(together(batches(array, 8, DEVICE)), torch.from_numpy(array))
    assert device.find(array) is None


def test_pinned_memory_is_written_again_only_after_it_has_left(device: Resident) -> None:
    list(batches(images(200), 50, DEVICE))  # four batches, two buffers
    first, second = (entry for kind, entry in Event.log[:1] + Event.log[3:4])
    arrivals = [kind for kind, entry in Event.log if entry in (first, second)]
    assert arrivals == ["synchronize", "record"] * 4
    assert first != second


@given(count=st.integers(0, 20), size=st.integers(1, 25))
def test_on_a_cpu_batches_are_parts_of_the_array(count: int, size: int) -> None:
    array = images(count)
    parts = [part.numpy() for part in batches(array, size, "cpu")]
    assert [len(part) for part in parts[:-1]] == [size] * max(0, len(parts) - 1)
    assert np.array_equal(np.concatenate([array[:0], *parts]), array)


def test_on_a_cpu_a_tensor_shares_the_array(backbone: Any) -> None:
    labels = np.arange(5)
    assert on_device(labels, "cpu").data_ptr() == labels.ctypes.data
    array = images(5)
    assert backbone.resident(array) is array
