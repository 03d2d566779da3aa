"""How the encoders of each kind of address are made: architecture, preprocessing and weights.

Each family is a module with the functions of ``Family``; the paper's checkpoints are those of other families, seen as
the paper sees images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from taskvec.core.compute import seeded
from taskvec.core.errors import TaskvecError
from taskvec.data.images import Preprocessing
from taskvec.encoders.addresses import PAPER, Checkpoint, parse, split_key
from taskvec.encoders.loaders import lab, open_clip, timm
from taskvec.encoders.loaders.hf import saved, transformers
from taskvec.encoders.loaders.requests import LARGEST, Family, Loaded, Request

FAMILIES: dict[str, Family] = {
    "lab": lab.FAMILY,
    "timm": timm.FAMILY,
    "hf": transformers.FAMILY,
    "open_clip": open_clip.FAMILY,
}
BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "lab": lab.build,
    "timm": timm.build,
    "hf": transformers.build,
    "open_clip": open_clip.build,
}


def find(
    address: str, size: int | None = None, allow_pickle: bool = False, projection: bool | None = None
) -> tuple[Family, Request]:
    """Return the family that loads an address, and what is asked of it; a checkpoint of the paper is one of theirs."""
    kind, name, file = parse(address)
    if size is not None and (not isinstance(size, int) or not 0 < size <= LARGEST):
        raise TaskvecError(f"'{address}': size is '{size}'", f"give a number of pixels, at most {LARGEST}")
    if kind == "paper":
        kind, name, file = resolve(PAPER[name], file)
    file, key = split_key(file)
    hub = PAPER[parse(address)[1]].hub if address.startswith("paper:") and not file else None
    return FAMILIES[kind], Request(address, kind, name, file, size, projection, allow_pickle, hub, key)


def resolve(checkpoint: Checkpoint, given: str) -> tuple[str, str, str]:
    """Return kind, name and file of a checkpoint of the paper, from the hub or from a file or folder that is given.

    A folder that transformers wrote is loaded by transformers, unless it holds open_clip's weights for open_clip.
    """
    kind, name, file = parse(checkpoint.address)
    if not given:
        return kind, name, file
    path = Path(split_key(given)[0]).expanduser()
    folder = path if path.is_dir() else path.parent
    own = kind == "open_clip" and (not path.is_dir() or any((folder / n).is_file() for n in open_clip.FILES))
    if not own and saved.is_folder(folder):
        return "hf", given, ""
    return ("timm", checkpoint.timm, given) if checkpoint.timm else (kind, name, given)


def packages(family: str) -> tuple[str, ...]:
    """Return the packages whose code the modules of a family are: another version may compute something else."""
    return FAMILIES[family].packages if family in FAMILIES else ()


def load(asked: Request, family: Family) -> Loaded:
    """Find what is asked for; a checkpoint of the paper sees images as the paper does."""
    loaded = family.load(asked)
    kind, name, _ = parse(asked.address)
    if kind != "paper":
        return loaded
    row, seen = PAPER[name], loaded.preprocessing
    if loaded.architecture["family"] == "hf":
        transformers.check_row(loaded.architecture["options"], row, asked)
    return replace(
        loaded,
        preprocessing=lambda module: Preprocessing(seen(module).size, row.crop, "bicubic", row.mean, row.std),
    )


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """Make an encoder module with seeded random weights from its architecture record."""
    options = dict(architecture["options"])
    return seeded(lambda: BUILDERS[architecture["family"]](options), 0)
