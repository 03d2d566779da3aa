"""How the encoders of each kind of address are made: architecture, preprocessing and weights.

Each family is a module with the functions of ``Family``; the paper's checkpoints are those of other families, seen as
the paper sees images.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from taskvec.core.compute import seeded
from taskvec.core.errors import TaskvecError
from taskvec.data.images import Preprocessing
from taskvec.encoders.addresses import KINDS, BackboneAddress, parse
from taskvec.encoders.loaders import open_clip
from taskvec.encoders.loaders.hf import saved, transformers
from taskvec.encoders.loaders.requests import LARGEST, Family, Loaded, Request
from taskvec.encoders.loaders.skeletons import skeleton
from taskvec.paper.checkpoints import PAPER, Checkpoint

FAMILIES: dict[str, Family] = {
    name: importlib.import_module(f"taskvec.encoders.loaders.{kind.loader}").FAMILY
    for name, kind in KINDS.items()
    if kind.loader
}
"""The family of each kind of address: ``FAMILY`` of the module that ``KINDS`` names."""


def find(
    address: str | BackboneAddress, size: int | None = None, allow_pickle: bool = False, projection: bool | None = None
) -> tuple[Family, Request]:
    """Return the family that loads an address, and what is asked of it; a checkpoint of the paper is one of theirs."""
    given = meant = parse(address)
    if size is not None and (not isinstance(size, int) or not 0 < size <= LARGEST):
        raise TaskvecError(f"'{given}': size is '{size}'", f"give a number of pixels, at most {LARGEST}")
    row = PAPER[given.name] if given.kind == "paper" else None
    if row is not None:
        meant = resolve(row, given)
    hub = (row.repo, row.file) if row is not None and row.file and not given.file else None
    kind, name, file, key = meant.kind, meant.name, meant.file, meant.key
    return FAMILIES[kind], Request(given.text, kind, name, file, size, projection, allow_pickle, hub, key, row)


def resolve(row: Checkpoint, given: BackboneAddress) -> BackboneAddress:
    """Return what an address of a checkpoint of the paper means: the hub's weights, or the file or folder it gives.

    A folder that transformers wrote is loaded by transformers, unless it holds open_clip's weights for open_clip.
    """
    meant = parse(row.address)
    if given.path is None:
        return meant
    path = given.path
    folder = path if path.is_dir() else path.parent
    theirs = meant.kind == "open_clip" and (not path.is_dir() or any((folder / n).is_file() for n in open_clip.FILES))
    if not theirs and saved.is_folder(folder):
        return replace(meant, kind="hf", name=given.text.partition("@")[2], file="")
    other = {"kind": "timm", "name": row.timm} if row.timm else {}
    return replace(meant, file=given.file, key=given.key, **other)


def packages(family: str) -> tuple[str, ...]:
    """Return the packages whose code the modules of a family are: another version may compute something else."""
    return FAMILIES[family].packages if family in FAMILIES else ()


def load(asked: Request, family: Family) -> Loaded:
    """Find what is asked for; a checkpoint of the paper sees images as the paper does."""
    loaded, row = family.load(asked), asked.row
    if row is None:
        return loaded
    view = loaded.preprocessing
    if loaded.architecture["family"] == "hf":
        transformers.check_row(loaded.architecture["options"], row, asked)
    return replace(
        loaded,
        preprocessing=lambda module: Preprocessing(view(module).size, row.crop, "bicubic", row.mean, row.std),
    )


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """Make an encoder module with seeded random weights from its architecture record."""
    options = dict(architecture["options"])
    return seeded(lambda: FAMILIES[architecture["family"]].build(options), 0)


def build_hollow(architecture: Mapping[str, Any]) -> nn.Module | None:
    """Make an encoder module without values of its parameters, for weights that are bound to it; None where it cannot.

    What the architecture computes, such as tables of positions, has its values (``skeletons``).
    """
    options = dict(architecture["options"])
    return skeleton(lambda: FAMILIES[architecture["family"]].build(options))
