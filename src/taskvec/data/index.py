"""What a task's source holds before anything is decoded: images and labels by split, and the protocol's splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from taskvec.core.errors import TaskvecError
from taskvec.core.task_types import CLASSIFICATION
from taskvec.data.images import Encoded

Labels = Int64[np.ndarray, " count *patches"] | Float32[np.ndarray, "count 2"]
"""A class of each image (or each patch, row by row), or the cosine and sine of its angle."""


class Rows(Protocol):
    """Encoded images of a data set that is read row by row."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int, /) -> Encoded:
        """Return an image's file."""

    def __iter__(self) -> Iterator[Encoded]:
        """Yield all images' files."""

    def select(self, indices: Int64[np.ndarray, " chosen"]) -> Rows:
        """Return the rows at ``indices``."""


Items = Sequence[Path] | Rows | UInt8[np.ndarray, "count 3 height width"]


@dataclass(frozen=True)
class Listing:
    """What a task address holds before decoding: images and labels by split, and what identifies them.

    ``root`` is the folder that file names start from, ``files`` are those that images are read from where the items
    are not files themselves, and ``origin`` identifies what is on no disk. ``notes`` are for the user.
    """

    classes: tuple[str, ...]
    items: dict[str, Items]
    labels: dict[str, Labels]
    kind: str = CLASSIFICATION
    root: Path = field(default_factory=Path)
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Return the number of images of each split."""
        return {split: len(labels) for split, labels in self.labels.items()}


def pick(items: Items, indices: Int64[np.ndarray, " chosen"]) -> Items:
    """Return the items at ``indices``."""
    if isinstance(items, list):
        return [items[i] for i in indices]
    chosen: Items = items[indices] if isinstance(items, np.ndarray) else items.select(indices)  # type: ignore[union-attr]
    return chosen


def name_of(items: Items, split: str, index: int) -> str:
    """Name an item for the user: its path, or the place it has in its split."""
    item = items[index] if not isinstance(items, np.ndarray) else None
    return str(item) if isinstance(item, Path) else item.name if item is not None else f"{split} image {index}"


def alike(classes: Sequence[str]) -> tuple[str, ...]:
    """Say which two class names differ in capitals and blanks only: are they one class, written in two ways?"""
    first: dict[str, str] = {}
    pairs = [(first.setdefault("".join(name.split()).casefold(), name), name) for name in classes]
    two = next((pair for pair in pairs if pair[0] != pair[1]), None)
    return (f"'{two[0]}' and '{two[1]}' are two classes: their names differ in capitals or blanks only",) if two else ()


def rename_classes(
    listing: Listing, name: Callable[[str], str], order: Callable[[list[str]], tuple[str, ...]]
) -> Listing:
    """Give classes other names and another order; those without an image in any split are left out, with a note."""
    used = sorted({int(label) for labels in listing.labels.values() for label in np.unique(labels)})
    if used and (used[0] < 0 or used[-1] >= len(listing.classes)):
        raise TaskvecError(
            f"label {used[0] if used[0] < 0 else used[-1]} is none of the {len(listing.classes)} classes",
            "every image needs a label; is a split without labels among them?",
        )
    names = {label: name(listing.classes[label]) for label in used}
    classes = order(list(names.values()))
    places = np.full(len(listing.classes), -1, np.int64)
    for label, new in names.items():
        places[label] = classes.index(new)
    left = len(listing.classes) - len(used)
    notes = (f"left out {left} classes without an image",) if left else ()
    labels = {split: places[labels] for split, labels in listing.labels.items()}
    return replace(listing, classes=classes, labels=labels, notes=listing.notes + notes)


def check_trained(listing: Listing, source: str) -> None:
    """Raise unless there are two classes, images in each split, and training images of every class that is tested."""
    for split, labels in listing.labels.items():
        if not len(labels):
            raise TaskvecError(f"task '{source}' has no images in its {split} split", "add some")
    if len(listing.classes) < 2:
        raise TaskvecError(f"task '{source}' has one class only, '{listing.classes[0]}'", "a task needs at least two")
    trained = set(np.unique(listing.labels["train"]).tolist())
    missing = [name for index, name in enumerate(listing.classes) if index not in trained]
    if missing:
        raise TaskvecError(
            f"class '{missing[0]}' of task '{source}' has no training images"
            + (f" (and {len(missing) - 1} more)" if missing[1:] else ""),
            "add some, or remove the class",
        )


def check_files(listing: Listing) -> None:
    """Raise if files that a list names are not there."""
    paths = [item for items in listing.items.values() if isinstance(items, list) for item in items]
    missing = [path for path in paths if not path.exists()]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(paths)})" if missing[1:] else ""
        raise TaskvecError(f"image '{missing[0]}' is listed and not there{more}", "is the download whole?")
