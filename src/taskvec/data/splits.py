"""The splits of a task: the protocol's validation split, flat data sets divided class by class, seeded choices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from taskvec.core.errors import TaskvecError
from taskvec.core.task_types import CLASSIFICATION
from taskvec.data.index import Listing, pick

SPLITS = ("train", "validation", "test")


def seeded_choice(count: int, limit: int | None, seed: int | np.random.Generator = 0) -> Int64[np.ndarray, " chosen"]:
    """Return the indices of at most ``limit`` of ``count`` things, chosen by a seed or generator, in rising order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


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
