"""Addresses of backbones, ``kind:name[@file]``: which kinds there are, and what an address says.

Nothing is loaded here, not even torch, so that the command lists and refuses addresses at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from taskvec.core.errors import TaskvecError, did_you_mean, unknown
from taskvec.paper.checkpoints import PAPER
from taskvec.weights import hub
from taskvec.weights.formats import WEIGHT_SUFFIXES


@dataclass(frozen=True)
class Kind:
    """A kind of address: a line for each form beside plain names, and the module in ``loaders`` that loads it.

    The paper's checkpoints have no loader of their own: each is an address of another kind.
    """

    forms: Mapping[str, str]
    loader: str = ""


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "lab": Kind({"lab:NAME@STEP": "an encoder of the lab after so many steps of its pre-training"}, "lab"),
        "timm": Kind(
            {
                "timm:NAME": "any timm classifier without its head, with timm's own weights (cached, or downloaded)",
                "timm:NAME@FILE": "the same with weights from a file, in timm's keys",
            },
            "timm",
        ),
        "hf": Kind(
            {
                "hf:REPO": "a vision model of transformers from the Hugging Face hub (extra: hf)",
                "hf:FOLDER": "the same from a folder that save_pretrained wrote",
            },
            "hf.transformers",
        ),
        "open_clip": Kind(
            {
                "open_clip:MODEL@TAG": "a CLIP image tower with its projection, weights by a tag (extra: clip)",
                "open_clip:MODEL@FILE": "the same with weights from a file",
            },
            "open_clip",
        ),
        "paper": Kind({f"paper:{name}": checkpoint.description for name, checkpoint in PAPER.items()}),
    }
)
"""The kinds of address by name."""


@dataclass(frozen=True)
class BackboneAddress:
    """An address that was read: its kind, name, and what follows the @, a file or a tag.

    ``key`` names the part of the file that is meant, and ``text`` is the whole address.
    """

    kind: str
    name: str
    file: str
    key: str
    text: str

    def __str__(self) -> str:
        """Return the address as it is written."""
        return self.text

    @property
    def default_name(self) -> str:
        """Return the name a backbone gets when none is given: without organisation or folder."""
        return Path(self.name).name if self.kind == "hf" else self.name

    @property
    def path(self) -> Path | None:
        """Return the file or folder that the address names, None where it names none."""
        given = self.name if self.kind == "hf" else self.file
        return Path(given).expanduser() if given else None

    @property
    def absent(self) -> str:
        """Return the Hub's repository of a checkpoint of the paper that its cache here does not hold; else nothing."""
        if self.kind != "paper" or self.file:
            return ""
        repo = PAPER[self.name].repository
        return "" if hub.has_repository(repo) else repo


def parse(address: str | BackboneAddress, start: Path | None = None) -> BackboneAddress:
    """Read ``kind:name[@file]``, or raise and say which kinds there are; relative paths begin at ``start`` if given.

    ``lab:NAME@STEP`` keeps its step in the name, and an ``hf:`` folder whatever signs it has.
    """
    if isinstance(address, BackboneAddress):
        return address
    kind, colon, rest = address.partition(":")
    if not colon or not rest:
        raise TaskvecError(
            f"backbone address '{address}' is not of the form kind:name", "for example lab:supervised or timm:NAME@FILE"
        )
    if kind not in KINDS:
        raise TaskvecError(f"unknown kind of backbone '{kind}' in '{address}'", did_you_mean(kind, KINDS))
    name, _, file = rest.partition("@")
    if kind == "hf" or (kind == "lab" and file and not is_file(file)):
        there = start / Path(rest).expanduser() if start and kind == "hf" else None
        name = str(there) if there and there.exists() else rest
        return BackboneAddress(kind, name, "", "", f"{kind}:{name}")
    if kind == "paper" and name not in PAPER:
        raise unknown("checkpoint of the paper", name, PAPER)
    if is_file(file) and start:
        file = str(start / Path(file).expanduser())
        address = f"{kind}:{name}@{file}"
    return BackboneAddress(kind, name, *split_key(file), address)


def is_file(after: str) -> bool:
    """Say whether what follows the @ of an address is a file: it has a path separator or a weight suffix."""
    return "/" in after or any(Path(name).suffix in WEIGHT_SUFFIXES for name in (after, after.rpartition("#")[0]))


def split_key(given: str) -> tuple[str, str]:
    """Split ``FILE#KEY``, which names a part of a file; where there is a file of the whole name, that is meant."""
    file, _, key = given.rpartition("#")
    known = not Path(given).expanduser().exists() and Path(file).expanduser().exists()
    return (file, key) if file and key and known else (given, "")


def listing() -> dict[str, str]:
    """Return every form of address and the paper's names, with one line each."""
    return {form: line for kind in KINDS.values() for form, line in kind.forms.items()}
