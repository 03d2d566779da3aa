"""Data sets as torchvision downloads them, ``torchvision:NAME@FOLDER``, read by torchvision itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from taskvec.core.errors import TaskvecError, did_you_mean
from taskvec.data.index import Items, Labels, Listing, check_files, check_trained, rename_classes
from taskvec.data.splits import split_classes

FLAG = {"train": {"train": True}, "test": {"train": False}}
TWO = {"train": {"split": "train"}, "test": {"split": "test"}}
THREE = TWO | {"validation": {"split": "val"}}
TORCHVISION: dict[str, dict[str, dict[str, Any]]] = {
    "CIFAR10": FLAG,
    "CIFAR100": FLAG,
    "Country211": TWO | {"validation": {"split": "valid"}},
    "DTD": THREE,
    "EuroSAT": {"train": {}},
    "FashionMNIST": FLAG,
    "FGVCAircraft": THREE,
    "Flowers102": THREE,
    "Food101": TWO,
    "GTSRB": TWO,
    "KMNIST": FLAG,
    "MNIST": FLAG,
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "RenderedSST2": THREE,
    "StanfordCars": TWO,
    "STL10": TWO,
    "SVHN": TWO,
    "USPS": FLAG,
}
"""The data sets of torchvision that are classified, with the arguments of each split; one split alone is divided."""


def list_own(rest: str) -> Listing:
    """List a data set of torchvision with splits that can be used."""
    listing = list_torchvision(rest)
    check_files(listing)
    if set(listing.labels) == {"train"}:
        listing = split_classes(listing)
    listing = rename_classes(listing, str, lambda names: tuple(n for n in listing.classes if n in names))
    check_trained(listing, f"torchvision:{rest}")
    return listing


def list_torchvision(rest: str) -> Listing:
    """List a data set of torchvision, ``NAME@FOLDER``, where the folder is what torchvision calls its root."""
    name, _, where = rest.partition("@")
    if name not in TORCHVISION:
        raise TaskvecError(f"torchvision has no task '{name}' that is known here", did_you_mean(name, TORCHVISION))
    if not where:
        raise TaskvecError(
            f"torchvision:{name} needs its folder", f"torchvision:{name}@FOLDER, data: FOLDER or $TASKVEC_DATA"
        )
    root = Path(where).expanduser()
    if name == "GTSRB":
        return signs(root)
    made = {split: made_by(name, root, **arguments) for split, arguments in TORCHVISION[name].items()}
    read = {split: contents(one) for split, one in made.items()}
    names = {split: class_names(one, read[split][1]) for split, one in made.items()}
    classes = tuple(dict.fromkeys(name for found in names.values() for name in found))
    places = {split: np.array([classes.index(name) for name in found]) for split, found in names.items()}
    items: dict[str, Items] = {split: pair[0] for split, pair in read.items()}
    labels: dict[str, Labels] = {split: places[split][pair[1]] for split, pair in read.items()}
    return Listing(classes, items, labels, root=root)


def signs(root: Path) -> Listing:
    """Read GTSRB by torchvision; its labels are folder names and ClassIds, however many classes are there."""
    made = {split: made_by("GTSRB", root, split=split)._samples for split in ("train", "test")}
    items: dict[str, Items] = {split: [Path(path) for path, _ in pairs] for split, pairs in made.items()}
    labels: dict[str, Labels] = {
        "train": np.array([int(Path(path).parent.name) for path, _ in made["train"]], np.int64),
        "test": np.array([label for _, label in made["test"]], np.int64),
    }
    count = 1 + max(int(found.max(initial=0)) for found in labels.values())
    return Listing(tuple(f"{index:05d}" for index in range(count)), items, labels, root=root / "gtsrb")


def made_by(name: str, root: Path, **arguments: Any) -> Any:
    """Open a data set by torchvision, without downloading; what it lacks is one message."""
    from torchvision import datasets

    class Svhn(datasets.SVHN):  # type: ignore[misc]
        """SVHN, whose files need not have the published checksums: sizes tell whether they are whole."""

        def _check_integrity(self) -> bool:
            return bool((Path(self.root) / self.filename).is_file())

    make = Svhn if name == "SVHN" else getattr(datasets, name)
    try:
        return make(str(root), **arguments)
    except Exception as error:  # as many kinds as torchvision has readers
        first = " ".join(str(error).split()) or "its files are damaged"
        raise TaskvecError(
            f"torchvision cannot read {name} from '{root}': {first}",
            f"is it whole? torchvision.datasets.{name}(FOLDER, download=True) downloads it, where that still works",
        ) from None


def contents(made: Any) -> tuple[Items, Labels]:
    """Return the images of a torchvision data set, as files or arrays, and their labels."""
    pairs = getattr(made, "samples", None) or getattr(made, "_samples", None)
    if pairs is not None:
        return [Path(path) for path, _ in pairs], np.array([int(label) for _, label in pairs], np.int64)
    labels = next(getattr(made, name) for name in ("_labels", "labels", "targets") if hasattr(made, name))
    files = getattr(made, "_image_files", None) or getattr(made, "_images", None)
    items: Items = [Path(path) for path in files] if files is not None else as_images(np.asarray(made.data))
    return items, np.asarray(labels).astype(np.int64)


def as_images(data: np.ndarray) -> UInt8[np.ndarray, "count 3 height width"]:
    """Return arrays of images with their three channels first; grey ones have all three alike and take no room."""
    if data.ndim == 3:
        return np.broadcast_to(data[:, None], (len(data), 3, *data.shape[1:]))
    return data.transpose(0, 3, 1, 2) if data.shape[-1] == 3 else data


def class_names(made: Any, labels: Labels) -> tuple[str, ...]:
    """Return the class names of a split, or its labels where it has no names; torchvision names those it has seen."""
    names = getattr(made, "classes", None)
    count = 1 + int(labels.max(initial=0))
    return tuple(names) if names is not None and len(names) >= count else tuple(map(str, range(count)))
