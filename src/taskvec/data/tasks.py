"""Tasks: listed with their splits, decoded once for the encoder that will look at them, and opened again."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, UInt8

from taskvec.core.errors import TaskvecError
from taskvec.core.files import fingerprint, read_json, write_json
from taskvec.core.notes import listen, note
from taskvec.core.progress import Progress, no_progress, share_of
from taskvec.core.task_types import CLASSIFICATION, TASK_TYPES
from taskvec.data import prompts
from taskvec.data.addresses import TaskAddress, readable
from taskvec.data.decoding import (
    DecodedSplit,
    Whole,
    check_room,
    decoding_notes,
    read_whole,
    view_bytes,
    whole_bytes,
    write_views,
    write_whole,
)
from taskvec.data.hf_datasets import describe_hub
from taskvec.data.images import Preprocessing
from taskvec.data.index import Items, Labels, Listing, alike, pick
from taskvec.data.sources import parse
from taskvec.data.splits import SPLITS, seeded_choice, split_validation, warned

KEPT = "kept.json"
"""A digest of which training images both caches of a task hold, with their labels."""


@dataclass(frozen=True)
class Split:
    """Decoded images of one split (uint8, channels first) and their labels; to train, perhaps whole images as well."""

    images: UInt8[np.ndarray, "count 3 size size"]
    labels: Labels
    whole: Whole | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def sample(self, count: int) -> Split:
        """Return a seeded choice of at most ``count`` images."""
        order = seeded_choice(len(self), count)
        return Split(self.images[order], self.labels[order])


@dataclass(frozen=True)
class Task:
    """A task, decoded for one encoder: its name, class names in label order, three splits, and its kind.

    Where the kind has no classes they name the head's outputs.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    kind: str = CLASSIFICATION


def list_task(address: str | TaskAddress) -> Listing:
    """List a task's images and labels by split; a task without a validation split gets the protocol's."""
    address = parse(address)
    with readable(address):
        listing = address.source.read(address.rest)
    listing = replace(listing, notes=listing.notes + alike(listing.classes))
    return listing if "validation" in listing.labels else warned(split_validation(listing, str(address)))


def captions(address: str | TaskAddress) -> list[str] | None:
    """Return a caption for each class of a task in the words of the lab's text encoders; None where it has none."""
    address = parse(address)
    return address.source.captions(address.rest) if address.source.captions else None


def sentences(address: str | TaskAddress, name: str) -> list[list[str]] | None:
    """Return captions for each class of a task in plain sentences, for other text towers: those of its data set.

    Where the address does not tell which that is, ``name`` does.
    A task of another type than classification has none, nor one of the lab whose classes have no caption.
    """
    address = parse(address)
    names = captions(address) if address.source.captions else list_task(address).classes
    data_sets = [name] if address.source.class_folders else [address.default_name, name]
    return prompts.captions(names, data_sets) if names else None


def describe(address: str | TaskAddress, digest: Callable[[Path, Sequence[str]], str]) -> dict[str, Any]:
    """Return what identifies a task's images, for a fingerprint: the lab's name, a revision, or digests of content.

    What its files leave to be told is noted.
    """
    address = parse(address)
    if address.source.identify is not None:
        return address.source.identify(address.rest)
    if dataset := address.dataset:
        size = {"images": sum(address.paper.sizes)} if address.paper else {}
        return describe_hub(dataset) | size | {"kind": address.kind}
    listing = list_task(address)
    for line in listing.notes:
        note(f"{address}: {line}")
    every = [item for items in listing.items.values() if isinstance(items, list) for item in items]
    about = {"content": digest(listing.root, relative(every or list(listing.files), listing.root))}
    if not address.source.class_folders:
        about["listing"] = listing_digest(listing)
    return about | {"images": sum(listing.sizes().values())}


def relative(paths: Sequence[Path], root: Path) -> list[str]:
    """Return paths from a folder on."""
    return [path.relative_to(root).as_posix() for path in paths]


def listing_digest(listing: Listing) -> str:
    """Return a digest of which image has which label in which split; images that are in memory count themselves."""
    record: dict[str, Any] = {"classes": list(listing.classes)}
    for split, items in listing.items.items():
        labels = listing.labels[split].tolist()
        if isinstance(items, np.ndarray):
            names: Any = hashlib.sha256(np.ascontiguousarray(items).data).hexdigest()
        else:
            names = [path.relative_to(listing.root).as_posix() for path in items] if isinstance(items, list) else None
        record[split] = [labels, names]
    return fingerprint(record)


def write_task(
    address: str | TaskAddress,
    to: Preprocessing,
    limit: int | None,
    folder: Path,
    progress: Progress = no_progress,
    skip_corrupt: bool = False,
    known: Mapping[str, Any] | None = None,
) -> None:
    """Decode a task into a folder: a uint8 memory map and the labels of each split, class names, an unusual kind.

    What the user should know, such as images that are in two splits, is a note. A task that has changed
    since it was ``known``, which is what ``describe`` told, raises.
    """
    address = parse(address)
    listing = few(list_whole(address, to, known), limit)
    total, before = sum(listing.sizes().values()), 0
    check_room(view_bytes(total, to.size), folder, f"{total} images of {address.default_name}")
    written: dict[str, DecodedSplit] = {}
    for split in SPLITS:
        count = len(listing.labels[split])
        ours = share_of(progress, before / total, count / total)
        views = write_views(listing.items[split], to, folder / f"{split}.npy", skip_corrupt, ours)
        np.save(folder / f"{split}-labels.npy", listing.labels[split][views.kept])
        written[split] = views
        before += count
    write_json(folder / "classes.json", list(listing.classes))
    if listing.kind != CLASSIFICATION:
        write_json(folder / "kind.json", listing.kind)
    if address.source.has_whole:
        check_kept(listing, written, address)
        write_json(folder / KEPT, kept_digest(listing, written["train"].kept))
        for line in (*listing.notes, *decoding_notes(written, listing.items, listing.labels)):
            note(line)


def check_kept(listing: Listing, written: dict[str, DecodedSplit], address: TaskAddress) -> None:
    """Raise if a class lost all its training images, or a split all its images, because none could be read."""
    kept = {split: listing.labels[split][one.kept] for split, one in written.items()}
    missing = sorted(set(listing.labels["train"].tolist()) - set(kept["train"].tolist()))
    empty = [split for split, labels in kept.items() if not len(labels)]
    if missing or empty:
        what = f"the training images of class '{listing.classes[missing[0]]}'" if missing else f"the {empty[0]} split"
        raise TaskvecError(f"task '{address}': nothing of {what} can be read", "replace the corrupt images")


def write_training(
    address: str | TaskAddress,
    to: Preprocessing,
    limit: int | None,
    folder: Path,
    progress: Progress = no_progress,
    skip_corrupt: bool = False,
    known: Mapping[str, Any] | None = None,
) -> None:
    """Decode a task's training images whole into a folder: the same images in the same order as ``write_task``."""
    address = parse(address)
    listing = few(list_whole(address, to, known), limit)
    items = listing.items["train"]
    check_room(whole_bytes(items, to), folder, f"{len(items)} training images of {address.default_name}")
    kept = write_whole(items, to, folder, skip_corrupt, progress)
    write_json(folder / KEPT, kept_digest(listing, kept))


def kept_digest(listing: Listing, kept: Int64[np.ndarray, " kept"]) -> str:
    """Return a digest of the training images at the places that were kept: of their names, or numbers, and labels."""
    items, labels = listing.items["train"], listing.labels["train"][kept].tolist()
    names = relative([items[place] for place in kept], listing.root) if isinstance(items, list) else kept.tolist()
    return fingerprint([names, labels])


def check_unchanged(listing: Listing, known: Mapping[str, Any], address: TaskAddress) -> None:
    """Raise if files have been added, removed or put into other classes since a task was described."""
    count = sum(listing.sizes().values())
    listed = "listing" in known and listing_digest(listing) != known["listing"]
    if "content" in known and (listed or count != known["images"]):
        raise TaskvecError(
            f"task '{address}' has changed since the run began: it had {known['images']} images, now it has {count}",
            "run again when nothing writes to it any more",
        )


def few(listing: Listing, limit: int | None) -> Listing:
    """Return a listing with a seeded choice of at most ``limit`` images a split."""
    chosen = {split: seeded_choice(len(listing.labels[split]), limit) for split in SPLITS}
    items: dict[str, Items] = {split: pick(listing.items[split], indices) for split, indices in chosen.items()}
    labels: dict[str, Labels] = {split: listing.labels[split][indices] for split, indices in chosen.items()}
    return replace(listing, items=items, labels=labels)


def list_whole(address: TaskAddress, to: Preprocessing, known: Mapping[str, Any] | None) -> Listing:
    """List a task's images and labels, unchanged; a view that cuts images may not have labels of patches."""
    listing = list_task(address)
    check_unchanged(listing, known or {}, address)
    if TASK_TYPES[listing.kind].per_patch and to.crop < 1:
        raise TaskvecError(
            f"task '{address}' labels the patches of whole images, and the encoder sees {to.crop:.0%} of their side",
            "choose an encoder with a crop share of 1, or leave the task out",
        )
    return listing


def read_task(folder: Path, name: str, whole: Path | None = None, mmap_mode: Literal["r"] | None = "r") -> Task:
    """Open a decoded task, and the folder of its whole training images; they stay on disk until they are looked at."""
    splits = {
        split: Split(np.load(folder / f"{split}.npy", mmap_mode=mmap_mode), np.load(folder / f"{split}-labels.npy"))
        for split in SPLITS
    }
    if whole is not None:
        splits["train"] = replace(splits["train"], whole=read_whole(whole, mmap_mode))
        check_same(folder, whole, splits["train"], name)
    kind = folder / "kind.json"
    classes = tuple(read_json(folder / "classes.json"))
    return Task(name, classes, **splits, kind=read_json(kind) if kind.exists() else CLASSIFICATION)


def check_same(views: Path, whole: Path, train: Split, name: str) -> None:
    """Raise unless a task's two caches hold the same training images; older ones can be counted only."""
    records = [read_json(folder / KEPT) for folder in (views, whole) if (folder / KEPT).exists()]
    assert train.whole is not None
    if len(set(records)) > 1 or len(train.whole.shapes) != len(train.labels):
        raise TaskvecError(
            f"the decoded images of task '{name}' in '{views}' and its whole training images in '{whole}' are not of "
            "the same files: the task was changed, or could not be read for a while, between the two",
            f"taskvec store --clear {views.name}, the same for {whole.name}, and run again",
        )


def load_task(
    address: str | TaskAddress,
    preprocessing: Preprocessing,
    name: str | None = None,
    limit: int | None = None,
    skip_corrupt: bool = False,
) -> Task:
    """Decode a task into memory for an encoder's preprocessing; ``limit`` keeps a seeded choice of so many a split.

    What the user should know of it, such as images that are in two splits, is printed to standard error.
    """
    address = parse(address, Path.cwd())
    with tempfile.TemporaryDirectory() as temporary:
        views, training = Path(temporary) / "views", Path(temporary) / "training"
        with listen() as heard:
            for folder, write in ((views, write_task), (training, write_training)):
                if folder is views or address.source.has_whole:
                    folder.mkdir()
                    write(address, preprocessing, limit, folder, skip_corrupt=skip_corrupt)
        for line in heard:
            note(f"{address}: {line}")
        whole = training if training.exists() else None
        return read_task(views, name or address.default_name, whole, mmap_mode=None)
