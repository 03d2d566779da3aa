"""What a task's source holds before anything is decoded: images and labels by split, and the protocol's splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8

from taskvec.core.errors import TaskvecError
from taskvec.core.task_types import CLASSIFICATION
from taskvec.data.images import Encoded

SPLITS = ("train", "validation", "test")
Labels = Int64[np.ndarray, "_ ..."] | Float32[np.ndarray, "_ 2"]
"""A class of each image (or each patch, row by row), or the cosine and sine of its angle."""


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


Items = Sequence[Path] | Rows | UInt8[np.ndarray, "_ 3 height width"]


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


def validation_indices(count: int) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " validation"]]:
    """Return the indices of ``random_split(train, [N - v, v])`` with a generator seeded 0, v = min(N // 10, 5000)."""
    held_out = min(int(0.1 * count), 5000)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
    return order[: count - held_out], order[count - held_out :]


def split_validation(listing: Listing, source: str) -> Listing:
    """Take int(0.1 N) training images, at most 5000, for validation, as the paper's code does (protocol, Data)."""
    train, validation = validation_indices(len(listing.labels["train"]))
    if not len(validation):
        count = len(listing.labels["train"])
        raise TaskvecError(
            f"task '{source}' has {count} training images: too few to hold out a tenth", "add images or a val/ folder"
        )
    return _divide(listing, "train", {"train": train, "validation": validation})


def warned(listing: Listing) -> Listing:
    """Return a listing with a note where classes have no training image."""
    lacking = np.setdiff1d(np.arange(len(listing.classes)), listing.labels["train"])
    if not len(lacking) or listing.kind != CLASSIFICATION:
        return listing
    names = f"{len(lacking)} classes, such as '{listing.classes[lacking[0]]}'"
    note = f"the train split has no images of {names}, after a tenth was held out for validation: add images, or a val/"
    return replace(listing, notes=(*listing.notes, note))


def alike(classes: Sequence[str]) -> tuple[str, ...]:
    """Say which two class names differ in capitals and blanks only: are they one class, written in two ways?"""
    first: dict[str, str] = {}
    pairs = [(first.setdefault("".join(name.split()).casefold(), name), name) for name in classes]
    two = next((pair for pair in pairs if pair[0] != pair[1]), None)
    return (f"'{two[0]}' and '{two[1]}' are two classes: their names differ in capitals or blanks only",) if two else ()


def split_classes(listing: Listing, held_out: int | None = None) -> Listing:
    """Divide a flat data set (all of it in ``train``) class by class and always alike: validation, test, train.

    ``held_out`` images of a class are validated on and as many tested on, a tenth when left out; a class that has not
    ten times as many, or is too small for a tenth, gives a tenth, at least one image each.
    """
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, list[Any]] = {split: [] for split in SPLITS}
    labels = listing.labels["train"]
    for index, name in enumerate(listing.classes):
        mine = np.flatnonzero(labels == index)
        if len(mine) < 3:
            raise TaskvecError(
                f"class '{name}' has {len(mine)} images, too few to divide into train, validation and test",
                "add images, or divide them yourself: train/, val/ and test/ with one folder a class each",
            )
        count = held_out if held_out and len(mine) >= 4 * held_out else max(1, len(mine) // 10)
        order = mine[torch.randperm(len(mine), generator=generator).numpy()]
        parts["validation"].append(order[:count])
        parts["test"].append(order[count : 2 * count])
        parts["train"].append(order[2 * count :])
    return _divide(listing, "train", {split: np.sort(np.concatenate(chosen)) for split, chosen in parts.items()})


def _divide(listing: Listing, split: str, parts: dict[str, Int64[np.ndarray, " part"]]) -> Listing:
    items, labels = listing.items[split], listing.labels[split]
    return replace(
        listing,
        items=listing.items | {name: pick(items, indices) for name, indices in parts.items()},
        labels=listing.labels | {name: labels[indices] for name, indices in parts.items()},
    )


def validation_as_test(listing: Listing, source: str) -> Listing:
    """Return a listing whose validation split is the test split, with a note that says so."""
    own = {"train": "train", "test": "validation"}
    note = f"{source} has no test split: its validation split is tested on"
    return replace(
        listing,
        items={split: listing.items[source] for split, source in own.items()},
        labels={split: listing.labels[source] for split, source in own.items()},
        notes=(*listing.notes, note),
    )


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
