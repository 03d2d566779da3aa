"""Files that appear whole or not at all: text, JSON and records in and out, digests, and clear errors of disks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from taskvec.core.errors import TaskvecError
from taskvec.core.locks import replacing

Kind = TypeVar("Kind", bound="Record")


def canonical(value: Any) -> str:
    """Return JSON with sorted keys and no spaces; values that JSON cannot hold stably raise TypeError or ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def fingerprint(value: Any) -> str:
    """Return the first 20 hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:20]


REFUSED = (
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.EINVAL,
    errno.EIO,
    errno.ENXIO,
    errno.ENODEV,
    errno.EBUSY,
    errno.ESTALE,
    errno.EOPNOTSUPP,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.ENFILE,
)
"""What a user can mend about a path: permissions, its kind or length, its disk, too many open files."""


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk or a refused write into one clear message that says where and how to go on."""
    try:
        yield
    except ValueError as error:
        if "null byte" in str(error):
            raise TaskvecError(f"{str(where)!r} is no path", "choose another") from None
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TaskvecError(
                f"no space left on the disk of '{where}'", "free some space and run again: it resumes"
            ) from None
        if error.errno in REFUSED:
            place = error.filename or where
            raise TaskvecError(
                f"cannot use '{place}': {error.strerror}", "mend its permissions or choose another"
            ) from None
        raise


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal; one that cannot be read is an error with its path."""
    with disk_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON that appears whole or not at all."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return the indented JSON that ``write_json`` writes."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is an error with its path."""
    try:
        with disk_errors(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TaskvecError(f"'{path}' is damaged: {error}", "run the study again, or restore the file") from None


class Record(BaseModel):
    """What a JSON file holds whose fields are known: values of their types only, and finite numbers."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def read_record(path: Path, kind: type[Kind]) -> Kind:
    """Read a JSON file as a record; the first field that is missing or odd is an error that says what it should be."""
    value = read_json(path)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        given = "" if first["type"] == "missing" else f", not {reprlib.repr(first['input'])}"
        raise TaskvecError(f"'{path}': {field}: {first['msg']}{given}", "restore the file, or make it again") from None


def is_within(name: str) -> bool:
    """Say whether a name is that of a file in a folder, by a path that does not leave it."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\0" not in name


def move_aside(path: Path, place: Path) -> Path:
    """Move what is at a path to a new place, whose name gets a number where it is taken; return where it is now."""
    names = itertools.chain([place.name], (f"{place.stem}-{n}{place.suffix}" for n in itertools.count(2)))
    free = next(place.with_name(name) for name in names if not os.path.lexists(place.with_name(name)))
    free.parent.mkdir(parents=True, exist_ok=True)
    path.rename(free)
    return free
