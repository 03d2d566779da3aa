"""Class folders: ``train/ [val/] test/`` with one folder a class, or one flat tree that is divided by a seed."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from taskvec.core.errors import TaskvecError, and_more, did_you_mean
from taskvec.data.images import SUFFIXES
from taskvec.data.index import SPLIT_NAMES, Listing
from taskvec.data.splits import split_classes, validation_as_test

LAYOUT = "expected train/, test/ and perhaps val/ in it, each with one folder a class, or the class folders themselves"
FOLDERS = {"train": "train", "test": "test", "validation": "val"}
"""The folder of each split."""
SPELT = {name: FOLDERS[split] for split, names in SPLIT_NAMES.items() for name in names} | {"eval": "val"}
"""The split's folder that a name in lower case stands for."""
JUNK = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
"""Folders that systems and archives leave; that of a network disk holds small copies of all images."""
IMAGES = ("images", "image", "imgs", "img")
"""Names of a folder in a class folder that holds the images, where none lie in the class folder itself."""
MASKS = ("masks", "mask")
"""Names of a folder in a class folder whose images are left out."""


def list_folder(path: str) -> Listing:
    """Return the images of ``train/ [val/] test/`` folders, or of class folders alone, divided class by class.

    Without ``test/`` the validation split is tested on. Classes and files are in the order of their names.
    """
    given = Path(path).expanduser()
    check_given(given)
    root = unpacked(given)
    check_root(root)
    if is_flat(root):
        listing = split_classes(list_splits(root, {"train": "."}))
        notes = notes_on_names(root)
    else:
        listing = list_splits(root, {split: name for split, name in FOLDERS.items() if (root / name).exists()})
        notes = notes_on_folders(root)
        if "test" not in listing.labels:
            listing = validation_as_test(listing, f"'{root}'")
    inner = (f"'{given}' holds one folder only: the task is read from '{root}'",) if root != given else ()
    return replace(listing, notes=inner + notes + listing.notes)


def hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or was left by a system or an archive."""
    return name.startswith(".") or name in JUNK


def is_image(name: str) -> bool:
    """Return whether a file's suffix is that of an image."""
    return Path(name).suffix.lower() in SUFFIXES


def folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder that are not hidden, in the order of names."""
    with os.scandir(folder) as entries:  # which knows folders without asking for each file
        return sorted(folder / entry.name for entry in entries if not hidden(entry.name) and entry.is_dir())


def holds_images(folder: Path) -> bool:
    """Return whether images lie in a folder itself."""
    return any(is_image(p.name) and not hidden(p.name) and not p.is_dir() for p in folder.iterdir())


def is_class(folder: Path) -> bool:
    """Return whether a folder is surely a class: images lie in it, or it holds a folder named ``images``."""
    return holds_images(folder) or any(p.name.casefold() in IMAGES for p in folders_in(folder))


def is_split(folder: Path) -> bool:
    """Return whether a folder can be a split: it holds folders, and is no class itself."""
    return folder.is_dir() and bool(folders_in(folder)) and not is_class(folder)


def splits_in(root: Path) -> list[Path]:
    """Return the folders in a folder that are named as splits."""
    return [p for p in folders_in(root) if p.name.casefold() in SPELT]


def is_flat(root: Path) -> bool:
    """Return whether a folder holds class folders and no splits, whatever their names."""
    named = splits_in(root)
    if any(map(is_split, named)) or {"train", "test"} <= {SPELT[p.name.casefold()] for p in named}:
        return False
    folders = class_folders(root)
    return len(folders) > 1 and not are_splits(folders) and not set(folders) <= set(named)


def class_folders(root: Path) -> list[Path]:
    """Return the folders in a folder that hold images and no splits of their own."""
    return [p for p in folders_in(root) if not any(map(is_split, splits_in(p))) and holds_image(p)]


def are_splits(folders: list[Path]) -> bool:
    """Return whether folders look like splits: they hold folders of the same names, or are named as splits.

    One folder of the same name in each, or one named ``images``, is where classes keep their images.
    """
    if len(folders) < 2 or any(map(holds_images, folders)) or all(map(is_class, folders)):
        return False
    below = [{p.name for p in folders_in(folder)} for folder in folders]
    same = bool(set.intersection(*below)) and len(set.union(*below)) > 1
    return same or all(re.search("train|test|val", f.name.lower()) for f in folders)


def holds_image(folder: Path) -> bool:
    """Return whether there is an image in a folder or below it."""
    return any(is_image(name) for _, _, names in visible(folder) for name in names)


def notes_on_names(root: Path) -> tuple[str, ...]:
    """Return a note for every class of a flat tree that is named as a split."""
    return tuple(f"'{p.name}' is taken for a class: it holds images and no class folders" for p in splits_in(root))


def notes_on_folders(root: Path) -> tuple[str, ...]:
    """Return a note on folders beside the splits, which are not read."""
    others = [p.name for p in folders_in(root) if p.name not in FOLDERS.values()]
    return (f"left out {', '.join(others[:4])}: of no split, which are train, val and test",) if others else ()


def unpacked(folder: Path) -> Path:
    """Return the folder of a task: where a folder holds one folder only, as unpacked archives do, the inner one."""
    inner = folders_in(folder)
    while len(inner) == 1 and not holds_images(folder) and is_split(inner[0]) and inner[0].name.casefold() not in SPELT:
        folder, inner = inner[0], folders_in(inner[0])
    return folder


@dataclass(frozen=True)
class ClassFiles:
    """The files of a class folder: its images, those of them in ``deeper`` folders, and what is left out.

    Of those left out, ``unused`` images lie beside the folder of the class's images; the ``others`` are no images.
    """

    images: list[Path]
    deeper: list[Path]
    unused: list[Path]
    others: list[Path]


def list_splits(root: Path, names: dict[str, str]) -> Listing:
    """Return the images in the class folders of each split, whose folder is named; training gives the classes."""
    folders = {split: class_files(root / name) for split, name in names.items()}
    images = {split: {c: files.images for c, files in by_class.items()} for split, by_class in folders.items()}
    classes = tuple(sorted(images["train"]))
    for split in names:
        _check_classes(root / names[split], images[split], classes, split == "train")
    items = {split: [path for c in classes for path in by_class.get(c, [])] for split, by_class in images.items()}
    labels = {
        split: np.array([i for i, c in enumerate(classes) for _ in by_class.get(c, [])], dtype=np.int64)
        for split, by_class in images.items()
    }
    lacking = {split: [c for c in classes if not by_class.get(c)] for split, by_class in images.items()}
    notes = [
        f"the {split} split has no images of {len(missing)} classes, such as '{missing[0]}'"
        for split, missing in lacking.items()
        if missing
    ]
    all_files = [files for by_class in folders.values() for files in by_class.values()]
    return Listing(classes, dict(items), labels, root=root, notes=(*notes, *notes_on_files(root, all_files)))


def notes_on_files(root: Path, class_folders: list[ClassFiles]) -> list[str]:
    """Return notes on the files of a task that are left out or lie deeper: how many, of what suffixes, an example."""
    deeper, unused, others = (
        [path for files in class_folders for path in getattr(files, name)] for name in ("deeper", "unused", "others")
    )
    notes = []
    if deeper:
        example = deeper[0].relative_to(root)
        notes.append(f"{len(deeper)} images lie in folders below their class's, such as '{example}'")
    if others:
        suffixes = Counter(path.suffix.lower() or "without a suffix" for path in others).most_common(4)
        shown = ", ".join(f"{count} {suffix}" for suffix, count in suffixes)
        example = others[0].relative_to(root)
        notes.append(f"left out {len(others)} files that are no images ({shown}), such as '{example}'")
    if unused:
        example = unused[0].relative_to(root)
        notes.append(f"left out {len(unused)} images in folders beside a class's own images, such as '{example}'")
    return notes


def contents(folder: Path) -> str:
    """Return the names of at most eight things in a folder, as text."""
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"


def sibling_folders(path: Path) -> list[str]:
    """Return the names of the folders beside a path, for suggestions."""
    return [sibling.name for sibling in path.parent.iterdir() if sibling.is_dir()] if path.parent.is_dir() else []


def check_given(root: Path) -> None:
    """Raise unless a path is a folder."""
    if not root.is_dir():
        siblings = sibling_folders(root)
        hint = did_you_mean(root.name, siblings) if siblings else LAYOUT
        raise TaskvecError(f"no task folder at '{root}'", hint)


def check_root(root: Path) -> None:
    """Raise unless a folder has train/ and test/ or class folders, or if a split has another name."""
    for entry in filter(is_split, splits_in(root)):
        meant = SPELT[entry.name.casefold()]
        if meant != entry.name:
            raise TaskvecError(
                f"task folder '{root}' holds {entry.name}/, which would not be seen as {meant}/",
                f"rename it to {meant}/",
            )
    if is_flat(root):
        return
    if not any(map(is_split, splits_in(root))):
        check_folders(root)
    shown = contents(root)
    if not (root / "train").is_dir():
        raise TaskvecError(f"task folder '{root}' has no train/ folder; it holds {shown}", LAYOUT)
    if not (root / "test").is_dir() and not (root / "val").is_dir():
        raise TaskvecError(f"task folder '{root}' has no test/ folder; it holds {shown}", LAYOUT)


def check_folders(root: Path) -> None:
    """Raise for folders that are named or built as splits and are none, and for a single class."""
    folders, named = class_folders(root), [p for p in splits_in(root) if is_class(p)]
    if are_splits(folders):
        raise TaskvecError(
            f"'{root}' holds the folders {', '.join(f.name for f in folders[:4])}: are they splits, not classes?",
            LAYOUT,
        )
    if named:
        raise TaskvecError(
            f"'{named[0]}' is called as a split is, and holds images and no class folders",
            "put the images of each class into a folder of its own in it; where it is a class, rename it",
        )
    if len(folders) == 1 and is_class(folders[0]):
        raise TaskvecError(f"'{root}' has one class only, '{folders[0].name}'", "a task needs at least two classes")


def class_files(folder: Path) -> dict[str, ClassFiles]:
    """Return the files of every class folder, by class name in Unicode normal form C."""
    classes = folders_in(folder) if folder.is_dir() else []
    if all(path.name.casefold() in IMAGES for path in classes):
        raise TaskvecError(
            f"'{folder}' holds no class folders",
            "put the images of each class into a folder of its own; a list beside them may say which they are",
        )
    loose = sorted(p.name for p in folder.iterdir() if is_image(p.name) and not hidden(p.name) and p.is_file())
    if loose:
        raise TaskvecError(f"image '{folder / loose[0]}' is in no class folder", "move it into one or remove it")
    files: dict[str, ClassFiles] = {}
    for path in classes:
        name = class_name(path)
        if name in files:
            raise TaskvecError(
                f"'{folder}' has two class folders named '{name}'", "one is spelt with combining accents: merge them"
            )
        files[name] = image_files(path)
    return files


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


def image_files(folder: Path) -> ClassFiles:
    """Return the files of a class folder and those below it, in the order of names; links are followed.

    Where no image lies in the folder itself, a folder in it named ``images`` holds them. Masks and hidden files are
    left out.
    """
    inner = [p for p in folders_in(folder) if p.name.casefold() in IMAGES] if not holds_images(folder) else []
    files = [Path(top) / name for top, _, names in visible(folder) for name in names if not name.startswith(".")]
    images = [path for path in files if is_image(path.name) and (path.is_file() or not path.exists())]
    images.sort(key=lambda path: path.relative_to(folder).as_posix())

    def is_used(path: Path) -> bool:
        top = path.relative_to(folder).parts[:-1]
        return folder / top[0] in inner if inner else not top or top[0].casefold() not in MASKS

    used = [path for path in images if is_used(path)]
    deeper = [path for path in used if not inner and path.parent != folder]
    return ClassFiles(used, deeper, sorted(set(images) - set(used)), sorted(set(files) - set(images)))


def visible(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield a folder and the visible ones below it as ``os.walk`` does, through links, each real folder once.

    A folder that cannot be read raises: its images would be missing without a word.
    """
    seen = set()
    for top, below, names in os.walk(folder, followlinks=True, onerror=_fail):
        below[:] = sorted(name for name in below if not hidden(name))
        if (real := os.path.realpath(top)) not in seen:
            seen.add(real)
            yield top, below, names
        else:
            below.clear()


def _fail(error: OSError) -> None:
    raise error


def _check_classes(folder: Path, files: dict[str, list[Path]], classes: tuple[str, ...], training: bool) -> None:
    extra = sorted(set(files) - set(classes))
    if extra:
        raise TaskvecError(
            f"class '{extra[0]}' is in '{folder}' but not in train/{and_more(extra)}",
            f"add training images for it, or remove it; {did_you_mean(extra[0], classes)}",
        )
    empty = sorted(name for name, images in files.items() if not images)
    if training and empty:
        raise TaskvecError(
            f"class folder '{folder / empty[0]}' has no images",
            f"readable are {' '.join(SUFFIXES)}; add some or remove it",
        )
    if training and len(classes) < 2:
        raise TaskvecError(f"'{folder}' has one class only, '{classes[0]}'", "a task needs at least two classes")
    if not any(files.values()):
        raise TaskvecError(f"'{folder}' has no images", f"readable are {' '.join(SUFFIXES)}")
