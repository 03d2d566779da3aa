"""Safetensors files and sharded folders, read in slices: memory does not grow with a model. No torch."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from collections.abc import Hashable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Float32, Shaped
from numpy import ndarray

from taskvec.core.errors import TaskvecError, did_you_mean
from taskvec.core.files import disk_errors, json_text
from taskvec.core.notes import note
from taskvec.weights.formats import format_of
from taskvec.weights.header import Metadata, Stored, are_texts, damaged, parse_json, read_header

INDEX = ".safetensors.index.json"
FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""Types that can be computed with, and how numpy holds their bytes (it has no bfloat16)."""
INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
LONGEST_NAME = 255
"""Bytes of the name of a shard."""
NESTED = 50
"""Levels that an index has at most."""
PIECE = 1 << 22
"""Bytes that are copied or compared at once."""
SAMPLE = 4096
"""Elements by which tensors are compared before they are read as a whole."""


class Checkpoint:
    """The tensors of one model, in one safetensors file or in the shards of a folder; open until closed."""

    def __init__(self, path: Path, label: str = "", part: str = "") -> None:
        """Open ``path``: a file, an index file, or a folder with either. Damaged or missing files raise.

        Of a ``part`` only the tensors are held whose names have it, such as ``teacher``.
        """
        self.path, self.label = path, label or path.name
        with disk_errors(path):
            self.files, self.index, self.index_name = _find(path)
        self.tensors: dict[str, Stored] = {}
        self.metadata: list[Metadata] = []
        self._handles: list[int] = []
        self._tie_keys: dict[str, Hashable] = {}
        self._digests: dict[str, bytes] = {}
        try:
            for number, file in enumerate(self.files):
                self._open(number, file)
            self._check_index()
            self._narrow(part)
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
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
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
        dtype = FLOATS[stored.dtype]
        raw: Shaped[ndarray, " count"] = (
            room if room is not None and stored.dtype == "F32" else np.empty(stop - start, dtype)
        )
        self._fill(stored, start * dtype.itemsize, raw.view(np.uint8).data)
        return widen(raw, stored.dtype)

    def pieces(self, name: str) -> Iterator[tuple[int, bytearray]]:
        """Yield the bytes of any tensor, piece by piece with their position in it."""
        stored = self.tensors[name]
        for start in range(0, stored.length, PIECE):
            piece = bytearray(min(PIECE, stored.length - start))
            self._fill(stored, start, memoryview(piece))
            yield start, piece

    def tie_key(self, name: str) -> Hashable:
        """Return what tied tensors have in common: type, shape, first elements; the name of one that can have no twin.

        Tensors of fewer than two dimensions, and those that begin with one value only, are alike by chance.
        """
        if name not in self._tie_keys:
            stored, start = self.tensors[name], b""
            if len(stored.shape) > 1 and stored.dtype in FLOATS:
                first = self.read(name, 0, min(stored.size, SAMPLE))
                start = hashlib.blake2b(first.tobytes()).digest() if len(np.unique(first)) > 1 else b""
            self._tie_keys[name] = (stored.dtype, stored.shape, start) if start else name
        return self._tie_keys[name]

    @cached_property
    def by_tie_key(self) -> dict[Hashable, list[str]]:
        """All names by tie key: only those of one key can be tied."""
        groups: dict[Hashable, list[str]] = {}
        for name in self.tensors:
            groups.setdefault(self.tie_key(name), []).append(name)
        return groups

    def tie_digest(self, name: str) -> Hashable:
        """Return what only tied tensors share: the tie key, and a digest of all bytes if there can be a twin."""
        if name not in self._digests:
            digest = hashlib.blake2b()
            for _, piece in self.pieces(name) if self.tie_key(name) != name else ():
                digest.update(piece)
            self._digests[name] = digest.digest()
        return self.tie_key(name), self._digests[name]

    def _fill(self, stored: Stored, start: int, buffer: memoryview) -> None:
        done, path = 0, self.files[stored.file]
        while done < len(buffer):
            with disk_errors(path):
                count = os.preadv(self._handles[stored.file], [buffer[done:]], stored.start + start + done)
            if not count:
                raise damaged(path, "it was cut short while it was read")
            done += count

    def _open(self, number: int, file: Path) -> None:
        with disk_errors(file):
            handle = open_file(file, os.O_RDONLY)
        self._handles.append(handle)
        metadata, tensors = read_header(handle, number, file)
        for name in tensors:
            if name in self.tensors:
                raise damaged(file, f"tensor '{name}' is also in '{self.files[self.tensors[name].file].name}'")
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

    def _narrow(self, part: str) -> None:
        """Hold the tensors of a part alone."""
        held = {name: stored for name, stored in self.tensors.items() if not part or f".{part}." in f".{name}"}
        if part and not held:
            known = [name.partition(".")[0] for name in self.tensors]
            raise TaskvecError(f"'{self.path}' has no part '{part}'", did_you_mean(part, dict.fromkeys(known)))
        if other := len(self.tensors) - len(held):
            note(f"'{self.path}': took '{part}', not the other {other} tensors")
        self.tensors = held


def open_file(path: Path, flags: int) -> int:
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


def same_tensor(first: Checkpoint, name: str, second: Checkpoint, other: str) -> bool:
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


def distinct(names: Iterable[str]) -> list[str]:
    """Return names with a number behind those that came before."""
    unique: list[str] = []
    for name in names:
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        candidates = itertools.chain([name], numbered)
        unique.append(next(candidate for candidate in candidates if candidate not in unique))
    return unique


def _speaking(path: Path) -> tuple[str, ...]:
    """Return the parts of a path without its suffix; a file called model or pytorch_model says nothing."""
    path = Path(os.path.normpath(path.absolute()))
    name = path.name.removesuffix(INDEX).removesuffix(".safetensors")
    return path.parts[1:-1] if path.is_file() and name in ("model", "pytorch_model") else (*path.parts[1:-1], name)


def _find(path: Path) -> tuple[tuple[Path, ...], dict[str, Any] | None, str]:
    """Return the files of a checkpoint, and its index and the name of that if it has one."""
    path = _single(path) if path.is_dir() else path
    if not path.is_file():
        raise TaskvecError(f"no weights at '{path}'", "give a .safetensors file, or a folder with a model in it")
    return (*_indexed(path), path.name) if path.name.endswith(INDEX) else ((path,), None, "")


def _single(folder: Path) -> Path:
    """Return the file of a folder's weights, or its index; as transformers does, a whole model goes before an index."""
    indices, files = sorted(folder.glob(f"*{INDEX}")), sorted(folder.glob("*.safetensors"))
    complete = [file for file in files if file.with_name(file.stem + INDEX) in indices]
    candidates = complete or indices or files
    if len(candidates) == 1:
        tell_other(candidates[0])
        return candidates[0]
    others = [(file.name, what) for file in sorted(folder.iterdir()) if (what := format_of(file.name))]
    if not candidates and others:
        raise TaskvecError(f"'{folder}' holds {others[0][1][0]} ('{others[0][0]}')", others[0][1][1])
    names = ", ".join(file.name for file in candidates[:4]) or "none"
    raise TaskvecError(
        f"'{folder}' holds no single model: there should be one *{INDEX} or *.safetensors (found: {names})",
        "name the file itself; pickled weights must be saved as safetensors first",
    )


def tell_other(weights: Path) -> None:
    """Tell of an index beside a whole model: its parts are other weights, which are not read."""
    index = weights.with_name(weights.stem + INDEX)
    if weights.suffix == ".safetensors" and index.is_file():
        note(f"'{weights.parent}' holds two sets of weights: took '{weights.name}', not those of '{index.name}'")


def read_index(path: Path) -> dict[str, Any]:
    """Read an index of weights in several files, which lie in its folder or below."""
    try:
        index = parse_json(path.read_bytes())
        if not are_texts(index["weight_map"]) or not isinstance(index.get("metadata") or {}, dict):
            raise TypeError("weight_map is to map names to files, and metadata to be a mapping")
        if _nested(index):
            raise ValueError(f"more than {NESTED} levels")
        json_text(index).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"no index of shards ({error})") from None
    for name in set(index["weight_map"].values()):
        parts, odd = Path(name).parts, "\0" in name or len(name.encode()) > LONGEST_NAME
        if odd or not parts or Path(name).is_absolute() or ".." in parts:
            raise TaskvecError(
                f"'{path}' names '{name}', which is no file of its folder", "copy the whole folder again"
            )
    return dict(index)


def _nested(value: Any, levels: int = NESTED) -> bool:
    """Say whether containers are nested more than so many levels deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_nested(item, levels - 1) for item in inner)


def _indexed(path: Path) -> tuple[tuple[Path, ...], dict[str, Any]]:
    """Read an index; every file it names lies beside it."""
    index = read_index(path)
    files = tuple(path.parent / name for name in sorted(set(index["weight_map"].values())))
    for file in files:
        if file.parent != path.parent or not file.is_file():
            raise TaskvecError(
                f"'{path}' names the shard '{file.name}', which is not beside it", "copy the missing shard"
            )
    return files, index


def widen(raw: Shaped[ndarray, " count"], dtype: str) -> Shaped[ndarray, " count"]:
    """Return stored numbers as float32 (float64 stays), exactly."""
    if dtype == "BF16":
        bits = raw.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return raw if dtype in ("F32", "F64") else raw.astype(np.float32)
