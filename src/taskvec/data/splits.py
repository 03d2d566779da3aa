"""Splits of a task by fixed seeds: the protocol's validation split, flat data sets divided by class, small choices."""

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
    """Return the indices of at most ``limit`` of ``count`` items, drawn by a seed or generator and sorted."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def validation_indices(count: int) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " validation"]]:
    """Return the indices of ``random_split(train, [N - v, v])`` with a generator seeded 0, v = min(N // 10, 5000)."""
    held_out = min(int(0.1 * count), 5000)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
    return order[: count - held_out], order[count - held_out :]


def split_validation(listing: Listing, source: str) -> Listing:
    """Return a listing with int(0.1 N) training images, at most 5000, held out for validation (protocol, Data)."""
    train, validation = validation_indices(len(listing.labels["train"]))
    if not len(validation):
        count = len(listing.labels["train"])
        raise TaskvecError(
            f"task '{source}' has {count} training images: too few to hold out a tenth", "add images or a val/ folder"
        )
    return _divided(listing, {"train": train, "validation": validation})


def warned(listing: Listing) -> Listing:
    """Return a listing with a note where a class has no training image left after validation was held out."""
    lacking = np.setdiff1d(np.arange(len(listing.classes)), listing.labels["train"])
    if not len(lacking) or listing.kind != CLASSIFICATION:
        return listing
    names = f"{len(lacking)} classes, such as '{listing.classes[lacking[0]]}'"
    note = f"the train split has no images of {names}, after a tenth was held out for validation: add images, or a val/"
    return replace(listing, notes=(*listing.notes, note))


def split_classes(listing: Listing, held_out: int | None = None) -> Listing:
    """Return a flat data set (all of it in ``train``) divided class by class, by a fixed seed.

    Validation and test split each get ``held_out`` images of a class. They get a tenth, one image at least, where
    ``held_out`` is left out or the class has fewer than four times as many.
    """
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, list[Any]] = {split: [] for split in SPLITS}
    labels = listing.labels["train"]
    for index, name in enumerate(listing.classes):
        members = np.flatnonzero(labels == index)
        if len(members) < 3:
            raise TaskvecError(
                f"class '{name}' has {len(members)} images, too few to divide into train, validation and test",
                "add images, or divide them yourself: train/, val/ and test/ with one folder a class each",
            )
        count = held_out if held_out and len(members) >= 4 * held_out else max(1, len(members) // 10)
        order = members[torch.randperm(len(members), generator=generator).numpy()]
        parts["validation"].append(order[:count])
        parts["test"].append(order[count : 2 * count])
        parts["train"].append(order[2 * count :])
    return _divided(listing, {split: np.sort(np.concatenate(chosen)) for split, chosen in parts.items()})


def _divided(listing: Listing, parts: dict[str, Int64[np.ndarray, " part"]]) -> Listing:
    """Return a listing whose training images are divided into splits, by their indices."""
    items, labels = listing.items["train"], listing.labels["train"]
    return replace(
        listing,
        items=listing.items | {name: pick(items, indices) for name, indices in parts.items()},
        labels=listing.labels | {name: labels[indices] for name, indices in parts.items()},
    )


def validation_as_test(listing: Listing, source: str) -> Listing:
    """Return a listing whose validation split is the test split, with a note that says so."""
    note = f"{source} has no test split: its validation split is tested on"
    return replace(listing.with_splits(train="train", test="validation"), notes=(*listing.notes, note))
