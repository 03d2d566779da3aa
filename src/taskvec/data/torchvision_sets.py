"""Data sets as torchvision downloads them, ``torchvision:NAME@FOLDER``, read by torchvision itself."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from taskvec.core.errors import TaskvecError, did_you_mean
from taskvec.data.index import Items, Labels, Listing, check_files, check_trained, rename_classes
from taskvec.data.splits import split_classes

BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
TWO_SPLITS = {"train": {"split": "train"}, "test": {"split": "test"}}
THREE_SPLITS = TWO_SPLITS | {"validation": {"split": "val"}}
TORCHVISION: dict[str, dict[str, dict[str, Any]]] = {
    "CIFAR10": BY_FLAG,
    "CIFAR100": BY_FLAG,
    "Country211": TWO_SPLITS | {"validation": {"split": "valid"}},
    "DTD": THREE_SPLITS,
    "EuroSAT": {"train": {}},
    "FashionMNIST": BY_FLAG,
    "FGVCAircraft": THREE_SPLITS,
    "Flowers102": THREE_SPLITS,
    "Food101": TWO_SPLITS,
    "GTSRB": TWO_SPLITS,
    "KMNIST": BY_FLAG,
    "MNIST": BY_FLAG,
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "RenderedSST2": THREE_SPLITS,
    "StanfordCars": TWO_SPLITS,
    "STL10": TWO_SPLITS,
    "SVHN": TWO_SPLITS,
    "USPS": BY_FLAG,
}
"""The classification data sets of torchvision, with the arguments of each split; a single split is divided."""


def list_own(rest: str) -> Listing:
    """Return the images of a data set of torchvision, ready for training: divided, with classes that have images."""
    listing = list_torchvision(rest)
    check_files(listing)
    if set(listing.labels) == {"train"}:
        listing = split_classes(listing)
    listing = rename_classes(listing, str, lambda names: tuple(n for n in listing.classes if n in names))
    check_trained(listing, f"torchvision:{rest}")
    return listing


def list_torchvision(rest: str) -> Listing:
    """Return the images of ``NAME@FOLDER`` as torchvision reads them; the folder is what torchvision calls root."""
    name, _, where = rest.partition("@")
    if name not in TORCHVISION:
        raise TaskvecError(f"torchvision has no task '{name}' that is known here", did_you_mean(name, TORCHVISION))
    if not where:
        raise TaskvecError(
            f"torchvision:{name} needs its folder", f"torchvision:{name}@FOLDER, data: FOLDER or $TASKVEC_DATA"
        )
    root = Path(where).expanduser()
    if name == "GTSRB":
        return gtsrb_files(root)
    datasets = {split: open_dataset(name, root, **arguments) for split, arguments in TORCHVISION[name].items()}
    contents = {split: images_and_labels(dataset) for split, dataset in datasets.items()}
    names = {split: class_names(dataset, contents[split][1]) for split, dataset in datasets.items()}
    classes = tuple(dict.fromkeys(chain(*names.values())))
    numbers = {split: np.array([classes.index(name) for name in of_split]) for split, of_split in names.items()}
    items: dict[str, Items] = {split: images for split, (images, _) in contents.items()}
    labels: dict[str, Labels] = {split: numbers[split][own] for split, (_, own) in contents.items()}
    return Listing(classes, items, labels, root=root)


def gtsrb_files(root: Path) -> Listing:
    """Return GTSRB read by torchvision; labels are folder names and ClassIds, however many classes are there."""
    samples = {split: open_dataset("GTSRB", root, split=split)._samples for split in ("train", "test")}
    items: dict[str, Items] = {split: [Path(path) for path, _ in pairs] for split, pairs in samples.items()}
    labels: dict[str, Labels] = {
        "train": np.array([int(Path(path).parent.name) for path, _ in samples["train"]], np.int64),
        "test": np.array([label for _, label in samples["test"]], np.int64),
    }
    count = 1 + max(int(numbers.max(initial=0)) for numbers in labels.values())
    return Listing(tuple(f"{index:05d}" for index in range(count)), items, labels, root=root / "gtsrb")


def open_dataset(name: str, root: Path, **arguments: Any) -> Any:
    """Return a data set opened by torchvision, without downloading; what it lacks is one error."""
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


def images_and_labels(dataset: Any) -> tuple[Items, Labels]:
    """Return the images of a data set of torchvision, as files or arrays, and their labels."""
    pairs = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
    if pairs is not None:
        return [Path(path) for path, _ in pairs], np.array([int(label) for _, label in pairs], np.int64)
    labels = next(getattr(dataset, name) for name in ("_labels", "labels", "targets") if hasattr(dataset, name))
    files = getattr(dataset, "_image_files", None) or getattr(dataset, "_images", None)
    items: Items = [Path(path) for path in files] if files is not None else as_images(np.asarray(dataset.data))
    return items, np.asarray(labels).astype(np.int64)


def as_images(data: np.ndarray) -> UInt8[np.ndarray, "count 3 height width"]:
    """Return arrays of images with three channels first; grey ones share one channel in memory."""
    if data.ndim == 3:
        return np.broadcast_to(data[:, None], (len(data), 3, *data.shape[1:]))
    return data.transpose(0, 3, 1, 2) if data.shape[-1] == 3 else data


def class_names(dataset: Any, labels: Labels) -> tuple[str, ...]:
    """Return the class names of a split, or its labels where torchvision names fewer classes than it has."""
    names = getattr(dataset, "classes", None)
    count = 1 + int(labels.max(initial=0))
    return tuple(names) if names is not None and len(names) >= count else tuple(map(str, range(count)))
