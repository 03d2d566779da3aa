"""Tables of the Hugging Face Hub, or of local parquet and arrow files, opened by ``datasets``; never remote code."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec.core.errors import TaskvecError, did_you_mean
from taskvec.core.files import fingerprint
from taskvec.data.folders import contents, sibling_folders, visible
from taskvec.data.index import SPLIT_NAMES
from taskvec.weights.hub import asked_once, endpoint

ENDINGS = (".parquet", ".arrow")
FOOTER = 2**16
"""Bytes of one read of a file of the Hub, where only the schema in its footer is wanted."""
CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json", "dataset_info.json")
"""Files that declare what a folder's tables hold, and which split each is of."""


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
    """Return the local folder that a name means, or None for a data set of the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith(("/", ".", "~")):
        raise TaskvecError(f"no data set folder at '{path}'", did_you_mean(path.name, sibling_folders(path)))
    return None


def table_files(folder: Path) -> list[Path]:
    """Return the parquet and arrow files below a folder, in the order of their paths."""
    files = [Path(top) / name for top, _, names in visible(folder) for name in names if not name.startswith(".")]
    return sorted(path for path in files if path.suffix in ENDINGS and path.is_file())


def address_parts(address: str) -> tuple[str, str]:
    """Return name and configuration of ``NAME`` or ``NAME@CONFIG``; a folder's own name may hold an @."""
    name, at, config = address.rpartition("@")
    return (address, "") if not at or os.path.isdir(Path(address).expanduser()) else (name, config)  # noqa: PTH112


def open_dataset(address: str, info_only: bool = False) -> Any:
    """Return the splits of a data set of the Hub, or with ``info_only`` the builder that describes it."""
    datasets = library()
    name, config = address_parts(address)
    try:
        with reachable_or_offline(False):
            builder = datasets.load_dataset_builder(name, config or None)
            return builder if info_only else check_class_names(builder, datasets.load_dataset(name, config or None))
    except problems() as error:
        fix = f"download it elsewhere and pass the folder of its parquet files: hf:/path/to/{name.split('/')[-1]}"
        what = f"data set '{name}'" + (f" (config {config})" if config else "")
        raise TaskvecError(f"{what} cannot be had from {endpoint()}: {summary(error)}", fix) from None


def problems() -> tuple[type[Exception], ...]:
    """Return the exceptions of ``datasets`` for what it cannot read."""
    return (OSError, ValueError, RuntimeError, LookupError, TypeError, library().exceptions.DatasetsError)


def summary(error: Exception) -> str:
    """Return the first 300 characters of an error's message, as one line."""
    return " ".join(str(error).split())[:300]


def check_class_names(builder: Any, splits: Any) -> Any:
    """Return the splits of a data set of the Hub, or raise where one of its files names the classes otherwise.

    ``datasets`` reads the labels of all files by the class names of the card or of the first file, and a row does not
    tell which file it came from.
    """
    for split, files in (builder.config.data_files or {}).items():
        for file in (file for file in files if split in splits and file.endswith(".parquet")):
            file_names, split_names = classes_in(file), class_names_of(splits[split].features)
            differing = [c for c, names in split_names.items() if file_names.get(c, names) != names]
            if differing:
                raise TaskvecError(
                    f"'{file}' names the classes of column '{differing[0]}' otherwise than the data set does",
                    "download its parquet files and pass their folder, hf:/path/to/it: each is read by its own names",
                )
    return splits


@functools.cache
def classes_in(file: str) -> dict[str, list[str]]:
    """Return the class names in the schema of a parquet file of the Hub; its URL, the key, holds the revision."""
    import fsspec
    from pyarrow.parquet import read_schema

    with fsspec.open(file, block_size=FOOTER) as opened:
        return class_names_of(library().Features.from_arrow_schema(read_schema(opened)))


def class_names_of(features: Any) -> dict[str, list[str]]:
    """Return the class names of every column of class labels."""
    return {name: kind.names for name, kind in features.items() if isinstance(kind, library().ClassLabel)}


@contextlib.contextmanager
def reachable_or_offline(local: bool) -> Iterator[None]:
    """Keep ``datasets`` to its cache where the data is ``local``, or the Hub does not answer."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    with asked_once(local) as offline:
        try:
            config.HF_HUB_OFFLINE = offline
            yield
        finally:
            config.HF_HUB_OFFLINE = before


@dataclass(frozen=True)
class Shard:
    """The rows of one file of a split, or of a whole split, and the type of every column.

    ``declared`` are the types that a card beside the file gives; the file's own go before them in ``features``.
    """

    table: Any
    name: str
    features: dict[str, Any]
    declared: dict[str, Any]

    @staticmethod
    def of(table: Any, name: str, declared: Any = None) -> Shard:
        """Return a shard; a column that its file knows as neither image nor class label has the declared type."""
        specific = (library().Image, library().ClassLabel)
        known = {column: kind for column, kind in table.features.items() if isinstance(kind, specific)}
        return Shard(table, name, dict(table.features) | dict(declared or {}) | known, dict(declared or {}))

    def values(self, column: str) -> list[Any]:
        """Return the labels of a column as they are stored; every label is None where there is no such column."""
        return list(self.table[column][:]) if column in self.table.column_names else [None] * len(self.table)

    def names(self, column: str) -> tuple[str, ...] | None:
        """Return the class names of a column, or None where it has none; a name that comes twice raises."""
        kind = self.features.get(column)
        if not isinstance(kind, library().ClassLabel):
            return None
        names = tuple(map(label_text, kind.names))
        repeated = next((name for place, name in enumerate(names) if name in names[:place]), None)
        if repeated is not None:
            raise TaskvecError(f"{self.name} names the class '{repeated}' twice in column '{column}'", "name it once")
        return names


def rows(shards: list[Shard]) -> int:
    """Return the number of rows of a split."""
    return sum(len(shard.table) for shard in shards)


def hub_shards(address: str) -> dict[str, list[Shard]]:
    """Return the splits of a data set of the Hub, each as one shard."""
    return {split: [Shard.of(table, f"the {split} split")] for split, table in open_dataset(address).items()}


def local_shards(folder: Path, config: str) -> dict[str, list[Shard]]:
    """Return the shards of every split in a folder that ``datasets`` saved, or that holds tables."""
    try:
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return saved_shards(folder)
        declared, splits = split_files(folder, config)
        with without_bars():
            return {
                split: [Shard.of(open_table(path), f"'{path.relative_to(folder)}'", declared) for path in paths]
                for split, paths in splits.items()
            }
    except problems() as error:
        fix = "expected parquet files such as train-00000-of-00001.parquet and test-00000-of-00001.parquet"
        message = f"'{folder}' cannot be read as a data set: {summary(error)} (it holds {contents(folder)})"
        raise TaskvecError(message, fix) from None


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of ``datasets``, which come once a file."""
    datasets = library()
    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()


def split_files(folder: Path, config: str) -> tuple[Any, dict[str, list[Path]]]:
    """Return the features that a folder's card declares, and the tables of every split by the rules of ``datasets``.

    ``datasets`` takes a path for a pattern, so it gets empty files of the same names in a temporary folder.
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
        splits = {
            str(split): [Path(path).relative_to(names) for path in paths]
            for split, paths in builder.config.data_files.items()
        }
        check_spelling(splits, folder)
        return builder.info.features, {split: [folder / path for path in paths] for split, paths in splits.items()}


def check_spelling(files: dict[str, list[Path]], folder: Path) -> None:
    """Raise for a file named after another split in capitals, which ``datasets`` would take for training data."""
    for path in files["train"] if set(files) == {"train"} else []:
        words = set(re.split(r"[^A-Za-z]+", str(path)))
        meant = [word for word in sorted(words) if word.lower() in SPLIT_NAMES["test"] + SPLIT_NAMES["validation"]]
        if meant and not any(word.islower() for word in meant):
            raise TaskvecError(
                f"'{folder / path}' would be read as training images: '{meant[0]}' means no split in capitals",
                f"rename it with '{meant[0].lower()}', and those of other splits too",
            )


def saved_shards(folder: Path) -> dict[str, list[Shard]]:
    """Return the shards of every split that ``save_to_disk`` wrote; a single data set is the training split."""
    datasets, place = library(), linked(folder)
    saved = datasets.load_from_disk(str(place))
    splits = saved if isinstance(saved, dict) else {"train": saved}
    return {
        split: [
            Shard.of(datasets.Dataset.from_file(path), f"'{Path(path).relative_to(place)}'", table.features)
            for path in (file["filename"] for file in table.cache_files)
        ]
        or [Shard.of(table, f"the {split} split")]
        for split, table in splits.items()
    }


def linked(path: Path) -> Path:
    """Return a path that ``datasets`` takes for no pattern or URL: the given one, or that of a link to it."""
    name = str(path.absolute())
    if not (set(name) & set("*?[]\n") or "::" in name or name != name.encode("utf-8", "replace").decode()):
        return path
    link = Path(library().config.HF_DATASETS_CACHE) / "links" / f"{fingerprint(name)}{path.suffix}"
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(path.absolute())
    return link


def open_table(path: Path) -> Any:
    """Return the rows of one parquet or arrow file.

    ``datasets`` caches a file by its path and a version; the inode's number and time tell a replaced file.
    """
    stat = path.stat()
    version = f"{stat.st_ino}-{stat.st_ctime_ns}"
    files = {"train": str(linked(path))}
    try:
        if path.suffix == ".parquet" and (empty := without_rows(path)) is not None:
            return empty
        return library().load_dataset(path.suffix.removeprefix("."), version, data_files=files)["train"]
    except problems() as error:
        raise TaskvecError(
            f"'{path}' cannot be read as a data set: {summary(error)}", "is it whole? write it again, or remove it"
        ) from None


def without_rows(path: Path) -> Any:
    """Return the table of a parquet file without rows, which ``datasets`` refuses; None where it has rows."""
    from pyarrow.parquet import read_metadata, read_table

    with path.open("rb") as file:
        return None if read_metadata(file).num_rows else library().Dataset(read_table(file))


def label_text(label: Any) -> str:
    """Return a label as a class name in Unicode normal form C; 1 and 1.0 are one class."""
    whole = isinstance(label, float) and label.is_integer()
    return unicodedata.normalize("NFC", str(int(label) if whole else label))
