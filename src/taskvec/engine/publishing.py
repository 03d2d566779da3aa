"""Files of our own in a folder of the user's: written whole, known again, and never in the way of anything else.

A marker in the folder names what was written there, with digests. Only that is replaced or removed by what comes later:
a file that was changed meanwhile is kept aside, and whatever else lies there is the user's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from taskvec.core.errors import TaskvecError
from taskvec.core.files import disk_errors, file_digest, is_within, move_aside, read_json, write_json
from taskvec.core.notes import note
from taskvec.engine.store import digests

CHANGED = "changed"
"""The folder in which files of ours are kept that the user has changed."""
Known = dict[str, set[str]]
"""The digests that our files in a folder may have, by relative path."""


def inside(path: Path, folder: Path) -> bool:
    """Say whether a path is a folder or lies in it, by whatever links, dots and case the two are written."""
    path, folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    parents = (path, *path.parents)
    with disk_errors(folder):
        return folder in parents or (
            folder.exists() and any(parent.exists() and parent.samefile(folder) for parent in parents)
        )


def check_outside(out: Path, inputs: Iterable[Path], option: str = "--out") -> None:
    """Raise if what is to be written would lie in a folder that is read."""
    for given in inputs:
        if inside(out, given) and given.is_dir():
            raise TaskvecError(f"'{out}' lies in '{given}', which is read", f"choose another {option}")


def check_place(out: Path, option: str = "--out") -> None:
    """Raise if a path cannot be a folder: it is another thing, a link to nothing, or no path at all."""
    if "\0" in str(out):
        raise TaskvecError(f"{str(out)!r} is no path", f"choose another {option}")
    with disk_errors(out):
        if os.path.lexists(out) and not out.is_dir():
            what = "a link to nothing" if out.is_symlink() and not out.exists() else "no folder"
            raise TaskvecError(f"'{out}' is {what}", f"choose another {option}")


def owned(out: Path, marker: str, lock: str = "") -> Known:
    """Return what a folder's marker names as ours; where it names nothing, what an older run's ``lock`` does."""
    for name in (marker, lock):
        known = _named(out / name) if name else {}
        if known:
            return known | ({lock: {file_digest(out / lock)}} if name == lock else {})
    return {}


def _named(record: Path) -> Known:
    """Return the digests of files by name that a marker or a lock tells, as far as it does."""
    if not _is_plain(record):
        return {}
    try:
        files = read_json(record)["files"]
        listed = {name: [sums] if isinstance(sums, str) else list(sums) for name, sums in files.items()}
    except (OSError, TaskvecError, KeyError, TypeError, AttributeError):
        return {}
    return {name: {str(digest) for digest in sums} for name, sums in listed.items() if is_within(name)}


def obstacle(out: Path, name: str, owned_names: Iterable[str]) -> Path | None:
    """Return what stands where one of our files is to go: anything but our own file in folders that are no links."""
    place = out
    for part in PurePosixPath(name).parts[:-1]:
        place = place / part
        if place.is_symlink() or (os.path.lexists(place) and not place.is_dir()):
            return place
    place = out / name
    if not os.path.lexists(place) or (name in owned_names and _is_plain(place)):
        return None
    return place


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def refuse(path: Path) -> TaskvecError:
    """Return the error that tells of an obstacle."""
    problem = f"'{path}' was not written by this command, and stands where one of its files is to go"
    return TaskvecError(problem, "move or rename it, or choose another --out")


def publish(fresh: Path, out: Path, marker: str, last: str = "") -> None:
    """Move the files in ``fresh`` to a folder, ``last`` in the end, and remove what else is ours there.

    Nothing is touched if anything stands in the way. Interrupted at any moment, the marker names what the folder may
    hold of ours, and the next call goes on from there.
    """
    ours, new = owned(out, marker, last), digests(fresh)
    for name in new:
        blocking = obstacle(out, name, ours)
        if blocking and not (blocking == out / name and _is_plain(blocking) and file_digest(blocking) == new[name]):
            raise refuse(blocking)
    both = {name: ours.get(name, set()) | ({new[name]} if name in new else set()) for name in ours | new}
    mark(out, marker, both)
    for name in sorted(both, key=lambda name: name != last):
        _take_away(out, name, both[name], name in new and name != last)
    for name in sorted(new, key=lambda name: name == last):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (fresh / name).replace(out / name)
    mark(out, marker, {name: {digest} for name, digest in new.items()})


def mark(out: Path, marker: str, known: Mapping[str, Iterable[str]]) -> None:
    """Write the marker of a folder: which files in it are ours, with the digests that they may have."""
    about = "taskvec wrote the files that are named here, and touches no other in this folder"
    write_json(out / marker, {"about": about, "files": {name: sorted(sums) for name, sums in known.items()}})


def _take_away(out: Path, name: str, known: Iterable[str], replaced: bool) -> None:
    """Remove a file of ours, and folders that it leaves empty, unless it is replaced; one that was changed is kept."""
    if obstacle(out, name, [name]) or not (out / name).exists():
        return
    if _digest(out / name) not in known:
        _keep(out, name, "was changed since it was written")
    elif not replaced:
        (out / name).unlink()
        for parent in [out / above for above in PurePosixPath(name).parents][:-1]:
            if any(parent.iterdir()):
                break
            parent.rmdir()


def settle(fresh: Path, out: Path, name: str) -> None:
    """Move a new file to a folder without a marker; another one that has its name there is kept aside."""
    if (out / name).exists() and _digest(out / name) != file_digest(fresh / name):
        _keep(out, name, "was there already")
    (fresh / name).replace(out / name)


def check_names(out: Path, names: Iterable[str]) -> None:
    """Raise if a folder cannot be written to, or something other than a file stands where one is to go."""
    names = list(names)
    check_place(out)
    with disk_errors(out):
        for blocking in (obstacle(out, name, names) for name in names):
            if blocking:
                raise refuse(blocking)


def _keep(out: Path, name: str, why: str) -> None:
    """Move a file aside and tell why."""
    note(f"'{out / name}' {why}: kept as '{move_aside(out / name, _kept(out) / name)}'")


def _digest(path: Path) -> str:
    """Return the digest of a file, or nothing if it cannot be read."""
    try:
        return file_digest(path)
    except TaskvecError:
        return ""


def _kept(out: Path) -> Path:
    """Return the folder for changed files, of a name that is free or such a folder already."""
    number, place = 1, out / CHANGED
    while os.path.lexists(place) and (place.is_symlink() or not place.is_dir()):
        number += 1
        place = out / f"{CHANGED}-{number}"
    return place
