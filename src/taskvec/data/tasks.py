"""Tasks: class folders and the lab's, with their splits, decoded once for the encoder that will look at them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, UInt8

from taskvec.core.errors import TaskvecError, did_you_mean
from taskvec.core.files import fingerprint, read_json, write_json
from taskvec.core.notes import listen, note
from taskvec.core.progress import Progress, no_progress, share_of
from taskvec.core.task_types import CLASSIFICATION, TASK_TYPES
from taskvec.data import prompts as templates
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
from taskvec.data.folders import list_folder
from taskvec.data.hf_datasets import describe_hub, list_hub
from taskvec.data.hf_tables import address_parts, folder_of
from taskvec.data.images import Preprocessing
from taskvec.data.index import Items, Labels, Listing, alike, pick
from taskvec.data.paper_layouts import list_paper
from taskvec.data.splits import SPLITS, seeded_choice, split_validation, warned
from taskvec.data.torchvision_sets import list_own
from taskvec.engine.pipeline import versions
from taskvec.paper import tasks as papertasks

LAB_COUNTS = {"train": 4000, "test": 1000}
"""Images that a lab task draws; the validation split comes out of the training images."""
KEPT = "kept.json"
"""A digest of which training images both caches of a task hold, with their labels."""
DATA = "TASKVEC_DATA"
"""The environment variable with the folder of published data sets."""


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


def parse(address: str) -> tuple[str, str]:
    """Split ``kind:rest``, or raise and say which kinds there are."""
    kind, colon, rest = address.partition(":")
    if not colon or not rest:
        raise TaskvecError(
            f"task address '{address}' is not of the form kind:name", "for example folder:PATH or lab:greek"
        )
    if kind not in SOURCES:
        raise TaskvecError(f"unknown kind of task '{kind}' in '{address}'", did_you_mean(kind, SOURCES))
    return kind, rest


def default_name(address: str) -> str:
    """Return the name a task gets when none is given: the folder's, the data set's or the lab task's."""
    kind, rest = parse(address)
    if kind == "folder":
        return Path(os.path.abspath(Path(rest).expanduser())).name  # noqa: PTH100, a link keeps its own name
    name = address_parts(rest)[0] if kind == "hf" else rest.partition("@")[0]
    return name.rstrip("/").rpartition("/")[2]


def resolve(address: str, start: Path, data: str | None = None) -> str:
    """Return an address that means the same everywhere: paths are absolute, and published data sets have a folder.

    Relative paths begin at ``start``; published data sets lie in ``data``, or else in ``$TASKVEC_DATA``.
    """
    kind, rest = parse(address)
    whole = absolute(rest, start)
    if kind == "folder" or (kind == "hf" and os.path.isdir(whole)):  # noqa: PTH112, one behind a closed door is none
        return f"{kind}:{whole}"
    if kind == "hf":
        name, config = address_parts(rest)
        local = absolute(name, start)
        found = os.path.isdir(local) or name.startswith((".", "~"))  # noqa: PTH112
        return f"{kind}:{local}" + (f"@{config}" if config else "") if found else address
    name, _, where = rest.partition("@")
    if kind == "lab" or where == "hf" or where.startswith("hf:"):
        return address
    if where:
        return f"{kind}:{name}@{absolute(where, start)}"
    root = absolute(data, start) if data else Path(os.environ[DATA]).expanduser() if os.environ.get(DATA) else None
    return f"{kind}:{name}@{root.absolute()}" if root else address


def absolute(path: str, start: Path) -> Path:
    """Return a path that begins at a folder."""
    return start / Path(path).expanduser()


def hub_dataset(address: str) -> str | None:
    """Return the data set of the Hub that an address means, None where it is on disk or drawn."""
    kind, rest = parse(address)
    if kind == "hf":
        with readable(address):
            return None if folder_of(address_parts(rest)[0]) else rest
    name, _, where = rest.partition("@")
    if kind != "paper" or not (where in ("", "hf") or where.startswith("hf:")):
        return None
    dataset = where.removeprefix("hf").removeprefix(":") or papertasks.find_task(name).hub[0]
    return None if folder_of(address_parts(dataset)[0]) else dataset


def has_whole(address: str) -> bool:
    """Say whether training crops are cut from whole images; the lab's evaluation view is the whole image."""
    return parse(address)[0] != "lab"


@contextlib.contextmanager
def readable(address: str) -> Iterator[None]:
    """Turn what the system refuses about a task's files into a message that names the task and the place."""
    try:
        yield
    except OSError as error:
        place = error.filename or address
        raise TaskvecError(
            f"task '{address}' cannot be read at '{place}': {error.strerror or error}", "mend its permissions or path"
        ) from None


def list_task(address: str) -> Listing:
    """List a task's images and labels by split; a task without a validation split gets the protocol's."""
    kind, rest = parse(address)
    with readable(address):
        listing = SOURCES[kind](rest)
    listing = replace(listing, notes=listing.notes + alike(listing.classes))
    return listing if "validation" in listing.labels else warned(split_validation(listing, address))


def list_lab(name: str) -> Listing:
    """Draw one of the lab's tasks."""
    from taskvec.lab.drawing import worlds

    drawn = {split: worlds.draw(name, split, count) for split, count in LAB_COUNTS.items()}
    items = {split: images for split, (images, _) in drawn.items()}
    labels = {split: labels for split, (_, labels) in drawn.items()}
    return Listing(tuple(worlds.classes(name)), dict(items), labels, worlds.kind(name))


def describe_lab(name: str) -> dict[str, Any]:
    """Return what identifies a lab task's images; an unknown task raises with the nearest names."""
    from taskvec.lab.drawing import worlds

    worlds.check_task(name)
    about = {"lab": name, "counts": LAB_COUNTS, "images": sum(LAB_COUNTS.values()), "version": worlds.VERSION}
    return about | {"packages": versions(worlds.packages(name))}


def kind_of(address: str) -> str:
    """Return the kind of a task: the lab has several, image folders and data sets are classifications."""
    from taskvec.lab.drawing import worlds

    kind, rest = parse(address)
    return worlds.kind(rest) if kind == "lab" else CLASSIFICATION


def captions(address: str) -> list[str] | None:
    """Return a caption for each class of a task in the words of the lab's text encoders; None where it has none."""
    from taskvec.lab.drawing import worlds

    kind, rest = parse(address)
    return worlds.captions(rest) if kind == "lab" else None


def sentences(address: str, name: str) -> list[list[str]] | None:
    """Return captions for each class of a task in plain sentences, for other text towers: those of its data set.

    Where the address does not tell which that is, ``name`` does.
    A task of another kind than classification has none, nor one of the lab whose classes have no caption.
    """
    kind, _ = parse(address)
    names = captions(address) if kind == "lab" else list_task(address).classes
    data_sets = [name] if kind == "folder" else [default_name(address), name]
    return templates.captions(names, data_sets) if names else None


SOURCES: dict[str, Callable[[str], Listing]] = {
    "folder": list_folder,
    "hf": list_hub,
    "lab": list_lab,
    "paper": list_paper,
    "torchvision": list_own,
}


def describe(address: str, digest: Callable[[Path, Sequence[str]], str]) -> dict[str, Any]:
    """Return what identifies a task's images, for a fingerprint: the lab's name, a revision, or digests of content.

    What its files leave to be told is noted.
    """
    kind, rest = parse(address)
    if kind == "lab":
        return describe_lab(rest)
    if dataset := hub_dataset(address):
        size = {"images": sum(papertasks.find_task(rest.partition("@")[0]).sizes)} if kind == "paper" else {}
        return describe_hub(dataset) | size | {"kind": kind}
    listing = list_task(address)
    for line in listing.notes:
        note(f"{address}: {line}")
    every = [item for items in listing.items.values() if isinstance(items, list) for item in items]
    found = {"content": digest(listing.root, relative(every or list(listing.files), listing.root))}
    if kind != "folder":
        found["listing"] = listing_digest(listing)
    return found | {"images": sum(listing.sizes().values())}


def relative(paths: Sequence[Path], root: Path) -> list[str]:
    """Return paths from a folder on."""
    return [path.relative_to(root).as_posix() for path in paths]


def listing_digest(listing: Listing) -> str:
    """Return a digest of which image has which label in which split; images that are in memory count themselves."""
    found: dict[str, Any] = {"classes": list(listing.classes)}
    for split, items in listing.items.items():
        labels = listing.labels[split].tolist()
        if isinstance(items, np.ndarray):
            names: Any = hashlib.sha256(np.ascontiguousarray(items).data).hexdigest()
        else:
            names = [path.relative_to(listing.root).as_posix() for path in items] if isinstance(items, list) else None
        found[split] = [labels, names]
    return fingerprint(found)


def write_task(
    address: str,
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
    listing = few(list_whole(address, to, known), limit)
    total, before = sum(listing.sizes().values()), 0
    check_room(view_bytes(total, to.size), folder, f"{total} images of {default_name(address)}")
    written: dict[str, DecodedSplit] = {}
    for split in SPLITS:
        count = len(listing.labels[split])
        ours = share_of(progress, before / total, count / total)
        one = write_views(listing.items[split], to, folder / f"{split}.npy", skip_corrupt, ours)
        np.save(folder / f"{split}-labels.npy", listing.labels[split][one.kept])
        written[split] = one
        before += count
    write_json(folder / "classes.json", list(listing.classes))
    if listing.kind != CLASSIFICATION:
        write_json(folder / "kind.json", listing.kind)
    if has_whole(address):
        check_kept(listing, written, address)
        write_json(folder / KEPT, kept_digest(listing, written["train"].kept))
        for line in (*listing.notes, *decoding_notes(written, listing.items, listing.labels)):
            note(line)


def check_kept(listing: Listing, written: dict[str, DecodedSplit], address: str) -> None:
    """Raise if a class lost all its training images, or a split all its images, because none could be read."""
    kept = {split: listing.labels[split][one.kept] for split, one in written.items()}
    lost = sorted(set(listing.labels["train"].tolist()) - set(kept["train"].tolist()))
    empty = [split for split, labels in kept.items() if not len(labels)]
    if lost or empty:
        what = f"the training images of class '{listing.classes[lost[0]]}'" if lost else f"the {empty[0]} split"
        raise TaskvecError(f"task '{address}': nothing of {what} can be read", "replace the corrupt images")


def write_training(
    address: str,
    to: Preprocessing,
    limit: int | None,
    folder: Path,
    progress: Progress = no_progress,
    skip_corrupt: bool = False,
    known: Mapping[str, Any] | None = None,
) -> None:
    """Decode a task's training images whole into a folder: the same images in the same order as ``write_task``."""
    listing = few(list_whole(address, to, known), limit)
    items = listing.items["train"]
    check_room(whole_bytes(items, to), folder, f"{len(items)} training images of {default_name(address)}")
    kept = write_whole(items, to, folder, skip_corrupt, progress)
    write_json(folder / KEPT, kept_digest(listing, kept))


def kept_digest(listing: Listing, kept: Int64[np.ndarray, " kept"]) -> str:
    """Return a digest of the training images at the places that were kept: of their names, or numbers, and labels."""
    items, labels = listing.items["train"], listing.labels["train"][kept].tolist()
    names = relative([items[place] for place in kept], listing.root) if isinstance(items, list) else kept.tolist()
    return fingerprint([names, labels])


def check_unchanged(listing: Listing, known: Mapping[str, Any], address: str) -> None:
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


def list_whole(address: str, to: Preprocessing, known: Mapping[str, Any] | None) -> Listing:
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
    address: str,
    preprocessing: Preprocessing,
    name: str | None = None,
    limit: int | None = None,
    skip_corrupt: bool = False,
) -> Task:
    """Decode a task into memory for an encoder's preprocessing; ``limit`` keeps a seeded choice of so many a split.

    What the user should know of it, such as images that are in two splits, is printed to standard error.
    """
    address = resolve(address, Path.cwd())
    with tempfile.TemporaryDirectory() as temporary:
        views, training = Path(temporary) / "views", Path(temporary) / "training"
        with listen() as heard:
            for folder, write in ((views, write_task), (training, write_training)):
                if folder is views or has_whole(address):
                    folder.mkdir()
                    write(address, preprocessing, limit, folder, skip_corrupt=skip_corrupt)
        for line in heard:
            note(f"{address}: {line}")
        whole = training if training.exists() else None
        return read_task(views, name or default_name(address), whole, mmap_mode=None)
