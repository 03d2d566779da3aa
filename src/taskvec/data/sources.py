"""The kinds of source that tasks are from: a record each, in one registry. What an address means is read here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from taskvec.core.errors import TaskvecError, did_you_mean
from taskvec.data.addresses import Source, TaskAddress
from taskvec.data.folders import list_folder
from taskvec.data.hf_datasets import list_hub
from taskvec.data.hf_tables import address_parts, folder_of
from taskvec.data.index import Listing
from taskvec.data.paper_layouts import list_paper
from taskvec.data.torchvision_sets import list_own
from taskvec.engine.pipeline import versions
from taskvec.paper.tasks import TASKS, PaperTask, find_task

LAB_COUNTS = {"train": 4000, "test": 1000}
"""Images that a lab task draws; the validation split comes out of the training images."""
DATA = "TASKVEC_DATA"
"""The environment variable with the folder of published data sets."""


def parse(address: str | TaskAddress, start: Path | None = None, data: str | None = None) -> TaskAddress:
    """Read ``kind:rest``, or raise and say which kinds there are.

    With a folder to ``start`` from it means the same everywhere: paths are absolute, and published data sets have a
    folder, which is ``data`` or else ``$TASKVEC_DATA``.
    """
    if isinstance(address, TaskAddress):
        return address
    kind, colon, rest = address.partition(":")
    if not colon or not rest:
        raise TaskvecError(
            f"task address '{address}' is not of the form kind:name", "for example folder:PATH or lab:greek"
        )
    if kind not in SOURCES:
        raise TaskvecError(f"unknown kind of task '{kind}' in '{address}'", did_you_mean(kind, SOURCES))
    source = SOURCES[kind]
    return TaskAddress(kind, source.resolve(rest, start, data) if start else rest, source)


def absolute(path: str, start: Path) -> Path:
    """Return a path that begins at a folder."""
    return start / Path(path).expanduser()


def listing() -> dict[str, str]:
    """Return every form of address, and the names of the lab's and the paper's tasks, with one line each."""
    return {form: line for source in SOURCES.values() for form, line in source.forms().items()}


# ---------------------------------------------------------------- the lab


def list_lab(name: str) -> Listing:
    """Draw one of the lab's tasks."""
    from taskvec.lab.drawing import worlds

    drawn = {split: worlds.draw(name, split, count) for split, count in LAB_COUNTS.items()}
    items = {split: images for split, (images, _) in drawn.items()}
    labels = {split: labels for split, (_, labels) in drawn.items()}
    return Listing(tuple(worlds.classes(name)), dict(items), labels, worlds.kind(name))


def identify_lab(name: str) -> dict[str, Any]:
    """Return what identifies a lab task's images; an unknown task raises with the nearest names."""
    from taskvec.lab.drawing import worlds

    worlds.check_task(name)
    about = {"lab": name, "counts": dict(LAB_COUNTS), "images": sum(LAB_COUNTS.values()), "version": worlds.VERSION}
    return about | {"packages": versions(worlds.packages(name))}


def lab_type(name: str) -> str:
    """Return the type of one of the lab's tasks."""
    from taskvec.lab.drawing import worlds

    return worlds.kind(name)


def lab_captions(name: str) -> list[str] | None:
    """Return a caption for each class of one of the lab's tasks; None where it has none."""
    from taskvec.lab.drawing import worlds

    return worlds.captions(name)


def lab_forms() -> dict[str, str]:
    """Return the lab's tasks, with one line each."""
    from taskvec.lab.drawing.worlds import DESCRIPTIONS

    return {f"lab:{name}": line for name, line in DESCRIPTIONS.items()}


# ---------------------------------------------------------------- folders


def folder_name(path: str) -> str:
    """Return the name of a folder; a link keeps its own."""
    return Path(os.path.abspath(Path(path).expanduser())).name  # noqa: PTH100


# ---------------------------------------------------------------- data sets of the Hub, or in parquet


def resolve_hub(rest: str, start: Path, data: str | None) -> str:
    """Return a data set's local folder as an absolute path, and a name of the Hub as it is."""
    whole = absolute(rest, start)
    if os.path.isdir(whole):  # noqa: PTH112, one behind a closed door is none
        return str(whole)
    name, config = address_parts(rest)
    local = absolute(name, start)
    on_disk = os.path.isdir(local) or name.startswith((".", "~"))  # noqa: PTH112
    return f"{local}" + (f"@{config}" if config else "") if on_disk else rest


def dataset_name(rest: str) -> str:
    """Return the last part of a data set's name or folder, without its configuration."""
    return address_parts(rest)[0].rstrip("/").rpartition("/")[2]


def hub_dataset(rest: str) -> str | None:
    """Return a data set of the Hub, None for a folder."""
    return None if folder_of(address_parts(rest)[0]) else rest


# ---------------------------------------------------------------- published data sets


def resolve_published(rest: str, start: Path, data: str | None) -> str:
    """Return ``NAME@FOLDER`` with an absolute folder, the one of published data sets where none is said."""
    name, _, where = rest.partition("@")
    if where == "hf" or where.startswith("hf:"):
        return rest
    if where:
        return f"{name}@{absolute(where, start)}"
    root = absolute(data, start) if data else Path(os.environ[DATA]).expanduser() if os.environ.get(DATA) else None
    return f"{name}@{root.absolute()}" if root else rest


def paper_dataset(rest: str) -> str | None:
    """Return the data set of the Hub that one of the paper's tasks is read from, None for a folder."""
    name, _, where = rest.partition("@")
    task = find_task(name)
    if not (where in ("", "hf") or where.startswith("hf:")):
        return None
    return hub_dataset(where.removeprefix("hf").removeprefix(":") or task.hub[0])


def paper_task(rest: str) -> PaperTask | None:
    """Return one of the paper's tasks."""
    return TASKS.get(rest.partition("@")[0])


PAPER_FORMS = {f"paper:{name}": f"{task.description}, {task.classes} classes" for name, task in TASKS.items()} | {
    "paper:NAME@FOLDER": "the same from a folder of published data (data: FOLDER, $TASKVEC_DATA); @hf: the Hub"
}
SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "lab": Source(
            list_lab,
            lab_forms,
            identify=identify_lab,
            captions=lab_captions,
            task_type=lab_type,
            counts=LAB_COUNTS,
            has_whole=False,  # the evaluation view is the whole image
        ),
        "paper": Source(list_paper, lambda: PAPER_FORMS, resolve_published, dataset=paper_dataset, paper=paper_task),
        "folder": Source(
            list_folder,
            lambda: {"folder:PATH": "class folders in PATH/train, PATH/test and perhaps PATH/val, or in PATH itself"},
            lambda path, start, data: str(absolute(path, start)),
            folder_name,
            folder=Path,
            class_folders=True,
        ),
        "hf": Source(
            list_hub,
            lambda: {
                "hf:DATASET": "a data set of the Hugging Face Hub (DATASET@CONFIG), or a local folder of parquet files"
            },
            resolve_hub,
            dataset_name,
            dataset=hub_dataset,
            folder=lambda rest: Path(address_parts(rest)[0]),
        ),
        "torchvision": Source(
            list_own,
            lambda: {"torchvision:NAME@FOLDER": "a data set of torchvision, which has been downloaded into FOLDER"},
            resolve_published,
        ),
    }
)
"""The kinds of source of tasks by the beginning of their addresses."""
