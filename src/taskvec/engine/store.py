"""Content-addressed artifacts on disk: folders that appear whole, know what made them, and are checked when read."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import stat
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec.core.errors import TaskvecError
from taskvec.core.files import (
    disk_errors,
    file_digest,
    fingerprint,
    is_within,
    json_text,
    move_aside,
    read_json,
    write_json,
    write_text,
)
from taskvec.core.locks import abandoned, claim, sweep
from taskvec.core.notes import note

RECORD = "record.json"
NOTES = "notes.json"
"""What a step tells the user about its work: with the record, no part of an artifact's content."""
MARKER = ".taskvec-store"
"""The file that tells a store from other folders."""
DAMAGED, FOREIGN = "damaged", "foreign"
"""Folders of a store: damaged artifacts, and what others had put into artifacts that were cleared."""
ID = re.compile("[0-9a-f]{20}")
ASIDE = re.compile(r"[0-9a-f]{20}(-\d+)?")
SESSION = re.compile("[0-9a-f]{12}")
Stamp = list[int]
"""The size of a file in bytes, and the time of its last modification in nanoseconds."""


def default_store() -> Path:
    """Return where artifacts are kept unless told: ``$TASKVEC_STORE``, or ``~/.cache/taskvec``."""
    return Path(os.environ.get("TASKVEC_STORE") or Path.home() / ".cache" / "taskvec")


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
        """Return the seconds that its step took, where and when it was run; NaN where its record does not tell."""
        return seconds(read_json(self.folder / RECORD)["about"])

    def notes(self) -> list[str]:
        """Return what the step had to tell the user; damaged notes are told as such."""
        place = self.folder / NOTES
        try:
            notes = read_json(place) if place.exists() else []
        except (OSError, TaskvecError):
            notes = None
        if isinstance(notes, list) and all(isinstance(text, str) for text in notes):
            return notes
        return [f"what this step noted is damaged; taskvec store --clear {self.id} makes it again"]


@dataclass(frozen=True)
class Content:
    """What a step has written: the digest of every file by its relative path, and its stamp at that time."""

    digests: dict[str, str]
    stamps: dict[str, Stamp]


@dataclass(frozen=True)
class Held:
    """What a store holds of one artifact: its id, its kind (the name of its step), label, bytes, folder."""

    id: str
    kind: str
    label: str
    size: int
    folder: Path


class Store:
    """Artifacts by id under one folder; several processes may write to it at once.

    What is in the folder and is not of a store's own form is never touched.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._checked: dict[str, Artifact] = {}
        self._session = ""

    def find(self, id: str) -> Artifact | None:
        """Return a finished artifact after checking its files against the record; a damaged one is moved aside.

        See ``intact`` for what is read of it.
        """
        if id in self._checked:
            return self._checked[id]
        folder = self._place(id)
        with disk_errors(folder):
            if not os.path.lexists(folder):
                return None
            record = artifact_record(folder)
            if record is None or not self.intact(folder, record):
                with contextlib.suppress(FileNotFoundError):  # another process was first
                    aside = move_aside(folder, self.folder / DAMAGED / id)
                    note(f"'{folder}' was damaged; it is made again, and what was there is kept in '{aside}'")
                return None
        self._checked[id] = artifact = Artifact(id, folder, fingerprint(record["files"]))
        return artifact

    def intact(self, folder: Path, record: Mapping[str, Any]) -> bool:
        """Return whether the files of an artifact are as they were written, whatever else lies beside them.

        A file of the recorded size and time is taken for the same; one of another size is not. Others are read: copies
        with times of their own, and what older records tell no size of. They are read once (``tree_digest``).
        """
        stamps, files = recorded_stamps(record), record["files"]
        if any((now := stamp(folder / n)) is None or now[0] != stamps.get(n, now)[0] for n in files):
            return False
        unsure = {name: digest for name, digest in files.items() if stamp(folder / name) != stamps.get(name)}
        return not unsure or self.tree_digest(folder, sorted(unsure)) == fingerprint(unsure)

    def changed(self, id: str) -> list[str]:
        """Return the files of an artifact that are not as they were written: all are read, whatever their times say."""
        folder = self._place(id)
        files = (artifact_record(folder) or {"files": {}})["files"]
        names = {name: folder / name for name in files}
        return [name for name, path in names.items() if not path.is_file() or file_digest(path) != files[name]]

    def look(self, id: str) -> tuple[str, dict[str, Any]] | None:
        """Return an artifact's digest and what made it, by its record alone: for estimates, nothing is checked."""
        record = self._record(self._place(id))
        return (fingerprint(record["files"]), record["about"]) if record else None

    def _record(self, folder: Path) -> dict[str, Any] | None:
        """Return an artifact's record, if it can be read."""
        with contextlib.suppress(OSError):
            return artifact_record(folder)
        return None

    def begin(self) -> Path:
        """Return a new temporary folder to write an artifact into, which is this store's until its process ends."""
        with disk_errors(self.folder):
            folder = self.folder / "tmp" / f"{self.open()}-{uuid.uuid4().hex[:12]}"
            folder.mkdir(parents=True)
        return folder

    def open(self) -> str:
        """Make the store where there is none; return the name of the lock that says which folders are being written."""
        if not self._session:
            locks, session = self.folder / "locks", uuid.uuid4().hex[:12]
            with disk_errors(self.folder):
                locks.mkdir(parents=True, exist_ok=True)
                if not (self.folder / MARKER).exists():
                    write_text(self.folder / MARKER, "a store of taskvec: taskvec store lists and clears it\n")
                weakref.finalize(self, _end, locks / session, claim(locks / session))
            self._session = session
        return self._session

    def finish(self, id: str, folder: Path, about: dict[str, Any], content: Content) -> Artifact:
        """Write the record last, then rename the temporary folder into place; who comes second gives way.

        ``content`` is what is in the folder: who has written it has read it again (``content_of``).
        """
        place, digest, artifact = self._place(id), fingerprint(content.digests), None
        try:
            with disk_errors(self.folder):
                with present([], folder):
                    record = {"about": about, "files": content.digests, "stamps": content.stamps}
                    (folder / RECORD).write_text(json_text(record), encoding="utf-8")
                place.parent.mkdir(parents=True, exist_ok=True)
                while artifact is None:  # what is damaged there is moved aside
                    artifact = Artifact(id, place, digest) if _renamed(folder, place) else self.find(id)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._checked[id] = artifact
        return artifact

    def held(self) -> list[Held]:
        """Say what is kept, in the order of kind and label, and what was damaged and moved aside."""
        holdings = []
        for folder in (path for path in self.folder.glob("[0-9a-f][0-9a-f]/*") if not path.is_symlink()):
            if ID.fullmatch(folder.name) and folder == self._place(folder.name) and (record := self._record(folder)):
                kind, label = step_name(record["about"]), record["about"]["label"]
                holdings.append(Held(folder.name, kind, label, _size(folder), folder))
        for folder in (path for path in (self.folder / DAMAGED).glob("*") if not path.is_symlink()):
            if ASIDE.fullmatch(folder.name):
                holdings.append(Held(folder.name, DAMAGED, folder.name, _size(folder), folder))
        return sorted(holdings, key=lambda held: (held.kind, held.label, held.id))

    def is_store(self) -> bool:
        """Say whether a folder is a store: it says so itself, or holds an artifact, or nothing at all."""
        with disk_errors(self.folder):
            return (self.folder / MARKER).is_file() or not any(self.folder.iterdir()) or bool(self.held())

    def unfinished(self) -> int:
        """Return the bytes of steps that are under way, or that another machine left when it was stopped."""
        return _size(self.folder / "tmp")

    def clear(self, chosen: Iterable[Held]) -> list[Held]:
        """Remove artifacts, each at once, and return those that were there; what reads one keeps its open files.

        A file that an artifact does not know is another's: it is kept among the foreign ones, and a note says so.
        """
        return [held for held in chosen if self._clear(held)]

    def _clear(self, held: Held) -> bool:
        self._checked.pop(held.id, None)
        with disk_errors(self.folder):
            gone = self.begin() / held.id
            with contextlib.suppress(FileNotFoundError):
                held.folder.rename(gone)
            existed = gone.exists()
            record = artifact_record(gone)
            if record and (foreign := _foreign(gone, record)):
                for name in (*record["files"], RECORD, NOTES):
                    if not (gone / name).is_dir():
                        (gone / name).unlink(missing_ok=True)
                aside = move_aside(gone, self.folder / FOREIGN / held.id)
                note(f"{', '.join(foreign)} in '{held.folder}' is no part of it: kept in '{aside}'")
            shutil.rmtree(gone.parent, ignore_errors=True)
        return existed and not gone.exists()

    def sweep(self) -> None:
        """Remove what processes that were killed have left: folders whose lock nobody holds any more."""
        for folder in (self.folder, self.folder / "digests"):
            sweep(folder)
        for lock in (self.folder / "locks").glob("*"):
            if SESSION.fullmatch(lock.name) and abandoned(lock):
                for folder in (self.folder / "tmp").glob(f"{lock.name}-*"):
                    shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)

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
        with contextlib.suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file in a folder by relative path, but of record, notes and hidden files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (RECORD, NOTES))
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files if not path.name.startswith(".")}


def content_of(folder: Path) -> Content:
    """Return the digests and stamps of the files in a folder that nobody writes to any more."""
    files = digests(folder)
    return Content(files, {name: stamp(folder / name) or [] for name in files})


def stamp(path: Path) -> Stamp | None:
    """Return what tells whether a file has changed; None where there is no file."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG((seen := path.stat()).st_mode):
            return [seen.st_size, seen.st_mtime_ns]
    return None


def recorded_stamps(record: Mapping[str, Any]) -> dict[str, Stamp]:
    """Return the stamps that a record tells; older records tell none, and what is no stamp counts as not told."""
    told = record.get("stamps")
    pairs = told.items() if isinstance(told, dict) else ()
    return {n: v for n, v in pairs if isinstance(v, list) and len(v) == 2 and all(isinstance(x, int) for x in v)}


def seconds(about: Mapping[str, Any]) -> float:
    """Return the seconds that a record tells; NaN where they are missing or no number."""
    value = about.get("seconds")
    with contextlib.suppress(OverflowError):
        return float(value) if isinstance(value, int | float) and 0 <= value < math.inf else math.nan
    return math.nan


def artifact_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of an artifact; None where there is none such as a store writes."""
    if not (folder / RECORD).is_file():
        return None
    try:
        record = read_json(folder / RECORD)
        files, step, label = record["files"], step_name(record["about"]), record["about"]["label"]
        texts = (*files, *files.values(), step, label)
        sound = all(isinstance(text, str) for text in texts) and all(map(is_within, files)) and step
    except (FileNotFoundError, TaskvecError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return record if sound else None


def step_name(about: Mapping[str, Any]) -> str:
    """Return the name of the step that made an artifact; records of older versions name its function's place."""
    name: str = about["step"] if "step" in about else about["function"].rpartition(":")[2]
    return name


def _foreign(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """List the files in an artifact that are not its own."""
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in files)
    return sorted(name for name in names if name not in (*record["files"], RECORD, NOTES))


def _renamed(folder: Path, place: Path) -> bool:
    """Rename a folder, or say that something is there already."""
    try:
        folder.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True


@contextlib.contextmanager
def present(folders: Iterable[Path], out: Path | None = None) -> Iterator[None]:
    """Tell apart work that failed because what it reads or writes in the store was removed meanwhile."""
    try:
        yield
    except Exception:
        gone = [folder for folder in folders if not _is_whole(folder)]
        if out is not None and not out.is_dir():
            gone.append(out)
        if not gone:
            raise
        problem, fix = f"'{gone[0]}' was removed while a run needed it", "run again: what is missing is made again"
        raise TaskvecError(problem, fix) from None


def _is_whole(folder: Path) -> bool:
    """Say whether an artifact has all its files."""
    record = artifact_record(folder)
    return record is not None and all((folder / name).is_file() for name in record["files"])


def _end(lock: Path, handle: int) -> None:
    """Give a lock file up."""
    with contextlib.suppress(OSError):
        lock.unlink()
    os.close(handle)
