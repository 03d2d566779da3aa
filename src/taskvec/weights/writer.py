"""Safetensors files and sharded folders, written in slices, that appear whole or not at all. No torch."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Shaped
from numpy import ndarray

from taskvec.core.errors import TaskvecError
from taskvec.core.files import disk_errors
from taskvec.core.formatting import bytes_text
from taskvec.core.locks import beside, holding, workspace
from taskvec.weights.header import Metadata, Shape, Stored, bits
from taskvec.weights.reader import FLOATS, Checkpoint, open_file

LARGEST = {"F64": math.inf} | {
    dtype: float.fromhex(limit)
    for dtype, limit in (("F32", "0x1.ffffffp127"), ("F16", "0x1.ffep15"), ("BF16", "0x1.ffp127"))
}
"""The magnitude from which on a value rounds to infinity."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def narrow(values: Shaped[ndarray, " count"], dtype: str) -> Shaped[ndarray, " count"]:
    """Return float32 or float64 numbers as a type stores them, rounded to nearest (ties to even); NaN stays NaN."""
    if dtype != "BF16":
        return values.astype(FLOATS[dtype], copy=False)
    bits = to_odd(values).view(np.uint32) if values.dtype == np.float64 else values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    lost = np.isnan(values)
    if lost.any():
        rounded[lost] = 0x7FC0
    return rounded.astype(np.uint16)


def to_odd(values: Float64[ndarray, " count"]) -> Float32[ndarray, " count"]:
    """Return float64 numbers as float32, inexact ones as the neighbour with an odd last bit.

    Rounding that to nearest again, at two bits less or fewer, gives what rounding once would give.
    """
    near = values.astype(np.float32)
    exact = near.astype(np.float64)
    bits = near.view(np.uint32)
    bits -= np.abs(exact) > np.abs(values)
    bits |= exact != values
    return near


def peak(values: Shaped[ndarray, " count"]) -> float:
    """Return the largest magnitude, without a copy; NaN if there is one, 0 where there is nothing."""
    return float(np.maximum(values.max(), -values.min())) if values.size else 0.0


@dataclass(frozen=True)
class Shard:
    """A file to be written: its name, its metadata, and its tensors by name with type and shape, in order."""

    name: str
    metadata: Metadata
    tensors: Mapping[str, tuple[str, Shape, int]]
    """Type, shape and bytes of each."""

    @property
    def length(self) -> int:
        """Bytes of all its tensors."""
        return sum(length for *_, length in self.tensors.values())

    def header(self) -> bytes:
        """Return what stands before the tensors: the length of the header, and the header, padded to 8 bytes."""
        entries: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        end = 0
        for name, (dtype, shape, length) in self.tensors.items():
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + length]}
            end += length
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def shards(base: Checkpoint, dtype: str | None = None, limit: int | None = None, one: str = "") -> list[Shard]:
    """Lay out a model with the base's tensors: as the base is, in one file called ``one``, or in files up to ``limit``.

    ``dtype`` replaces the type of floating-point tensors; ``limit`` is in bytes, and a larger tensor has its own file.
    """
    sized = {name: _sized(stored, dtype) for name, stored in base.tensors.items()}
    sized = dict(sorted(sized.items(), key=lambda item: -_alignment(item[1])))
    everything = {key: value for held in base.metadata for key, value in (held or {}).items()}
    metadata = everything if any(held is not None for held in base.metadata) else None
    if limit is not None:
        groups = _groups(sized, limit)
        names = [f"{base.stem}-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
        return [Shard(name, metadata, group) for name, group in zip(names, groups, strict=True)]
    if one:
        return [Shard(one, metadata, sized)]
    held = [{name: sized[name] for name in sized if base.tensors[name].file == i} for i in range(len(base.files))]
    return [Shard(file.name, about, of) for file, about, of in zip(base.files, base.metadata, held, strict=True) if of]


def _sized(stored: Stored, dtype: str | None) -> tuple[str, Shape, int]:
    if dtype is None or stored.dtype not in FLOATS:
        return stored.dtype, stored.shape, stored.length
    return dtype, stored.shape, stored.size * FLOATS[dtype].itemsize


def _alignment(sized: tuple[str, Shape, int]) -> int:
    """Return the bytes of an element, so that larger ones come first and all lie at multiples of their size."""
    dtype, *_ = sized
    return max(1, bits(dtype) // 8)


def _groups(sized: Mapping[str, tuple[str, Shape, int]], limit: int) -> list[dict[str, tuple[str, Shape, int]]]:
    groups: list[dict[str, tuple[str, Shape, int]]] = [{}]
    used = 0
    for name, tensor in sized.items():
        if groups[-1] and used + tensor[2] > limit:
            groups.append({})
            used = 0
        groups[-1][name] = tensor
        used += tensor[2]
    return groups


class Writer:
    """Files of a model under way in a folder; tensors are written in pieces, in any order and by any thread."""

    def __init__(self, folder: Path, shards: Iterable[Shard]) -> None:
        """Write the headers of ``shards`` into ``folder``."""
        self.places: dict[str, tuple[int, int]] = {}
        self._handles: list[int] = []
        self._left = 0
        self._counting = threading.Lock()
        try:
            for shard in shards:
                self._begin(folder / shard.name, shard)
        except BaseException:
            self.close()
            raise

    def _begin(self, path: Path, shard: Shard) -> None:
        path.parent.mkdir(exist_ok=True)
        handle = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._handles.append(handle)
        header = shard.header()
        _write(handle, memoryview(header), 0)
        place = len(header)
        for name, (_, _, length) in shard.tensors.items():
            self.places[name] = handle, place
            place += length
        self._left += shard.length

    def write(self, name: str, start: int, data: memoryview | bytearray) -> None:
        """Write bytes of a tensor from its byte ``start`` on."""
        handle, place = self.places[name]
        _write(handle, memoryview(data), place + start)
        with self._counting:
            self._left -= len(data)

    def finish(self) -> None:
        """Close the files; every byte has been written, or it is an error of the program."""
        if self._left:
            raise RuntimeError(f"{self._left} bytes of tensors were not written")
        self.close()

    def close(self) -> None:
        """Close the files, complete or not."""
        while self._handles:
            os.close(self._handles.pop())


def check_space(path: Path, needed: int) -> None:
    """Raise before anything is written if the disk of ``path`` has fewer than ``needed`` bytes free."""
    parent = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise TaskvecError(
            f"'{path}' needs {bytes_text(needed)} and its disk has {bytes_text(free)} left",
            "free some space, or choose another disk",
        )


def _write(handle: int, data: memoryview, place: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], place + done)


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Write ``path`` as the only process during a block; raise if another does."""
    busy = TaskvecError(f"another process is writing '{path}'", "wait for it to end, or choose another --out")
    with ExitStack() as stack:
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(holding(path.with_name(f"{beside(path)}taskvec-lock"), busy))
        yield


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` to write into, removed after the block; a full or closed disk raises.

    Folders that killed processes have left beside ``path`` are removed as well.
    """
    with disk_errors(path.parent):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with workspace(path) as folder:
                yield folder
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise TaskvecError(
                f"no space left for '{path}' ({error.strerror}); nothing was written",
                "free some, or choose another disk",
            ) from None
