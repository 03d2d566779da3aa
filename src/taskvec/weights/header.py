"""The header of a safetensors file: which tensors it holds, of which type and shape, and where. No torch."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec.core.errors import TaskvecError
from taskvec.weights.formats import format_of

HEADER_LIMIT = 100_000_000
DIMENSIONS = 60
"""Dimensions that a tensor may have; numpy and torch know no more than 64, some for all checkpoints together."""
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt"})

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


def read_header(handle: int, number: int, path: Path) -> tuple[Metadata, dict[str, Stored]]:
    """Read and check a safetensors header: ranges of bytes follow one another and fill the file."""
    if other := format_of(path.name):
        raise TaskvecError(f"'{path}' is {other[0]}", other[1])
    if path.suffix in PICKLES:
        raise TaskvecError(
            f"'{path}' is a pickle by its name, and unpickling can run code",
            "save it with safetensors.torch.save_file first",
        )
    size = os.fstat(handle).st_size
    length = int.from_bytes(os.pread(handle, 8, 0), "little")
    if size < 8 or length > min(size - 8, HEADER_LIMIT):
        raise damaged(path, "it has no header, or was cut short")
    try:
        header = parse_json(os.pread(handle, length, 8))
        metadata = header.pop("__metadata__", None)
        if not are_texts({} if metadata is None else metadata):
            raise TypeError("__metadata__ is no mapping of texts")
        tensors = {name: _stored(info, number, 8 + length) for name, info in header.items()}
        "".join([*tensors, *(text for pair in (metadata or {}).items() for text in pair)]).encode()
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise damaged(path, f"its header is wrong ({error})") from None
    end = 8 + length
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].length)))
    for name, stored in tensors.items():
        each = bits(stored.dtype)
        if stored.start != end or stored.length < 0 or (each and (stored.size * each + 7) // 8 != stored.length):
            raise damaged(path, f"the bytes of '{name}' are not where they should be")
        end += stored.length
    if end != size:
        raise damaged(path, f"it has {size} bytes, and its header tells of {end}")
    return metadata, tensors


def are_texts(found: Any) -> bool:
    """Say whether something is a mapping of texts to texts."""
    return isinstance(found, dict) and all(isinstance(value, str) for value in found.values())


def bits(dtype: str) -> int:
    """Return the bits of an element by its type's name (F8_E4M3: 8), 0 where it does not say."""
    match = re.search(r"\d{1,4}", dtype)
    return 8 if dtype == "BOOL" else int(match.group()) if match else 0


def _stored(info: Mapping[str, Any], number: int, origin: int) -> Stored:
    start, stop = info["data_offsets"]
    shape, dtype = info["shape"], info["dtype"]
    if not isinstance(shape, list) or len(shape) > DIMENSIONS:
        raise TypeError(f"a shape is a list of at most {DIMENSIONS} whole numbers")
    if not isinstance(dtype, str) or not re.fullmatch(r"[A-Z][A-Z0-9_]{1,15}", dtype):
        raise TypeError("a type has a name such as F32")
    for count in (start, stop, *shape):
        if type(count) is not int:
            raise TypeError(f"{count} is no whole number")
    if math.prod(max(1, count) for count in shape) >= 2**63 or not all(
        0 <= count < 2**63 for count in (*shape, start, stop)
    ):
        raise ValueError("a number is negative, or larger than any file")
    return Stored(dtype, tuple(shape), number, origin + start, stop - start)


def damaged(path: Path, why: str) -> TaskvecError:
    """Return the error for a file that is no whole safetensors file."""
    return TaskvecError(f"'{path}' cannot be read as safetensors: {why}", "is it complete? copy or convert it again")


def parse_json(data: bytes) -> Any:
    """Parse JSON as the standard has it: UTF-8, each key once, no NaN and infinity; else a ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            raise ValueError("a key stands twice")
        return mapping

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    return json.loads(data.decode(), object_pairs_hook=once, parse_constant=refuse)
