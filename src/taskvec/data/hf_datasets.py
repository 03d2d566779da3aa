"""Image data sets of the Hugging Face Hub, or local folders of parquet, read by ``datasets``; never remote code."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from taskvec.core.errors import TaskvecError, did_you_mean
from taskvec.core.files import fingerprint
from taskvec.data.folders import visible
from taskvec.data.images import CorruptImage, Encoded, corrupt
from taskvec.data.index import Items, Labels, Listing, check_trained, rename_classes, split_classes, validation_as_test
from taskvec.weights.hub import asked_once, endpoint

NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev"),
}
"""What splits are called."""
LABELS = ("label", "labels", "fine_label")
"""The columns of class labels that are taken where there are several."""
ENDINGS = (".parquet", ".arrow")
FOOTER = 2**16
"""Bytes that are read at once of a file of the Hub, of which only its schema is wanted."""


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
    files = [Path(top) / name for top, _, names in visible(folder) for name in names if not name.startswith(".")]
    return sorted(path for path in files if path.suffix in ENDINGS and path.is_file())


def address_parts(address: str) -> tuple[str, str]:
    """Return the name and the configuration of ``NAME`` or ``NAME@CONFIG``; a folder's name may have an @ itself."""
    name, at, config = address.rpartition("@")
    return (address, "") if not at or os.path.isdir(Path(address).expanduser()) else (name, config)  # noqa: PTH112


def open_dataset(address: str, info_only: bool = False) -> Any:
    """Open the splits of a data set of the Hub, or the builder that knows about it."""
    datasets = library()
    name, config = address_parts(address)
    try:
        with reachable_or_offline(False):
            builder = datasets.load_dataset_builder(name, config or None)
            return builder if info_only else checked(builder, datasets.load_dataset(name, config or None))
    except problems() as error:
        fix = f"download it elsewhere and pass the folder of its parquet files: hf:/path/to/{name.split('/')[-1]}"
        what = f"data set '{name}'" + (f" (config {config})" if config else "")
        raise TaskvecError(f"{what} cannot be had from {endpoint()}: {first_line(error)}", fix) from None


def problems() -> tuple[type[Exception], ...]:
    """Return what ``datasets`` raises for what it cannot read."""
    return (OSError, ValueError, RuntimeError, LookupError, TypeError, library().exceptions.DatasetsError)


def first_line(error: Exception) -> str:
    """Return the beginning of an error's message, in one line."""
    return " ".join(str(error).split())[:300]


def checked(builder: Any, found: Any) -> Any:
    """Return the splits of a data set of the Hub whose files all name the classes as it does: rows do not tell files.

    ``datasets`` reads the numbers of all files by the names of its card, or of its first file.
    """
    for split, files in (builder.config.data_files or {}).items():
        for file in (file for file in files if split in found and file.endswith(".parquet")):
            own = classes_in(file)
            names = named_classes(found[split].features)
            other = [column for column in names if own.get(column, names[column]) != names[column]]
            if other:
                raise TaskvecError(
                    f"'{file}' names the classes of column '{other[0]}' otherwise than the data set does",
                    "download its parquet files and pass their folder, hf:/path/to/it: each is read by its own names",
                )
    return found


@functools.cache
def classes_in(file: str) -> dict[str, list[str]]:
    """Return the class names in the schema of a parquet file of the Hub; its address holds its revision."""
    import fsspec
    from pyarrow.parquet import read_schema

    with fsspec.open(file, block_size=FOOTER) as opened:
        return named_classes(library().Features.from_arrow_schema(read_schema(opened)))


def named_classes(features: Any) -> dict[str, list[str]]:
    """Return the class names of every column that has some."""
    return {name: kind.names for name, kind in features.items() if isinstance(kind, library().ClassLabel)}


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
        listing = validation_as_test(listing, f"'{address}'")
    check_trained(listing, f"hf:{address}")
    return listing


def read_splits(address: str) -> Listing:
    """List a data set's splits as they are, every file of a split by its own class names."""
    local = folder_of(address_parts(address)[0])
    files = tuple(table_files(local)) if local else ()
    if local and not files:
        raise TaskvecError(
            f"'{local}' cannot be read as a data set: it holds no {' or '.join(ENDINGS)} files",
            f"images in folders are read as folder:{local}",
        )
    found = local_parts(local, address_parts(address)[1]) if local else hub_parts(address)
    splits = {split: found[name] for split, names in NAMES.items() for name in names if name in found}
    if "train" not in splits:
        raise TaskvecError(
            f"data set '{address}' has no train split; it has {', '.join(map(str, found))}",
            "expected train, test and perhaps validation",
        )
    image, label = columns(splits["train"][0].features, address)
    splits, notes = labelled(splits, label, address)
    items: dict[str, Items] = {
        split: Table(image_column(parts, image), f"{address} {split}", np.arange(rows(parts)), local is not None)
        for split, parts in splits.items()
    }
    labels, classes, more = class_labels(splits, label)
    listing = Listing(classes, items, labels, root=local or Path(), files=files, notes=notes + more)
    return rename_classes(listing, lambda name: name, lambda names: tuple(n for n in classes if n in names))


@dataclass(frozen=True)
class Part:
    """The rows of one file of a split, or of a whole split, and what its columns are.

    ``declared`` is what stands beside the file, in a card; what the file itself says goes before it.
    """

    table: Any
    name: str
    features: dict[str, Any]
    declared: dict[str, Any]

    @staticmethod
    def of(table: Any, name: str, declared: Any = None) -> Part:
        """Return a part; what its file does not say about a column is what is declared beside it."""
        telling = (library().Image, library().ClassLabel)
        known = {c: kind for c, kind in table.features.items() if isinstance(kind, telling)}
        return Part(table, name, dict(table.features) | dict(declared or {}) | known, dict(declared or {}))

    def values(self, column: str) -> list[Any]:
        """Return the labels as they are in the table; none where it has no such column."""
        return list(self.table[column][:]) if column in self.table.column_names else [None] * len(self.table)

    def names(self, column: str) -> tuple[str, ...] | None:
        """Return the class names of a column, None where it has none; two names that are one raise."""
        kind = self.features.get(column)
        if not isinstance(kind, library().ClassLabel):
            return None
        names = tuple(map(text, kind.names))
        twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
        if twice is not None:
            raise TaskvecError(f"{self.name} names the class '{twice}' twice in column '{column}'", "name it once")
        return names


def rows(parts: list[Part]) -> int:
    """Return the number of rows of a split."""
    return sum(len(part.table) for part in parts)


def hub_parts(address: str) -> dict[str, list[Part]]:
    """Return the splits of a data set of the Hub, each in one part."""
    return {split: [Part.of(table, f"the {split} split")] for split, table in open_dataset(address).items()}


def local_parts(folder: Path, config: str) -> dict[str, list[Part]]:
    """Return the files of the splits in a folder that ``datasets`` has saved, or that holds tables."""
    try:
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return saved_parts(folder)
        declared, splits = split_files(folder, config)
        with without_bars():
            return {
                split: [Part.of(opened(path), f"'{path.relative_to(folder)}'", declared) for path in paths]
                for split, paths in splits.items()
            }
    except problems() as error:
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        fix = "expected parquet files such as train-00000-of-00001.parquet and test-00000-of-00001.parquet"
        message = f"'{folder}' cannot be read as a data set: {first_line(error)} (it holds {held})"
        raise TaskvecError(message, fix) from None


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Let ``datasets`` draw no progress bar, of which each file would have one."""
    datasets = library()
    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()


CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json", "dataset_info.json")
"""Files that say what a folder's tables hold, and which are of which split."""


def split_files(folder: Path, config: str) -> tuple[Any, dict[str, list[Path]]]:
    """Return the features that a folder's card declares, and the tables of every split, as ``datasets`` finds them.

    It takes a path for a pattern, so it gets the names only, in a folder of its own.
    """
    with tempfile.TemporaryDirectory() as temporary, reachable_or_offline(True):
        names = Path(temporary).resolve()
        for path in table_files(folder):
            place = names / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        for card in (folder / name for name in CARDS if (folder / name).is_file()):
            shutil.copy(card, names)
        builder = library().load_dataset_builder(str(names), config or None)
        found = {str(s): [Path(p).relative_to(names) for p in of] for s, of in builder.config.data_files.items()}
        check_spelling(found, folder)
        return builder.info.features, {split: [folder / path for path in paths] for split, paths in found.items()}


def check_spelling(files: dict[str, list[Path]], folder: Path) -> None:
    """Raise for a file that is called as one of another split in capitals, which ``datasets`` takes for training."""
    for path in files["train"] if set(files) == {"train"} else []:
        words = set(re.split(r"[^A-Za-z]+", str(path)))
        other = [word for word in sorted(words) if word.lower() in NAMES["test"] + NAMES["validation"]]
        if other and not any(word.islower() for word in other):
            raise TaskvecError(
                f"'{folder / path}' would be read as training images: '{other[0]}' means no split in capitals",
                f"rename it with '{other[0].lower()}', and those of other splits too",
            )


def saved_parts(folder: Path) -> dict[str, list[Part]]:
    """Return the files of the splits that ``save_to_disk`` has written; one data set alone is the training split."""
    datasets, place = library(), linked(folder)
    found = datasets.load_from_disk(str(place))
    splits = found if isinstance(found, dict) else {"train": found}
    return {
        split: [
            Part.of(datasets.Dataset.from_file(path), f"'{Path(path).relative_to(place)}'", table.features)
            for path in (file["filename"] for file in table.cache_files)
        ]
        or [Part.of(table, f"the {split} split")]
        for split, table in splits.items()
    }


def linked(path: Path) -> Path:
    """Return a path that ``datasets`` takes for no pattern or address: a file's or folder's own, or a link's."""
    name = str(path.absolute())
    if not (set(name) & set("*?[]\n") or "::" in name or name != name.encode("utf-8", "replace").decode()):
        return path
    link = Path(library().config.HF_DATASETS_CACHE) / "links" / f"{fingerprint(name)}{path.suffix}"
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(path.absolute())
    return link


def opened(path: Path) -> Any:
    """Open one file of a table. ``datasets`` keeps it by path and time; by the inode's time another is another."""
    found = path.stat()
    version = f"{found.st_ino}-{found.st_ctime_ns}"
    files = {"train": str(linked(path))}
    try:
        if path.suffix == ".parquet" and (empty := without_rows(path)) is not None:
            return empty
        return library().load_dataset(path.suffix.removeprefix("."), version, data_files=files)["train"]
    except problems() as error:
        raise TaskvecError(
            f"'{path}' cannot be read as a data set: {first_line(error)}", "is it whole? write it again, or remove it"
        ) from None


def without_rows(path: Path) -> Any:
    """Return a parquet file that has no rows, which ``datasets`` takes for no data at all; None where it has some."""
    from pyarrow.parquet import read_metadata, read_table

    with path.open("rb") as file:
        return None if read_metadata(file).num_rows else library().Dataset(read_table(file))


def image_column(parts: list[Part], column: str) -> Any:
    """Return the images of a split's files, one after another, as they are encoded."""
    datasets = library()
    for part in parts:
        if column not in part.table.column_names:
            raise TaskvecError(
                f"{part.name} has no column '{column}', where the training split has its images", "add it"
            )
    tables = [part.table.select_columns([column]).cast_column(column, datasets.Image(decode=False)) for part in parts]
    return datasets.concatenate_datasets(tables)[column]


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


def labelled(splits: dict[str, list[Part]], column: str, address: str) -> tuple[dict[str, list[Part]], tuple[str, ...]]:
    """Return the splits that have labels, and notes about those left out, as published test splits are."""
    without = [
        split
        for split, parts in splits.items()
        if split != "train" and rows(parts) and all(is_empty(value) for part in parts for value in part.values(column))
    ]
    notes = tuple(f"'{address}': the {split} split has no labels and is left out" for split in without)
    return {split: parts for split, parts in splits.items() if split not in without}, notes


def is_empty(label: Any) -> bool:
    """Say whether a label says that there is none: nothing, no number, an empty text, or -1."""
    return label is None or label in ("", -1) or label != label


def class_labels(
    splits: dict[str, list[Part]], column: str
) -> tuple[dict[str, Labels], tuple[str, ...], tuple[str, ...]]:
    """Return the labels of each split, the class names, and notes.

    A number means what its own file names by it, a text means itself. Classes are in the order in which the training
    split names them, others in the order of their values.
    """
    every = [part for parts in splits.values() for part in parts]
    for split, parts in splits.items():
        check_labels([value for part in parts for value in part.values(column)], column, split)
    names, notes = meanings(every, column)
    notes += contradictions(every, column)
    found = {
        split: [name for part in parts for name in class_names(part, names[part.name], column)]
        for split, parts in splits.items()
    }
    listed = dict.fromkeys(name for part in splits["train"] for name in names[part.name] or ())
    rest = {name for each in found.values() for name in each}.difference(listed)
    classes = (*listed, *sorted(rest, key=in_order))
    places = {name: place for place, name in enumerate(classes)}
    labels: dict[str, Labels] = {
        split: np.array([places[name] for name in each], np.int64) for split, each in found.items()
    }
    if "-1" in classes:
        notes += ("the label -1 is taken for a class: where it means that an image has no label, leave its row out",)
    return labels, classes, notes


def in_order(name: str) -> tuple[bool, int, str]:
    """Sort numbers by their value, before texts."""
    number = is_number(name)
    return not number, int(name) if number else 0, name


def is_number(name: str) -> bool:
    """Say whether a class name is a whole number."""
    return bool(re.fullmatch(r"-?\d{1,18}", name))


def meanings(parts: list[Part], column: str) -> tuple[dict[str, tuple[str, ...] | None], tuple[str, ...]]:
    """Return the class names that the numbers of each part are read by, and notes.

    Numbers without names are classes of their own, unless others have names: all of one list are theirs too, with
    a note; names of several lists, or texts, leave unknown what the numbers mean.
    """
    names = {part.name: part.names(column) for part in parts}
    bare = [part for part in parts if names[part.name] is None and are_numbers(part.values(column))]
    others = [part for part in parts if part.name not in {one.name for one in bare}]
    if not bare or not others:
        return names, ()
    lists = {names[part.name] for part in others}
    only = next(iter(lists))
    if len(lists) == 1 and only is not None:
        note = f"{bare[0].name} has numbers for labels and no class names: they are read by those of {others[0].name}"
        return names | {part.name: only for part in bare}, (note,)
    if all(is_number(text(value)) for part in others for value in names[part.name] or part.values(column)):
        return names, ()
    raise TaskvecError(
        f"{bare[0].name} has numbers for labels and no class names, and {others[0].name} has others",
        "which number means which class cannot be known: write the names, or the texts, into every file",
    )


def contradictions(parts: list[Part], column: str) -> tuple[str, ...]:
    """Say which files name their classes otherwise than the card beside them."""
    names = [(part.name, named_classes(part.features).get(column), part.declared) for part in parts]
    other = [name for name, own, card in names if own != named_classes(card).get(column, own)]
    if not other:
        return ()
    what = "names its classes otherwise than is declared beside it, and is read by its own names"
    return (f"{other[0]} {what}" + (f" (and {len(other) - 1} more)" if other[1:] else ""),)


def are_numbers(labels: list[Any]) -> bool:
    """Say whether labels are numbers."""
    return any(isinstance(label, int | float) and not isinstance(label, bool) for label in labels)


def class_names(part: Part, names: tuple[str, ...] | None, column: str) -> list[str]:
    """Return the class name of every row of a part: what a number names, or the value itself."""
    values = part.values(column)
    if names is None or not are_numbers(values):
        return [text(value) for value in values]
    strange = next((value for value in values if not 0 <= value < len(names)), None)
    if strange is not None:
        raise TaskvecError(
            f"{part.name} has the label {strange} in column '{column}', which is none of its {len(names)} classes",
            "every image needs a label: mend it, or leave the row out",
        )
    return [names[int(value)] for value in values]


def text(label: Any) -> str:
    """Return a label as a class name, in Unicode normal form C: 1 and 1.0 are one class."""
    whole = isinstance(label, float) and label.is_integer()
    return unicodedata.normalize("NFC", str(int(label) if whole else label))


def check_labels(labels: Sequence[Any], column: str, split: str) -> None:
    """Raise unless every row has one label: a text or a whole number."""
    for row, label in enumerate(labels):
        whole = isinstance(label, str | int) or (isinstance(label, float) and label.is_integer())
        if not whole or label == "":
            what = "no label" if is_empty(label) else f"a {type(label).__name__} for a label"
            raise TaskvecError(
                f"row {row} of the {split} split has {what} in column '{column}'",
                "give every row one text or whole number, or leave it out",
            )


def describe_hub(address: str) -> dict[str, Any]:
    """Return what identifies a data set of the Hub, without its images: name, revision, and how many images it says."""
    builder = open_dataset(address, info_only=True)
    splits = builder.info.splits or {}
    return {"hf": address, "revision": str(builder.hash), "images": sum(s.num_examples for s in splits.values()) or 1}
