"""Image data sets of the Hugging Face Hub, or local folders of parquet, read by ``datasets``; never remote code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from taskvec.core.errors import TaskvecError
from taskvec.data.hf_labels import class_labels, is_empty
from taskvec.data.hf_tables import (
    ENDINGS,
    Shard,
    address_parts,
    folder_of,
    hub_shards,
    library,
    local_shards,
    open_dataset,
    rows,
    table_files,
)
from taskvec.data.images import CorruptImage, Encoded, corrupt
from taskvec.data.index import (
    SPLIT_NAMES,
    Items,
    Listing,
    check_trained,
    rename_classes,
)
from taskvec.data.splits import split_classes, validation_as_test

LABELS = ("label", "labels", "fine_label")
"""The columns of class labels that are taken where there are several."""


@dataclass(frozen=True)
class ImageColumn:
    """The encoded images of a data set's image column; ``places`` are the rows that are read, in order.

    Images of a ``local`` data set must lie in the table: its digest does not cover files that the table names.
    """

    cells: Any
    name: str
    places: Int64[np.ndarray, " count"]
    local: bool = False

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.places)

    def __getitem__(self, index: int) -> Encoded:
        """Return an image's bytes, as they are in the table or in the file it names."""
        place = int(self.places[index])
        cell, name = self.cells[place], f"{self.name}, row {place}"
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

    def select(self, indices: Int64[np.ndarray, " chosen"]) -> ImageColumn:
        """Return the rows at ``indices``."""
        return replace(self, places=self.places[indices])


def list_hub(address: str) -> Listing:
    """Return the index of a data set by training, test and perhaps validation split; one split alone is divided.

    Without a test split the validation split is tested on. Classes are in the order of their labels.
    """
    listing = read_splits(address)
    if set(listing.labels) == {"train"}:
        listing = split_classes(listing)
    elif "test" not in listing.labels:
        listing = validation_as_test(listing, f"'{address}'")
    check_trained(listing, f"hf:{address}")
    return listing


def read_splits(address: str) -> Listing:
    """List a data set's splits as published; every file of a split is read by its own class names."""
    local = folder_of(address_parts(address)[0])
    files = tuple(table_files(local)) if local else ()
    if local and not files:
        raise TaskvecError(
            f"'{local}' cannot be read as a data set: it holds no {' or '.join(ENDINGS)} files",
            f"images in folders are read as folder:{local}",
        )
    by_name = local_shards(local, address_parts(address)[1]) if local else hub_shards(address)
    splits = {split: by_name[name] for split, names in SPLIT_NAMES.items() for name in names if name in by_name}
    if "train" not in splits:
        raise TaskvecError(
            f"data set '{address}' has no train split; it has {', '.join(map(str, by_name))}",
            "expected train, test and perhaps validation",
        )
    image, label = columns(splits["train"][0].features, address)
    splits, notes = labelled(splits, label, address)
    items: dict[str, Items] = {
        split: ImageColumn(
            encoded_images(shards, image), f"{address} {split}", np.arange(rows(shards)), local is not None
        )
        for split, shards in splits.items()
    }
    labels, classes, label_notes = class_labels(splits, label)
    listing = Listing(classes, items, labels, root=local or Path(), files=files, notes=notes + label_notes)
    return rename_classes(listing, lambda name: name, lambda names: tuple(n for n in classes if n in names))


def encoded_images(shards: list[Shard], column: str) -> Any:
    """Return the encoded images of a split's shards, one after another."""
    datasets = library()
    for shard in shards:
        if column not in shard.table.column_names:
            raise TaskvecError(
                f"{shard.name} has no column '{column}', where the training split has its images", "add it"
            )
    tables = [
        shard.table.select_columns([column]).cast_column(column, datasets.Image(decode=False)) for shard in shards
    ]
    return datasets.concatenate_datasets(tables)[column]


def columns(features: Any, address: str) -> tuple[str, str]:
    """Return the names of the image column and of the label column; an error lists the columns that are there."""
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


def labelled(
    splits: dict[str, list[Shard]], column: str, address: str
) -> tuple[dict[str, list[Shard]], tuple[str, ...]]:
    """Return the splits that have labels, and notes about those left out: some test splits hide their labels."""
    unlabelled = [
        split
        for split, shards in splits.items()
        if split != "train"
        and rows(shards)
        and all(is_empty(value) for shard in shards for value in shard.values(column))
    ]
    notes = tuple(f"'{address}': the {split} split has no labels and is left out" for split in unlabelled)
    return {split: shards for split, shards in splits.items() if split not in unlabelled}, notes


def describe_hub(address: str) -> dict[str, Any]:
    """Return what identifies a data set of the Hub without reading images: name, revision, declared image count."""
    builder = open_dataset(address, info_only=True)
    splits = builder.info.splits or {}
    return {"hf": address, "revision": str(builder.hash), "images": sum(s.num_examples for s in splits.values()) or 1}
