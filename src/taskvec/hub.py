"""Image data sets of the Hugging Face Hub, or local folders of parquet, read by ``datasets``; never remote code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from taskvec.errors import TaskvecError, did_you_mean
from taskvec.images import CorruptImage, Encoded, corrupt
from taskvec.listing import Items, Labels, Listing, check_trained, rename_classes, split_classes
from taskvec.network import asked_once, endpoint

NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev"),
}
"""What splits are called."""
LABELS = ("label", "labels", "fine_label")
"""The columns of class labels that are taken where there are several."""
ENDINGS = (".parquet", ".arrow")


@dataclass(frozen=True)
class Table:
    """Rows of a data set's image column, as files; ``places`` are those chosen of it, in order.

    Where a data set is ``local`` its images must lie in the table: what is elsewhere is not in its digest.
    """

    column: Any
    name: str
    places: Int64[np.ndarray, " count"]
    local: bool = False

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.places)

    def __getitem__(self, index: int) -> Encoded:
        """Return an image's bytes, as they are in the table or in the file it names."""
        place = int(self.places[index])
        cell, name = self.column[place], f"{self.name}, row {place}"
        if cell is None or not (cell["bytes"] or cell["path"]):
            raise CorruptImage(f"image '{name}' is empty", "replace it or remove it")
        if self.local and not cell["bytes"]:
            raise TaskvecError(
                f"image '{name}' is not in the table, which names '{cell['path']}'",
                "write the table with its images in it (datasets: embed_table_storage), or use folder:PATH",
            )
        with corrupt(name):
            return Encoded(cell["bytes"] or Path(cell["path"]).read_bytes(), name)

    def __iter__(self) -> Iterator[Encoded]:
        """Yield all images' files."""
        return (self[index] for index in range(len(self)))

    def select(self, indices: Int64[np.ndarray, " chosen"]) -> Table:
        """Return the rows at ``indices``."""
        return replace(self, places=self.places[indices])


def library() -> Any:
    """Import ``datasets``, or say how to install it."""
    try:
        import datasets
    except ImportError:
        raise TaskvecError(
            "data sets of the Hugging Face Hub, and parquet files, are read by the library 'datasets'",
            "install it: pip install 'taskvec[hf]'",
        ) from None
    return datasets


def folder_of(name: str) -> Path | None:
    """Return the local folder that a name means, or None where it is one of the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith(("/", ".", "~")):
        near = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise TaskvecError(f"no data set folder at '{path}'", did_you_mean(path.name, near))
    return None


def table_files(folder: Path) -> list[Path]:
    """Return the files of tables in a folder, in the order of their paths."""
    return sorted(p for p in folder.rglob("*") if p.suffix in ENDINGS and p.is_file())


def open_dataset(address: str, info_only: bool = False) -> Any:
    """Open a data set's splits, or the builder that knows about it; ``address`` is ``NAME`` or ``NAME@CONFIG``."""
    datasets = library()
    name, _, config = address.partition("@")
    local = folder_of(name)
    act = datasets.load_dataset_builder if info_only else datasets.load_dataset
    try:
        if local and (local / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(local))
        with reachable_or_offline(local is not None):
            return act(str(local or name), config or None)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        first = " ".join(str(error).split())[:300]
        if local:
            held = ", ".join(sorted(p.name for p in local.iterdir())[:8]) or "nothing"
            fix = "expected parquet files such as train-00000-of-00001.parquet and test-00000-of-00001.parquet"
            raise TaskvecError(f"'{local}' cannot be read as a data set: {first} (it holds {held})", fix) from None
        fix = f"download it elsewhere and pass the folder of its parquet files: hf:/path/to/{name.split('/')[-1]}"
        what = f"data set '{name}'" + (f" (config {config})" if config else "")
        raise TaskvecError(f"{what} cannot be had from {endpoint()}: {first}", fix) from None


@contextlib.contextmanager
def reachable_or_offline(local: bool) -> Iterator[None]:
    """Let the libraries read their caches only, where nothing is asked of the Hub or it does not answer."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    with asked_once(local) as offline:
        try:
            config.HF_HUB_OFFLINE = offline
            yield
        finally:
            config.HF_HUB_OFFLINE = before


def list_hub(address: str) -> Listing:
    """List a data set: its training, test and perhaps validation split; one split alone is divided by a seed.

    Without a test split the validation split is tested on. Classes are in the order of their labels.
    """
    listing = read_splits(address)
    if set(listing.labels) == {"train"}:
        listing = split_classes(listing)
    elif "test" not in listing.labels:
        parts = {"train": "train", "test": "validation"}
        items = {split: listing.items[source] for split, source in parts.items()}
        labels = {split: listing.labels[source] for split, source in parts.items()}
        note = f"'{address}' has no test split: its validation split is tested on"
        listing = Listing(listing.classes, items, labels, root=listing.root, files=listing.files, notes=(note,))
    check_trained(listing, f"hf:{address}")
    return listing


def read_splits(address: str) -> Listing:
    """List a data set's splits as they are."""
    local = folder_of(address.partition("@")[0])
    files = tuple(table_files(local)) if local else ()
    if local and not files:
        raise TaskvecError(
            f"'{local}' cannot be read as a data set: it holds no {' or '.join(ENDINGS)} files",
            f"images in folders are read as folder:{local}",
        )
    found = open_dataset(address)
    splits = {split: found[name] for split, names in NAMES.items() for name in names if name in found}
    if "train" not in splits:
        raise TaskvecError(
            f"data set '{address}' has no train split; it has {', '.join(map(str, found))}",
            "expected train, test and perhaps validation",
        )
    image, label = columns(splits["train"].features, address)
    items: dict[str, Items] = {}
    for split, table in splits.items():
        column = table.select_columns([image]).cast_column(image, library().Image(decode=False))[image]
        items[split] = Table(column, f"{address} {split}", np.arange(len(table)), local is not None)
    labels, classes = class_labels({split: table.select_columns([label]) for split, table in splits.items()}, label)
    listing = Listing(classes, items, labels, root=local or Path(), files=files)
    return rename_classes(listing, lambda name: name, lambda names: tuple(n for n in classes if n in names))


def columns(features: Any, address: str) -> tuple[str, str]:
    """Return the names of the image column and of the label column, or raise and say which there are."""
    datasets = library()
    shown = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if len(images) != 1:
        raise TaskvecError(f"data set '{address}' has {len(images)} columns of images: {shown}", "it needs one")
    classed = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    named = [name for name in LABELS if name in (classed or features)]
    if named or len(classed) == 1:
        return images[0], (named or classed)[0]
    raise TaskvecError(
        f"data set '{address}' has no one column of labels: {shown}", f"name it {LABELS[0]}, a class label"
    )


def class_labels(tables: dict[str, Any], column: str) -> tuple[dict[str, Labels], tuple[str, ...]]:
    """Return the labels of each split and the class names; a plain column has the classes of its values, in order."""
    values = {split: list(table[column]) for split, table in tables.items()}
    kind = tables["train"].features[column]
    for split, found in values.items():
        check_labels(found, column, split)
    names: Sequence[Any]
    if isinstance(kind, library().ClassLabel):
        names = list(kind.names)
        return {split: np.array(found, np.int64) for split, found in values.items()}, tuple(names)
    names = sorted({value for found in values.values() for value in found})
    places = {value: place for place, value in enumerate(names)}
    labels: dict[str, Labels] = {
        split: np.array([places[value] for value in found], np.int64) for split, found in values.items()
    }
    return labels, tuple(map(str, names))


def check_labels(labels: Sequence[Any], column: str, split: str) -> None:
    """Raise unless every row has one label: a text or a number."""
    for row, label in enumerate(labels):
        if not isinstance(label, str | int | float):
            what = "no label" if label is None else f"a {type(label).__name__} for a label"
            raise TaskvecError(
                f"row {row} of the {split} split has {what} in column '{column}'",
                "give every row one text or number, or leave it out",
            )


def describe_hub(address: str) -> dict[str, Any]:
    """Return what identifies a data set of the Hub, without its images: name, revision, and how many images it says."""
    builder = open_dataset(address, info_only=True)
    splits = builder.info.splits or {}
    return {"hf": address, "revision": str(builder.hash), "images": sum(s.num_examples for s in splits.values()) or 1}
