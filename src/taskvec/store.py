"""Content-addressed artifacts on disk: folders that appear whole, know what made them, and are checked when read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import reprlib
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from taskvec.errors import TaskvecError

Kind = TypeVar("Kind", bound="Record")
RECORD = "record.json"
NOTES = "notes.json"
"""What a step tells the user about its work: with the record, no part of an artifact's content."""


def canonical(value: Any) -> str:
    """Return JSON with sorted keys and no spaces; values that JSON cannot hold stably raise TypeError or ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def fingerprint(value: Any) -> str:
    """Return the first 20 hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:20]


def default_store() -> Path:
    """Return where artifacts are kept unless told: ``$TASKVEC_STORE``, or ``~/.cache/taskvec``."""
    return Path(os.environ.get("TASKVEC_STORE") or Path.home() / ".cache" / "taskvec")


def gigabytes(count: float) -> str:
    """Write a number of bytes for people: 48.5 GB, 12 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


REFUSED = (
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.ENFILE,
)
"""What a user can mend about a path: permissions, its kind or length, too many open files."""


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk or a refused write into one clear message that says where and how to go on."""
    try:
        yield
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


@dataclass(frozen=True)
class Artifact:
    """A finished folder: its id, where it lies, and the digest of its content (not of its record)."""

    id: str
    folder: Path
    digest: str

    def json(self, name: str) -> Any:
        """Read one of its JSON files."""
        return read_json(self.folder / name)

    def seconds(self) -> float:
        """Return the seconds that its step took, where and when it was run."""
        return float(read_json(self.folder / RECORD)["about"]["seconds"])

    def notes(self) -> list[str]:
        """Return what the step had to tell the user; damaged notes are told as such."""
        place = self.folder / NOTES
        try:
            notes = read_json(place) if place.exists() else []
        except TaskvecError:
            notes = None
        if isinstance(notes, list) and all(isinstance(one, str) for one in notes):
            return notes
        return [f"what this step noted is damaged; taskvec store --clear {self.id} makes it again"]


@dataclass(frozen=True)
class Held:
    """What a store holds of one artifact: its id, its kind (the name of its step's function), label and bytes."""

    id: str
    kind: str
    label: str
    size: int


class Store:
    """Artifacts by id under one folder; several processes may write to it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._checked: dict[str, Artifact] = {}

    def find(self, id: str) -> Artifact | None:
        """Return a finished artifact after checking its files against the record; a damaged one is removed."""
        if id in self._checked:
            return self._checked[id]
        folder = self._place(id)
        if not folder.is_dir():
            return None
        artifact = _checked(id, folder)
        if artifact is None:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        self._checked[id] = artifact
        return artifact

    def look(self, id: str) -> tuple[str, dict[str, Any]] | None:
        """Return an artifact's digest and what made it, by its record alone: for estimates, nothing is checked."""
        try:
            record = read_json(self._place(id) / RECORD)
            return fingerprint(record["files"]), record["about"]
        except (OSError, TaskvecError, KeyError, TypeError):
            return None

    def begin(self) -> Path:
        """Return a new temporary folder to write an artifact into; its name says which process made it."""
        folder = self.folder / "tmp" / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        with disk_errors(self.folder):
            folder.mkdir(parents=True)
        return folder

    def finish(self, id: str, folder: Path, about: dict[str, Any]) -> Artifact:
        """Write the record last, then rename the temporary folder into place; who comes second gives way."""
        place = self._place(id)
        try:
            with disk_errors(self.folder):
                write_json(folder / RECORD, {"about": about, "files": digests(folder)})
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    folder.rename(place)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    shutil.rmtree(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        artifact = self.find(id)
        if artifact is None:
            raise TaskvecError(f"artifact '{place}' was damaged while it was written", "check the disk and run again")
        return artifact

    def held(self) -> list[Held]:
        """Say what is kept, in the order of kind and label; a folder without a readable record is of kind damaged."""
        found = []
        for folder in (path for path in self.folder.glob("??/*") if path.is_dir()):
            kind, label = "damaged", folder.name
            with contextlib.suppress(OSError, TaskvecError, KeyError, TypeError):
                about = read_json(folder / RECORD)["about"]
                kind, label = str(about["function"]).rpartition(":")[2], str(about["label"])
            found.append(Held(folder.name, kind, label, _size(folder)))
        return sorted(found, key=lambda one: (one.kind, one.label, one.id))

    def unfinished(self) -> int:
        """Return the bytes of steps that are under way, or that another machine left when it was stopped."""
        return _size(self.folder / "tmp")

    def clear(self, ids: Iterable[str]) -> None:
        """Remove artifacts, each at once; what reads one now keeps its open files, and a run makes it again."""
        for id in ids:
            gone = self.begin()
            with contextlib.suppress(FileNotFoundError), disk_errors(self.folder):
                self._place(id).rename(gone / id)
            shutil.rmtree(gone, ignore_errors=True)
            self._checked.pop(id, None)

    def sweep(self) -> None:
        """Remove temporary folders that processes of this host left behind when they were killed."""
        for folder in (self.folder / "tmp").glob("*-*-*"):
            host, pid, _ = folder.name.rsplit("-", 2)
            if host == socket.gethostname() and not alive(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)

    def tree_digest(self, root: Path, files: Sequence[str]) -> str:
        """Return a digest of the content of ``files``, read again only when one of them may have changed."""
        seen, memo = self._tree(root, files)
        if (known := self._remembered(seen, memo)) is not None:
            return known
        digest = fingerprint({name: file_digest(root / name) for name in files if (root / name).exists()})
        with disk_errors(self.folder):
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_json(memo, {"seen": seen, "digest": digest})
        return digest

    def known_digest(self, root: Path, files: Sequence[str]) -> str:
        """Return the digest of files that ``tree_digest`` has read before; of others a name for them: none is read."""
        seen, memo = self._tree(root, files)
        return self._remembered(seen, memo) or f"not read: {fingerprint([str(root.resolve()), seen])}"

    def _tree(self, root: Path, files: Sequence[str]) -> tuple[str, Path]:
        """Return what tells whether files have changed, and where their digest is remembered.

        Copying tools keep sizes and times of modification; a file's number and the time of its inode are the disk's.
        """
        with disk_errors(root):
            stats = {name: (root / name).stat() for name in files if (root / name).exists()}  # no links to nothing
        seen = fingerprint({n: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for n, s in stats.items()})
        return seen, self.folder / "digests" / f"{fingerprint([str(root.resolve()), sorted(stats)])}.json"

    def _remembered(self, seen: str, memo: Path) -> str | None:
        with contextlib.suppress(OSError, TaskvecError, KeyError, TypeError):
            if (known := read_json(memo))["seen"] == seen:
                return str(known["digest"])
        return None

    def _place(self, id: str) -> Path:
        return self.folder / id[:2] / id


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder; what another process takes away meanwhile counts nothing."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file in a folder but its record and notes, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (RECORD, NOTES))
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def _checked(id: str, folder: Path) -> Artifact | None:
    try:
        files = read_json(folder / RECORD)["files"]
    except (OSError, TaskvecError, KeyError, TypeError):
        return None
    return Artifact(id, folder, fingerprint(files)) if files == digests(folder) else None


def alive(pid: int) -> bool:
    """Say whether a process of this number may be running on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
