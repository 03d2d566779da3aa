"""The index of a task before anything is decoded: where its images are, with their labels, by split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from taskvec.core.errors import TaskvecError, and_more
from taskvec.core.task_types import CLASSIFICATION
from taskvec.data.images import Encoded

SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev"),
}
"""Names of each split in folders and in published data sets."""
Labels = Int64[np.ndarray, "_ ..."] | Float32[np.ndarray, "_ 2"]
"""The class of each image (or of each of its patches, row by row), or the cosine and sine of its angle."""


@runtime_checkable
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


Items = Sequence[Path] | Sequence[Encoded] | Rows | UInt8[np.ndarray, "_ 3 height width"]
"""Images of a split: files, encoded images, rows of a table, or pixels."""


@dataclass(frozen=True)
class Listing:
    """The images of a task and their labels by split, not decoded yet.

    ``kind`` is the type of task. ``root`` is the folder that paths are relative to in digests. ``files`` are the tables
    that hold the images, where the items are not files themselves. ``notes`` are for the user.
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

    def with_splits(self, **sources: str) -> Listing:
        """Return a listing with these splits only, each made of the named split."""
        items = {split: self.items[source] for split, source in sources.items()}
        return replace(self, items=items, labels={split: self.labels[source] for split, source in sources.items()})


def pick(items: Items, indices: Int64[np.ndarray, " chosen"]) -> Items:
    """Return the items at ``indices``."""
    if isinstance(items, list):
        return [items[i] for i in indices]
    chosen: Items = items[indices] if isinstance(items, np.ndarray) else items.select(indices)  # type: ignore[union-attr]
    return chosen


def name_of(items: Items, split: str, index: int) -> str:
    """Return an item's name for the user: its path, or its number in its split."""
    item = items[index] if not isinstance(items, np.ndarray) else None
    return str(item) if isinstance(item, Path) else item.name if item is not None else f"{split} image {index}"


def alike(classes: Sequence[str]) -> tuple[str, ...]:
    """Return a note where two class names differ in capitals or blanks only."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault("".join(name.split()).casefold(), name), name) for name in classes]
    twins = next((f"'{one}' and '{other}'" for one, other in pairs if one != other), "")
    return (f"{twins} are two classes: their names differ in capitals or blanks only",) if twins else ()


def rename_classes(
    listing: Listing, name: Callable[[str], str], order: Callable[[list[str]], tuple[str, ...]]
) -> Listing:
    """Return a listing with other names and another order of classes; classes without an image are left out."""
    used = sorted({int(label) for labels in listing.labels.values() for label in np.unique(labels)})
    if used and (used[0] < 0 or used[-1] >= len(listing.classes)):
        raise TaskvecError(
            f"label {used[0] if used[0] < 0 else used[-1]} is none of the {len(listing.classes)} classes",
            "every image needs a label; is a split without labels among them?",
        )
    names = {label: name(listing.classes[label]) for label in used}
    classes = order(list(names.values()))
    new_labels = np.full(len(listing.classes), -1, np.int64)
    for label, new_name in names.items():
        new_labels[label] = classes.index(new_name)
    unused = len(listing.classes) - len(used)
    notes = (f"left out {unused} classes without an image",) if unused else ()
    labels = {split: new_labels[labels] for split, labels in listing.labels.items()}
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
            f"class '{missing[0]}' of task '{source}' has no training images{and_more(missing)}",
            "add some, or remove the class",
        )


def check_files(listing: Listing) -> None:
    """Raise where files of a listing are missing."""
    paths = [item for items in listing.items.values() if isinstance(items, list) for item in items]
    missing = [path for path in paths if not path.exists()]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(paths)})" if missing[1:] else ""
        raise TaskvecError(f"image '{missing[0]}' is listed and not there{more}", "is the download whole?")
