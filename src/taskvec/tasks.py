"""Tasks: class folders and the lab's, with their splits, decoded once for the encoder that will look at them."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from numpy.lib.format import write_array_header_1_0

from taskvec import templates
from taskvec.errors import TaskvecError, did_you_mean
from taskvec.images import SUFFIXES, Preprocessing, decode
from taskvec.kinds import CLASSIFICATION, KINDS
from taskvec.store import read_json, write_json
from taskvec.training import Progress, no_progress

SPLITS = ("train", "validation", "test")
LAB_COUNTS = {"train": 4000, "test": 1000}
"""Images that a lab task draws; the validation split comes out of the training images."""
CHUNK = 64
"""Images that are decoded between two reports of progress."""
Labels = Int64[np.ndarray, " count *patches"] | Float32[np.ndarray, "count 2"]
"""A class of each image (or each patch, row by row), or the cosine and sine of its angle."""


@dataclass(frozen=True)
class Split:
    """Decoded images of one split (uint8, channels first) and their labels."""

    images: UInt8[np.ndarray, "count 3 size size"]
    labels: Labels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


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


@dataclass(frozen=True)
class Listing:
    """What a task address holds before decoding: image files or drawn images, and labels, by split."""

    classes: tuple[str, ...]
    items: dict[str, Sequence[Path] | UInt8[np.ndarray, "count 3 height width"]]
    labels: dict[str, Labels]
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
    """Return the name a task gets when none is given: the folder's or the lab task's."""
    kind, rest = parse(address)
    return Path(rest).expanduser().resolve().name if kind == "folder" else rest


def list_task(address: str) -> Listing:
    """List a task's images and labels by split; a task without a validation split gets the protocol's."""
    kind, rest = parse(address)
    listing = SOURCES[kind](rest)
    return listing if "validation" in listing.labels else split_validation(listing, address)


def list_folder(path: str) -> Listing:
    """List ``train/ [val/] test/`` of class folders; classes and files are in the order of their names."""
    root = Path(path).expanduser()
    check_root(root)
    names = {"train": "train", "test": "test"} | ({"validation": "val"} if (root / "val").exists() else {})
    found = {split: class_files(root / name) for split, name in names.items()}
    classes = tuple(sorted(found["train"]))
    for split in names:
        _check_classes(root / names[split], found[split], classes)
    items = {split: [file for c in classes for file in files.get(c, [])] for split, files in found.items()}
    labels = {
        split: np.array([i for i, c in enumerate(classes) for _ in files.get(c, [])], dtype=np.int64)
        for split, files in found.items()
    }
    return Listing(classes, dict(items), labels)


def check_root(root: Path) -> None:
    """Raise unless a folder has train/ and test/, or where its validation folder has another name than val/."""
    layout = "expected train/, test/ and perhaps val/ in it, each with one folder a class"
    if not root.is_dir():
        near = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        hint = did_you_mean(root.name, near) if near else layout
        raise TaskvecError(f"no task folder at '{root}'", hint)
    held = sorted(p.name for p in root.iterdir())
    for name in ("train", "test"):
        if not (root / name).is_dir():
            shown = ", ".join(held[:8]) or "nothing"
            raise TaskvecError(f"task folder '{root}' has no {name}/ folder; it holds {shown}", layout)
    for name in ("valid", "validation"):
        if name in held:
            raise TaskvecError(f"task folder '{root}' holds {name}/, which would be passed over", "rename it to val/")


def class_files(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of every class folder, by class name (in Unicode normal form C)."""
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    classes = [p for p in entries if p.is_dir()]
    if not classes:
        raise TaskvecError(
            f"'{folder}' holds no class folders", "put the images of each class into a folder of its own"
        )
    loose = [p.name for p in entries if p.suffix.lower() in SUFFIXES and p.is_file()]
    if loose:
        raise TaskvecError(f"image '{folder / loose[0]}' is in no class folder", "move it into one or remove it")
    found: dict[str, list[Path]] = {}
    for path in classes:
        name = class_name(path)
        if name in found:
            raise TaskvecError(
                f"'{folder}' has two class folders named '{name}'", "one is spelt with combining accents: merge them"
            )
        found[name] = image_files(path)
    return found


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


def image_files(folder: Path) -> list[Path]:
    """Return the images in a folder and below it (links are followed, hidden ones left out), in the order of names.

    Other files are left out with a message that counts them.
    """
    every = [Path(top) / name for top, _, names in visible(folder) for name in names if not name.startswith(".")]
    images = [path for path in every if path.suffix.lower() in SUFFIXES]
    if len(images) < len(every):
        odd = next(path for path in every if path.suffix.lower() not in SUFFIXES)
        print(
            f"'{folder}': left out {len(every) - len(images)} files that are no images, such as {odd.name}",
            file=sys.stderr,
        )
    return sorted(images, key=lambda path: path.relative_to(folder).as_posix())


def visible(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a folder and those below it that are not hidden, through links, each real folder once."""
    seen = set()
    for top, below, names in os.walk(folder, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if (real := os.path.realpath(top)) not in seen:
            seen.add(real)
            yield top, below, names
        else:
            below.clear()


def _check_classes(folder: Path, files: dict[str, list[Path]], classes: tuple[str, ...]) -> None:
    extra = sorted(set(files) - set(classes))
    if extra:
        raise TaskvecError(
            f"class '{extra[0]}' is in '{folder}' but not in train/"
            + (f" (and {len(extra) - 1} more)" if extra[1:] else ""),
            f"add training images for it, or remove it; {did_you_mean(extra[0], classes)}",
        )
    empty = sorted(name for name, found in files.items() if not found)
    if folder.name == "train" and empty:
        raise TaskvecError(
            f"class folder '{folder / empty[0]}' has no images",
            f"readable are {' '.join(SUFFIXES)}; add some or remove it",
        )
    if folder.name == "train" and len(classes) < 2:
        raise TaskvecError(f"'{folder}' has one class only, '{classes[0]}'", "a task needs at least two classes")
    if not any(files.values()):
        raise TaskvecError(f"'{folder}' has no images", f"readable are {' '.join(SUFFIXES)}")


def list_lab(name: str) -> Listing:
    """Draw one of the lab's tasks."""
    from taskvec.lab import worlds

    drawn = {split: worlds.draw(name, split, count) for split, count in LAB_COUNTS.items()}
    items = {split: images for split, (images, _) in drawn.items()}
    labels = {split: labels for split, (_, labels) in drawn.items()}
    return Listing(tuple(worlds.classes(name)), dict(items), labels, worlds.kind(name))


def describe_lab(name: str) -> dict[str, Any]:
    """Return what identifies a lab task's images; an unknown task raises with the nearest names."""
    from taskvec.lab import worlds

    worlds.check_task(name)
    return {"lab": name, "counts": LAB_COUNTS, "images": sum(LAB_COUNTS.values()), "version": worlds.VERSION}


def captions(address: str) -> list[str] | None:
    """Return a caption for each class of a task in the words of the lab's text encoders; None where it has none."""
    from taskvec.lab import worlds

    kind, rest = parse(address)
    return worlds.captions(rest) if kind == "lab" else None


def sentences(address: str, name: str) -> list[list[str]] | None:
    """Return captions for each class of a task in plain sentences, for other text towers; ``name`` chooses which.

    A task of another kind than classification has none, nor one of the lab whose classes have no caption.
    """
    kind, _ = parse(address)
    names = captions(address) if kind == "lab" else list_task(address).classes
    return templates.captions(names, name) if names else None


SOURCES: dict[str, Callable[[str], Listing]] = {"folder": list_folder, "lab": list_lab}


def split_validation(listing: Listing, source: str) -> Listing:
    """Take int(0.1 N) training images, at most 5000, for validation, as the paper's code does (protocol, Data)."""
    train, validation = validation_indices(len(listing.labels["train"]))
    if not len(validation):
        count = len(listing.labels["train"])
        raise TaskvecError(
            f"task '{source}' has {count} training images: too few to hold out a tenth", "add images or a val/ folder"
        )
    items, labels = listing.items["train"], listing.labels["train"]
    parts = {"train": train, "validation": validation}
    return replace(
        listing,
        items=listing.items | {split: pick(items, indices) for split, indices in parts.items()},
        labels=listing.labels | {split: labels[indices] for split, indices in parts.items()},
    )


def validation_indices(count: int) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " validation"]]:
    """Return the indices of ``random_split(train, [N - v, v])`` with a generator seeded 0, v = min(N // 10, 5000)."""
    held_out = min(int(0.1 * count), 5000)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
    return order[: count - held_out], order[count - held_out :]


Items = Sequence[Path] | UInt8[np.ndarray, "count 3 height width"]


def pick(items: Items, indices: Int64[np.ndarray, " chosen"]) -> Items:
    """Return the items at ``indices``."""
    return items[indices] if isinstance(items, np.ndarray) else [items[i] for i in indices]


def describe(address: str, digest: Callable[[Path, Sequence[str]], str]) -> dict[str, Any]:
    """Return what identifies a task's images, for a fingerprint: the lab's name, or a digest of the files."""
    kind, rest = parse(address)
    if kind == "lab":
        return describe_lab(rest)
    listing = list_task(address)
    root = Path(rest).expanduser()
    files = [p.relative_to(root).as_posix() for items in listing.items.values() for p in items if isinstance(p, Path)]
    return {"content": digest(root, files), "images": len(files)}


def write_task(
    address: str, to: Preprocessing, limit: int | None, folder: Path, progress: Progress = no_progress
) -> None:
    """Decode a task into a folder: a uint8 memory map and the labels of each split, class names, an unusual kind."""
    listing = list_whole(address, to)
    chosen = {split: _chosen(len(listing.labels[split]), limit) for split in SPLITS}
    total, before = sum(map(len, chosen.values())), 0
    for split, indices in chosen.items():
        items, labels = pick(listing.items[split], indices), listing.labels[split][indices]
        with (folder / f"{split}.npy").open("wb") as file:  # written, not mapped: a full disk is an error, not a crash
            shape = (len(labels), 3, to.size, to.size)
            write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for start in range(0, len(labels), CHUNK):
                part = np.empty((len(labels[start : start + CHUNK]), *shape[1:]), np.uint8)
                decode(items[start : start + CHUNK], to, part)
                file.write(part.tobytes())
                progress((before + start + len(part)) / total)
        np.save(folder / f"{split}-labels.npy", labels)
        before += len(labels)
    write_json(folder / "classes.json", list(listing.classes))
    if listing.kind != CLASSIFICATION:
        write_json(folder / "kind.json", listing.kind)


def list_whole(address: str, to: Preprocessing) -> Listing:
    """List a task's images and labels; a view that cuts images may not have labels of patches."""
    listing = list_task(address)
    if KINDS[listing.kind].per_patch and to.crop < 1:
        raise TaskvecError(
            f"task '{address}' labels the patches of whole images, and the encoder sees {to.crop:.0%} of their side",
            "choose an encoder with a crop share of 1, or leave the task out",
        )
    return listing


def _chosen(count: int, limit: int | None) -> Int64[np.ndarray, " chosen"]:
    """Return all indices in order, or a seeded choice of ``limit``."""
    if limit is None or count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:limit])


def read_task(folder: Path, name: str) -> Task:
    """Open a decoded task; images stay on disk until they are looked at."""
    splits = {
        split: Split(np.load(folder / f"{split}.npy", mmap_mode="r"), np.load(folder / f"{split}-labels.npy"))
        for split in SPLITS
    }
    kind = folder / "kind.json"
    classes = tuple(read_json(folder / "classes.json"))
    return Task(name, classes, **splits, kind=read_json(kind) if kind.exists() else CLASSIFICATION)


def load_task(address: str, preprocessing: Preprocessing, name: str | None = None, limit: int | None = None) -> Task:
    """Decode a task into memory for an encoder's preprocessing; ``limit`` keeps a seeded choice of so many a split."""
    listing = list_whole(address, preprocessing)
    splits = {}
    for split in SPLITS:
        indices = _chosen(len(listing.labels[split]), limit)
        images = np.empty((len(indices), 3, preprocessing.size, preprocessing.size), np.uint8)
        decode(pick(listing.items[split], indices), preprocessing, images)
        splits[split] = Split(images, listing.labels[split][indices])
    return Task(name or default_name(address), listing.classes, **splits, kind=listing.kind)
