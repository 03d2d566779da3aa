"""The layouts of the paper's eight tasks on disk and on the Hub (protocol, Data).

``paper:NAME@FOLDER`` looks for every known layout in a folder; ``@hf`` asks the Hub. Classes have their canonical names
and order, whatever the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from taskvec.core.errors import TaskvecError, did_you_mean
from taskvec.data.folders import class_files, contents, is_flat, list_splits, notes_on_files
from taskvec.data.hf_datasets import read_splits
from taskvec.data.hf_tables import table_files
from taskvec.data.index import Items, Labels, Listing, check_files, check_trained, rename_classes
from taskvec.data.splits import split_classes, split_validation
from taskvec.data.torchvision_sets import gtsrb_files, list_torchvision
from taskvec.paper import tasks as papertasks
from taskvec.paper.tasks import PaperTask, canonical, find_task, in_order

FIXTURE = 0.02
"""Share of the published number of images below which a data set is taken for a fixture: its sizes are not checked."""
EUROSAT_HELD_OUT = 270
"""Images of a class in the validation and in the test split, where EuroSAT has no splits (protocol, Data)."""


@dataclass(frozen=True)
class Layout:
    """A way in which a data set lies on disk: ``marker`` exists below the folder that ``read`` gets.

    Where it is ``flat``, the marker is a folder of class folders.
    """

    marker: str
    read: Callable[[Path], Listing]
    flat: bool = False

    def is_in(self, base: Path) -> bool:
        """Return whether a folder holds a data set of this layout."""
        place = base / self.marker
        return place.is_dir() and is_flat(place) if self.flat else place.exists()


def list_paper(rest: str) -> Listing:
    """Return a task of the paper: ``NAME@FOLDER``, ``NAME@hf`` or ``NAME@hf:DATASET``; ``NAME`` alone is ``@hf``."""
    name, _, where = rest.partition("@")
    task = find_task(name)
    listing = read_paper(name, task, where)
    check_files(listing)
    listing = rename_classes(listing, partial(canonical, name), partial(in_order, name))
    check_classes(name, task, listing)
    check_trained(listing, f"paper:{rest}")
    if "validation" not in listing.labels:
        listing = split_validation(listing, f"paper:{rest}")
    return replace(listing, notes=listing.notes + check_sizes(name, task, listing))


def read_paper(name: str, task: PaperTask, where: str) -> Listing:
    """Return a task of the paper from the Hub, or in the first layout that a folder has."""
    if where in ("", "hf") or where.startswith("hf:"):
        return from_hub(task, where.removeprefix("hf").removeprefix(":") or task.hub[0], name)
    folder = Path(where).expanduser().resolve()
    if not folder.is_dir():
        raise TaskvecError(f"paper:{name}: no folder at '{where}'", "give the folder that holds the data sets")
    for layout, base in bases(folder, LAYOUTS[name]):
        if layout.is_in(base):
            return read_layout(layout, base, task)
    for place, address in table_folders(folder, name, task):
        if place.is_dir() and table_files(place):
            return from_hub(task, address, name)
    wanted = "; ".join((*task.layouts, "parquet files of " + " or ".join(task.hub)))
    raise TaskvecError(
        f"paper:{name} is not in '{folder}', which holds {contents(folder)}",
        f"expected {wanted}. paper:{name}@hf downloads it, paper:{name}@FOLDER looks elsewhere",
    )


def read_layout(layout: Layout, base: Path, task: PaperTask) -> Listing:
    """Return the task that a layout holds; an error says which layouts are expected."""
    try:
        return layout.read(base)
    except TaskvecError as error:
        raise TaskvecError(error.problem, f"expected {'; '.join(task.layouts)}. {error.fix}") from None


def table_folders(folder: Path, name: str, task: PaperTask) -> Iterator[tuple[Path, str]]:
    """Yield the folders that may hold a copy of a data set of the Hub, with their addresses."""
    yield from ((place, str(place)) for place in (folder, folder / name))
    for dataset in task.hub:
        path, _, config = dataset.partition("@")
        for place in (folder / path, folder / path.split("/")[-1]):
            yield place, f"{place}@{config}" if (place / config).is_dir() and config else str(place)


def bases(folder: Path, layouts: tuple[Layout, ...]) -> Iterator[tuple[Layout, Path]]:
    """Yield each layout with its possible base folders: the given one, and those above it that lead back into it."""
    for layout in layouts:
        for base in (folder, folder.parent, folder.parent.parent):
            if (base / layout.marker).is_relative_to(folder):
                yield layout, base


def from_hub(task: PaperTask, address: str, name: str) -> Listing:
    """Return a task from a data set of the Hub or from parquet files, with the protocol's splits."""
    listing = read_splits(address)
    sizes = listing.sizes()
    if name == "eurosat" and ("test" not in sizes or sizes["test"] > sizes["train"] / 5):
        return split_classes(joined(listing, tuple(sizes)), EUROSAT_HELD_OUT)
    if "test" not in sizes:
        raise TaskvecError(f"data set '{address}' has no test split", f"paper:{name} is tested on its own test split")
    return with_protocol_splits(listing, task)


def with_protocol_splits(listing: Listing, task: PaperTask) -> Listing:
    """Return a listing whose validation split is kept, joined to training or left out, as the protocol says."""
    if task.validation == "own" or "validation" not in listing.labels:
        return listing
    if task.validation == "join":
        return joined(listing, ("train", "validation"))
    return listing.with_splits(train="train", test="test")


def joined(listing: Listing, splits: tuple[str, ...]) -> Listing:
    """Return a listing whose training split is several of its splits, one after another."""
    others = listing.with_splits(**{split: split for split in listing.items if split not in splits})
    items = Joined.of([listing.items[split] for split in splits])
    labels: Labels = np.concatenate([listing.labels[split] for split in splits])
    return replace(others, items=others.items | {"train": items}, labels=others.labels | {"train": labels})


@dataclass(frozen=True)
class Joined:
    """The items of several splits, one after another; ``places`` are the part and the index in it of each."""

    parts: tuple[Any, ...]
    places: np.ndarray

    @staticmethod
    def of(parts: list[Items]) -> Items:
        """Return items joined; lists of files stay lists of files."""
        lists = [part for part in parts if isinstance(part, list)]
        if len(lists) == len(parts):
            return [path for part in lists for path in part]
        pairs = [(i, j) for i, part in enumerate(parts) for j in range(len(part))]
        return Joined(tuple(parts), np.array(pairs))

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        """Return an item."""
        part, place = self.places[index].tolist()
        return self.parts[part][place]

    def __iter__(self) -> Iterator[Any]:
        """Yield all items."""
        return (self[index] for index in range(len(self)))

    def select(self, indices: np.ndarray) -> Joined:
        """Return the items at ``indices``."""
        return Joined(self.parts, self.places[indices])


def check_classes(name: str, task: PaperTask, listing: Listing) -> None:
    """Raise for a class that the task does not have, where all its classes are known by name."""
    listed = [names[0] for names in task.names]
    strange = [name for name in listing.classes if name not in listed] if len(listed) == task.classes else []
    if strange:
        raise TaskvecError(
            f"paper:{name} has no class '{strange[0]}'",
            f"{did_you_mean(strange[0], listed)}; a data set of your own is read as folder:PATH or hf:PATH",
        )


def check_sizes(name: str, task: PaperTask, listing: Listing) -> tuple[str, ...]:
    """Raise unless a real data set has exactly the protocol's sizes; one far smaller is noted as a fixture."""
    sizes = listing.sizes()
    counts = (sizes["train"], sizes["validation"], sizes["test"])
    shown = "{} to train, {} to validate, {} to test, {} classes"
    have = shown.format(*counts, len(listing.classes))
    want = shown.format(*task.sizes, task.classes)
    if sum(counts) < FIXTURE * sum(task.sizes):
        return (f"paper:{name} has {have}: taken for a fixture; the paper has {want}",)
    if counts not in (task.sizes, *task.other_sizes) or len(listing.classes) != task.classes:
        raise TaskvecError(
            f"paper:{name} has {have}; the paper has {want}",
            f"complete the download (a fixture has less than {FIXTURE:.0%} of the images); "
            "a data set of your own is read as folder:PATH or hf:PATH",
        )
    return () if counts == task.sizes else (f"paper:{name} lacks images: {have}; the paper has {want}",)


def folder_layout(base: Path, name: str, splits: dict[str, str]) -> Listing:
    """Return the images of class folders, whose splits have the given folders; missing splits are left out."""
    root = base / name
    return list_splits(root, {split: place for split, place in splits.items() if (root / place).is_dir()})


def dtd_folders(base: Path, name: str = ".") -> Listing:
    """Return DTD's class folders; val is the test split, unless there is a test folder too."""
    if (base / name / "test").is_dir():
        listing = folder_layout(base, name, {"train": "train", "validation": "val", "test": "test"})
        return with_protocol_splits(listing, papertasks.TASKS["dtd"])
    return folder_layout(base, name, {"train": "train", "test": "val"})


def eurosat_tree(base: Path, name: str) -> Listing:
    """Return EuroSAT's flat tree of class folders, divided class by class."""
    return split_classes(list_splits(base / name, {"train": "."}), EUROSAT_HELD_OUT)


def resisc45_lists(base: Path, name: str) -> Listing:
    """Return RESISC45: one tree of class folders, and a list of file names for each split in the folder above."""
    root = base / name
    files = class_files(root)
    classes = tuple(sorted(files))
    by_name = {path.name: (path, index) for index, c in enumerate(classes) for path in files[c].images}
    items: dict[str, Items] = {}
    labels: dict[str, Labels] = {}
    for split in ("train", "test"):
        path = root.parent / f"resisc45-{split}.txt"
        wanted = set(listed(path))
        missing = sorted(wanted - set(by_name))
        if missing:
            raise TaskvecError(
                f"'{missing[0]}' in '{path}' is not in '{root}' ({len(missing)} such)", "is the download whole?"
            )
        chosen = [pair for name, pair in by_name.items() if name in wanted]
        items[split], labels[split] = [p for p, _ in chosen], np.array([i for _, i in chosen], np.int64)
    return Listing(classes, items, labels, root=root.parent, notes=tuple(notes_on_files(root, list(files.values()))))


def listed(path: Path) -> list[str]:
    """Return the lines of a list file that are not empty."""
    if not path.is_file():
        raise TaskvecError(f"no list at '{path}'", "it says which images are in the split, one a line")
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise TaskvecError(f"the list '{path}' is no text in UTF-8: {error}", "is the download whole?") from None


def sun397_lists(base: Path, name: str) -> Listing:
    """Return the original tree of SUN397, ``a/abbey/sun_x.jpg``, with the lists of partition 1."""
    root = base / name
    near = (root, root / "Partitions", root.parent, root.parent / "Partitions")
    lists = {"train": "Training_01.txt", "test": "Testing_01.txt"}
    paths = {
        split: next((p / name for p in near if (p / name).is_file()), root / name) for split, name in lists.items()
    }
    lines = {split: [line.strip("/") for line in listed(path)] for split, path in paths.items()}
    classes = tuple(sorted({line.rpartition("/")[0] for rows in lines.values() for line in rows}))
    numbers = {name: number for number, name in enumerate(classes)}
    items: dict[str, Items] = {split: [root / line for line in rows] for split, rows in lines.items()}
    labels: dict[str, Labels] = {
        split: np.array([numbers[line.rpartition("/")[0]] for line in rows], np.int64) for split, rows in lines.items()
    }
    return Listing(classes, items, labels, root=root)


def torch_layout(base: Path, name: str, joined_splits: bool = False) -> Listing:
    """Return a data set read by torchvision; ``joined_splits`` adds the validation split to training, as for DTD."""
    listing = list_torchvision(f"{name}@{base}")
    return joined(listing, ("train", "validation")) if joined_splits else listing


def svhn_files(base: Path, name: str) -> Listing:
    """Return SVHN, whose two .mat files torchvision reads."""
    return list_torchvision(f"SVHN@{base / name}")


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "cars": (
        Layout("stanford_cars/devkit", partial(torch_layout, name="StanfordCars")),
        Layout(
            "stanford_cars_folder_based/train",
            partial(folder_layout, name="stanford_cars_folder_based", splits={"train": "train", "test": "test"}),
        ),
    ),
    "dtd": (
        Layout("dtd/dtd/labels", partial(torch_layout, name="DTD", joined_splits=True)),
        Layout("dtd/train", partial(dtd_folders, name="dtd")),
        Layout("train", dtd_folders),
    ),
    "eurosat": (
        *(
            Layout(
                f"{place}/train",
                partial(folder_layout, name=place, splits={"train": "train", "validation": "val", "test": "test"}),
            )
            for place in ("EuroSAT_splits", ".")
        ),
        *(
            Layout(place, partial(eurosat_tree, name=place), flat=True)
            for place in ("EuroSAT/2750", "eurosat/2750", "EuroSAT", "eurosat", "EuroSAT_RGB", "2750")
        ),
        Layout("./AnnualCrop", partial(eurosat_tree, name=".")),
    ),
    "gtsrb": (Layout("gtsrb/GTSRB", gtsrb_files),),
    "mnist": (Layout("MNIST/raw", partial(torch_layout, name="MNIST")),),
    "resisc45": tuple(
        Layout(place, partial(resisc45_lists, name=place)) for place in ("resisc45/NWPU-RESISC45", "NWPU-RESISC45")
    ),
    "sun397": (
        Layout("sun397/train", partial(folder_layout, name="sun397", splits={"train": "train", "test": "val"})),
        Layout("SUN397/a", partial(sun397_lists, name="SUN397")),
        Layout("train", partial(folder_layout, name=".", splits={"train": "train", "test": "val"})),
    ),
    "svhn": tuple(
        Layout(f"{place}/train_32x32.mat", partial(svhn_files, name=place)) for place in ("svhn", "SVHN", ".")
    ),
}
"""The layouts of each task, in the order in which they are looked for."""
