"""Safetensors files and sharded folders, read and written in slices: memory does not grow with a model. No torch."""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Float32, Shaped
from numpy import ndarray

from taskvec.errors import TaskvecError
from taskvec.store import alive, disk_errors

INDEX = ".safetensors.index.json"
FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""Types that can be computed with, and how numpy holds their bytes (it has no bfloat16)."""
INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
LARGEST = {"F64": math.inf} | {
    dtype: float.fromhex(limit)
    for dtype, limit in (("F32", "0x1.ffffffp127"), ("F16", "0x1.ffep15"), ("BF16", "0x1.ffp127"))
}
"""The magnitude from which on a value rounds to infinity."""
HEADER_LIMIT = 100_000_000
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt"})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
PIECE = 1 << 22
"""Bytes that are copied or compared at once."""

Shape = tuple[int, ...]
Metadata = Mapping[str, str] | None


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type as safetensors writes it, shape, the file's number, first byte, number of bytes."""

    dtype: str
    shape: Shape
    file: int
    start: int
    length: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


# ---------------------------------------------------------------- reading


class Checkpoint:
    """The tensors of one model, in one safetensors file or in the shards of a folder; open until closed."""

    def __init__(self, path: Path, label: str = "") -> None:
        """Open ``path``: a file, an index file, or a folder with either. Damaged or missing files raise."""
        self.path, self.label = path, label or path.name
        self.files, self.index, self.index_name = _find(path)
        self.tensors: dict[str, Stored] = {}
        self.metadata: list[Metadata] = []
        self._handles: list[int] = []
        try:
            for number, file in enumerate(self.files):
                self._open(number, file)
            self._check_index()
        except BaseException:
            self.close()
            raise

    @property
    def stem(self) -> str:
        """The name that a folder's weights go by, ``model`` or what its library calls them; ``model`` for a file."""
        if self.index is not None:
            return self.index_name.removesuffix(INDEX)
        return self.files[0].stem if self.path.is_dir() else "model"

    def __enter__(self) -> Self:
        """Stay open for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all files."""
        self.close()

    def close(self) -> None:
        """Close all files."""
        while self._handles:
            os.close(self._handles.pop())

    @property
    def sharded(self) -> bool:
        """Whether an index says which file holds what."""
        return self.index is not None

    def read(
        self, name: str, start: int, stop: int, room: Float32[ndarray, " count"] | None = None
    ) -> Float[ndarray, " count"]:
        """Return the elements from ``start`` to ``stop`` of a flattened tensor as float32 (float64 stays), exactly.

        They are read into ``room`` where it is given and they are stored as float32.
        """
        stored = self.tensors[name]
        kind = FLOATS[stored.dtype]
        raw: Shaped[ndarray, " count"] = (
            room if room is not None and stored.dtype == "F32" else np.empty(stop - start, kind)
        )
        self._fill(stored, start * kind.itemsize, raw.view(np.uint8).data)
        return widen(raw, stored.dtype)

    def pieces(self, name: str) -> Iterator[tuple[int, bytearray]]:
        """Yield the bytes of any tensor, piece by piece with their position in it."""
        stored = self.tensors[name]
        for start in range(0, stored.length, PIECE):
            piece = bytearray(min(PIECE, stored.length - start))
            self._fill(stored, start, memoryview(piece))
            yield start, piece

    def _fill(self, stored: Stored, start: int, buffer: memoryview) -> None:
        done, path = 0, self.files[stored.file]
        while done < len(buffer):
            with disk_errors(path):
                count = os.preadv(self._handles[stored.file], [buffer[done:]], stored.start + start + done)
            if not count:
                raise _damaged(path, "it was cut short while it was read")
            done += count

    def _open(self, number: int, file: Path) -> None:
        with disk_errors(file):
            handle = _open(file, os.O_RDONLY)
        self._handles.append(handle)
        metadata, tensors = _header(handle, number, file)
        for name in tensors:
            if name in self.tensors:
                raise _damaged(file, f"tensor '{name}' is also in '{self.files[self.tensors[name].file].name}'")
        self.tensors |= tensors
        self.metadata.append(metadata)

    def _check_index(self) -> None:
        if self.index is None:
            return
        listed = self.index["weight_map"]
        for name in {**listed, **self.tensors}:
            held = self.files[self.tensors[name].file].name if name in self.tensors else "no file"
            if listed.get(name) != held:
                where = f"in '{listed[name]}'" if name in listed else "nowhere"
                raise TaskvecError(
                    f"the index of '{self.path}' lists tensor '{name}' {where}, and {held} holds it",
                    "is the folder complete? copy or convert it again",
                )


def _open(path: Path, flags: int) -> int:
    """Open a file; many shards may need more open files than a process is given at first."""
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return os.open(path, flags, 0o666)


def same(first: Checkpoint, name: str, second: Checkpoint, other: str) -> bool:
    """Say whether two tensors have the same type, shape and bytes."""
    a, b = first.tensors[name], second.tensors[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(p == q for (_, p), (_, q) in zip(first.pieces(name), second.pieces(other), strict=True))


def labels(paths: Iterable[Path]) -> list[str]:
    """Return short names that tell checkpoints apart: the last parts of their paths, as many as it takes."""
    parts = [_speaking(path) for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        short = ["/".join(part[-depth:]) for part in parts]
        if len(set(short)) == len(short):
            return short
    return [f"{part[-1]} ({number})" for number, part in enumerate(parts, 1)]


def _speaking(path: Path) -> tuple[str, ...]:
    """Return the parts of a path without its suffix; a file called model or pytorch_model says nothing."""
    path = path.absolute()
    name = path.name.removesuffix(INDEX).removesuffix(".safetensors")
    return path.parts[1:-1] if path.is_file() and name in ("model", "pytorch_model") else (*path.parts[1:-1], name)


def _find(path: Path) -> tuple[tuple[Path, ...], dict[str, Any] | None, str]:
    """Return the files of a checkpoint, and its index and the name of that if it has one."""
    if path.is_dir():
        indices = sorted(path.glob(f"*{INDEX}"))
        found = indices or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(one.name for one in found[:4]) or "none"
            raise TaskvecError(
                f"'{path}' holds no single model: there should be one *{INDEX} or *.safetensors (found: {names})",
                "name the file itself; pickled weights must be saved as safetensors first",
            )
        path = found[0]
    if not path.is_file():
        raise TaskvecError(f"no weights at '{path}'", "give a .safetensors file, or a folder with a model in it")
    return (*_indexed(path), path.name) if path.name.endswith(INDEX) else ((path,), None, "")


def _indexed(path: Path) -> tuple[tuple[Path, ...], dict[str, Any]]:
    """Read an index; every file it names lies beside it."""
    try:
        index = json.loads(path.read_text("utf-8"))
        names = sorted(set(index["weight_map"].values()))
        if not _texts(index["weight_map"]) or not isinstance(index.get("metadata") or {}, dict):
            raise TypeError("weight_map is to map names to files, and metadata to be a mapping")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"no index of shards ({error})") from None
    for name in names:
        if Path(name).name != name or not (path.parent / name).is_file():
            raise TaskvecError(f"'{path}' names the shard '{name}', which is not beside it", "copy the missing shard")
    return tuple(path.parent / name for name in names), index


def _header(handle: int, number: int, path: Path) -> tuple[Metadata, dict[str, Stored]]:
    """Read and check a safetensors header: ranges of bytes follow one another and fill the file."""
    if path.suffix in PICKLES:
        raise TaskvecError(
            f"'{path}' is a pickle by its name, and unpickling can run code",
            "save it with safetensors.torch.save_file first",
        )
    size = os.fstat(handle).st_size
    length = int.from_bytes(os.pread(handle, 8, 0), "little")
    if size < 8 or length > min(size - 8, HEADER_LIMIT):
        raise _damaged(path, "it has no header, or was cut short")
    try:
        header = json.loads(os.pread(handle, length, 8))
        metadata = header.pop("__metadata__", None)
        if not _texts({} if metadata is None else metadata):
            raise TypeError("__metadata__ is no mapping of texts")
        tensors = {name: _stored(info, number, 8 + length) for name, info in header.items()}
        "".join(tensors).encode()
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _damaged(path, f"its header is wrong ({error})") from None
    end = 8 + length
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].length)))
    for name, stored in tensors.items():
        bits = _bits(stored.dtype)
        unlike = bits and (stored.size * bits + 7) // 8 != stored.length
        if stored.start != end or stored.length < 0 or min(stored.shape, default=0) < 0 or unlike:
            raise _damaged(path, f"the bytes of '{name}' are not where they should be")
        end += stored.length
    if end != size:
        raise _damaged(path, f"it has {size} bytes, and its header tells of {end}")
    return metadata, tensors


def _texts(found: Any) -> bool:
    """Say whether something is a mapping of texts to texts."""
    return isinstance(found, dict) and all(isinstance(value, str) for value in found.values())


def _bits(dtype: str) -> int:
    """Return the bits of an element by its type's name (F8_E4M3: 8), 0 where it does not say."""
    found = re.search(r"\d+", dtype)
    return 8 if dtype == "BOOL" else int(found.group()) if found else 0


def _stored(info: Mapping[str, Any], number: int, origin: int) -> Stored:
    start, stop = info["data_offsets"]
    for count in (start, stop, *info["shape"]):
        if type(count) is not int:
            raise TypeError(f"{count} is no whole number")
    return Stored(str(info["dtype"]), tuple(info["shape"]), number, origin + start, stop - start)


def _damaged(path: Path, why: str) -> TaskvecError:
    return TaskvecError(f"'{path}' cannot be read as safetensors: {why}", "is it complete? copy or convert it again")


# ---------------------------------------------------------------- numbers


def widen(raw: Shaped[ndarray, " count"], dtype: str) -> Shaped[ndarray, " count"]:
    """Return stored numbers as float32 (float64 stays), exactly."""
    if dtype == "BF16":
        bits = raw.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return raw if dtype in ("F32", "F64") else raw.astype(np.float32)


def narrow(values: Shaped[ndarray, " count"], dtype: str) -> Shaped[ndarray, " count"]:
    """Return float32 or float64 numbers as a type stores them, rounded to nearest (ties to even); NaN stays NaN."""
    if dtype != "BF16":
        return values.astype(FLOATS[dtype], copy=False)
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    lost = np.isnan(values)
    if lost.any():
        rounded[lost] = 0x7FC0
    return rounded.astype(np.uint16)


def peak(values: Shaped[ndarray, " count"]) -> float:
    """Return the largest magnitude, without a copy; NaN if there is one, 0 where there is nothing."""
    return float(np.maximum(values.max(), -values.min())) if values.size else 0.0


# ---------------------------------------------------------------- writing


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
    return [
        Shard(file.name, base.metadata[i], {name: sized[name] for name in sized if base.tensors[name].file == i})
        for i, file in enumerate(base.files)
    ]


def _sized(stored: Stored, dtype: str | None) -> tuple[str, Shape, int]:
    if dtype is None or stored.dtype not in FLOATS:
        return stored.dtype, stored.shape, stored.length
    return dtype, stored.shape, stored.size * FLOATS[dtype].itemsize


def _alignment(sized: tuple[str, Shape, int]) -> int:
    """Return the bytes of an element, so that larger ones come first and all lie at multiples of their size."""
    dtype, *_ = sized
    return max(1, _bits(dtype) // 8)


def _groups(sized: Mapping[str, tuple[str, Shape, int]], limit: int) -> list[dict[str, tuple[str, Shape, int]]]:
    groups: list[dict[str, tuple[str, Shape, int]]] = [{}]
    used = 0
    for name, one in sized.items():
        if groups[-1] and used + one[2] > limit:
            groups.append({})
            used = 0
        groups[-1][name] = one
        used += one[2]
    return groups


class Writer:
    """Files of a model under way in a folder; tensors are written in pieces, in any order."""

    def __init__(self, folder: Path, shards: Iterable[Shard]) -> None:
        """Write the headers of ``shards`` into ``folder``."""
        self.places: dict[str, tuple[int, int]] = {}
        self._handles: list[int] = []
        self._left = 0
        try:
            for shard in shards:
                self._begin(folder / shard.name, shard)
        except BaseException:
            self.close()
            raise

    def _begin(self, path: Path, shard: Shard) -> None:
        path.parent.mkdir(exist_ok=True)
        handle = _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
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
            f"'{path}' needs {needed / 2**30:.2f} GiB and its disk has {free / 2**30:.2f} GiB left",
            "free some space, or choose another disk",
        )


def _write(handle: int, data: memoryview, place: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], place + done)


@contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` to write into, removed after the block; a full or closed disk raises.

    Folders that killed processes of this host have left beside ``path`` are removed as well.
    """
    start = f".{path.name.encode()[:100].decode(errors='ignore')}.{socket.gethostname()}-"
    temporary = path.with_name(f"{start}{os.getpid()}-{uuid.uuid4().hex[:6]}.tmp")
    with disk_errors(path.parent):
        for left in path.parent.glob(f"{glob.escape(start)}*-*.tmp"):
            process = left.name.removeprefix(start).partition("-")[0]
            if process.isdecimal() and not alive(int(process)):
                shutil.rmtree(left, ignore_errors=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise TaskvecError(
                f"no space left for '{path}' ({error.strerror}); nothing was written",
                "free some, or choose another disk",
            ) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
