"""Class folders: ``train/ [val/] test/`` with one folder a class, or one flat tree that is divided by a seed."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from taskvec.errors import TaskvecError, did_you_mean
from taskvec.images import SUFFIXES
from taskvec.listing import Listing, split_classes

LAYOUT = "expected train/, test/ and perhaps val/ in it, each with one folder a class, or the class folders themselves"
SPLIT_NAMES = ("train", "test", "val", "valid", "validation")


def list_folder(path: str) -> Listing:
    """List ``train/ [val/] test/`` of class folders, or class folders alone, which are divided class by class.

    Classes and files are in the order of their names.
    """
    root = Path(path).expanduser()
    check_root(root)
    if is_flat(root):
        return split_classes(list_splits(root, {"train": "."}))
    return list_splits(root, {"train": "train", "test": "test"} | ({"validation": "val"} if has(root, "val") else {}))


SPELT = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing"), "test")
SPELT |= dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val")
"""What other names of a split's folder mean, in lower case."""


def hidden(name: str) -> bool:
    """Say whether a file or folder is hidden, or what an archive of a Mac leaves beside the rest."""
    return name.startswith(".") or name == "__MACOSX"


def has(root: Path, name: str) -> bool:
    """Say whether a folder holds something of that name."""
    return (root / name).exists()


def is_flat(root: Path) -> bool:
    """Say whether a folder holds class folders and no splits, of whatever names."""
    if any(has(root, name) for name in SPLIT_NAMES):
        return False
    folders = class_folders(root)
    return len(folders) > 1 and not are_splits(folders)


def class_folders(root: Path) -> list[Path]:
    """Return the folders in a folder that hold images and no splits of their own."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not hidden(p.name))
    return [p for p in folders if not any(has(p, name) for name in ("train", "test")) and holds_image(p)]


def are_splits(folders: list[Path]) -> bool:
    """Say whether folders look like splits: no image lies in them, but folders of one name, or they are called so."""
    if len(folders) < 2 or any(p.suffix.lower() in SUFFIXES for folder in folders for p in folder.iterdir()):
        return False
    below = [{p.name for p in folder.iterdir() if p.is_dir() and not hidden(p.name)} for folder in folders]
    return bool(set.intersection(*below)) or all(re.search("train|test|val", f.name.lower()) for f in folders)


def holds_image(folder: Path) -> bool:
    """Say whether there is an image in a folder or below it."""
    return any(Path(name).suffix.lower() in SUFFIXES for _, _, names in visible(folder) for name in names)


def list_splits(root: Path, names: dict[str, str]) -> Listing:
    """List the class folders of each split, which lies in the folder of that name; training decides the classes."""
    listed = {split: class_files(root / name) for split, name in names.items()}
    found = {split: files for split, (files, _) in listed.items()}
    classes = tuple(sorted(found["train"]))
    for split in names:
        _check_classes(root / names[split], found[split], classes, split == "train")
    items = {split: [file for c in classes for file in files.get(c, [])] for split, files in found.items()}
    labels = {
        split: np.array([i for i, c in enumerate(classes) for _ in files.get(c, [])], dtype=np.int64)
        for split, files in found.items()
    }
    lacking = {split: [c for c in classes if not files.get(c)] for split, files in found.items()}
    notes = [
        f"the {split} split has no images of {len(none)} classes, such as '{none[0]}'"
        for split, none in lacking.items()
        if none
    ]
    notes += left_out([path for _, others in listed.values() for path in others], root)
    return Listing(classes, dict(items), labels, root=root, notes=tuple(notes))


def left_out(others: list[Path], root: Path) -> list[str]:
    """Say in one line how many files of a task are no images, with the first of them."""
    if not others:
        return []
    first = min(others, key=lambda path: path.relative_to(root).as_posix())
    where = first.parent.relative_to(root).as_posix()
    return [f"left out {len(others)} files that are no images, such as {first.name} in {where}"]


def check_root(root: Path) -> None:
    """Raise unless a folder has train/ and test/ or class folders, or if validation has another name than val/."""
    if not root.is_dir():
        near = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        hint = did_you_mean(root.name, near) if near else LAYOUT
        raise TaskvecError(f"no task folder at '{root}'", hint)
    for entry in sorted(p for p in root.iterdir() if p.is_dir()):
        meant = SPELT.get(entry.name.casefold())
        if meant not in (None, entry.name) and any(inner.is_dir() for inner in entry.iterdir()):
            raise TaskvecError(
                f"task folder '{root}' holds {entry.name}/, which would not be seen as {meant}/",
                f"rename it to {meant}/",
            )
    if is_flat(root):
        return
    folders = [] if any(has(root, name) for name in SPLIT_NAMES) else class_folders(root)
    if are_splits(folders):
        raise TaskvecError(
            f"'{root}' holds the folders {', '.join(f.name for f in folders[:4])}: are they splits, not classes?",
            LAYOUT,
        )
    held = sorted(p.name for p in root.iterdir())
    for name in ("train", "test"):
        if not (root / name).is_dir():
            shown = ", ".join(held[:8]) or "nothing"
            raise TaskvecError(f"task folder '{root}' has no {name}/ folder; it holds {shown}", LAYOUT)


def class_files(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Return the image files of every class folder, by class name (in Unicode normal form C), and all other files."""
    entries = sorted(p for p in folder.iterdir() if not hidden(p.name)) if folder.is_dir() else []
    classes = [p for p in entries if p.is_dir()]
    if not classes:
        raise TaskvecError(
            f"'{folder}' holds no class folders", "put the images of each class into a folder of its own"
        )
    loose = [p.name for p in entries if p.suffix.lower() in SUFFIXES and p.is_file()]
    if loose:
        raise TaskvecError(f"image '{folder / loose[0]}' is in no class folder", "move it into one or remove it")
    found: dict[str, list[Path]] = {}
    others = [p for p in entries if not p.is_dir()]
    for path in classes:
        name = class_name(path)
        if name in found:
            raise TaskvecError(
                f"'{folder}' has two class folders named '{name}'", "one is spelt with combining accents: merge them"
            )
        found[name], odd = image_files(path)
        others += odd
    return found, others


def class_name(folder: Path) -> str:
    """Return a class folder's name in Unicode normal form C; a name that is no text is an error."""
    try:
        folder.name.encode("utf-8")
    except UnicodeEncodeError:
        shown = folder.name.encode("utf-8", "backslashreplace").decode()
        raise TaskvecError(
            f"class folder '{shown}' in '{folder.parent}' has a name that is not UTF-8", "rename it"
        ) from None
    return unicodedata.normalize("NFC", folder.name)


def image_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the images in a folder and below it, in the order of their names, and all other files.

    Links are followed, and hidden files are in neither.
    """
    every = [Path(top) / name for top, _, names in visible(folder) for name in names if not name.startswith(".")]
    images = [path for path in every if path.suffix.lower() in SUFFIXES and (path.is_file() or not path.exists())]
    held = set(images)
    others = [path for path in every if path not in held]
    return sorted(images, key=lambda path: path.relative_to(folder).as_posix()), others


def visible(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a folder and those below it that are not hidden, through links, each real folder once."""
    seen = set()
    for top, below, names in os.walk(folder, followlinks=True):
        below[:] = sorted(name for name in below if not hidden(name))
        if (real := os.path.realpath(top)) not in seen:
            seen.add(real)
            yield top, below, names
        else:
            below.clear()


def _check_classes(folder: Path, files: dict[str, list[Path]], classes: tuple[str, ...], training: bool) -> None:
    extra = sorted(set(files) - set(classes))
    if extra:
        raise TaskvecError(
            f"class '{extra[0]}' is in '{folder}' but not in train/"
            + (f" (and {len(extra) - 1} more)" if extra[1:] else ""),
            f"add training images for it, or remove it; {did_you_mean(extra[0], classes)}",
        )
    empty = sorted(name for name, found in files.items() if not found)
    if training and empty:
        raise TaskvecError(
            f"class folder '{folder / empty[0]}' has no images",
            f"readable are {' '.join(SUFFIXES)}; add some or remove it",
        )
    if training and len(classes) < 2:
        raise TaskvecError(f"'{folder}' has one class only, '{classes[0]}'", "a task needs at least two classes")
    if not any(files.values()):
        raise TaskvecError(f"'{folder}' has no images", f"readable are {' '.join(SUFFIXES)}")
