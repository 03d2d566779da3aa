"""What is known of a backbone by its address, with no weight of it loaded: its identity, what it has and takes."""

from __future__ import annotations

from typing import Any

from taskvec.encoders.addresses import BackboneAddress, parse
from taskvec.encoders.loaders.families import find
from taskvec.engine.pipeline import versions


def describe(
    address: str | BackboneAddress, size: int | None, allow_pickle: bool = False, projection: bool | None = None
) -> dict[str, Any]:
    """Return what identifies a backbone, for a fingerprint: its architecture's name and the digest of its weights.

    Nothing is downloaded: of weights that the hub's cache does not hold there is no digest.
    """
    address = parse(address)
    family, asked = find(address, size, allow_pickle, projection)
    about: dict[str, Any] = {"kind": address.kind, "name": address.name, "size": size}
    about |= {"packages": versions(family.packages)} | family.identify(asked)
    about |= {"part": asked.key} if asked.key else {}
    return about if projection is None else about | {"projection": projection}


def to_download(address: str | BackboneAddress, allow_pickle: bool = False) -> str:
    """Return what loading a backbone would download (repository and file of the hub), empty where it is here."""
    family, asked = find(address, None, allow_pickle)
    return family.missing(asked)


def has_text(address: str | BackboneAddress, allow_pickle: bool = False, projection: bool | None = None) -> bool:
    """Say whether a backbone comes with a text tower, from which zero-shot heads can be built."""
    family, asked = find(address, None, allow_pickle, projection)
    return family.has_text(asked)


def reads_words(address: str | BackboneAddress) -> bool:
    """Say whether a backbone's text tower takes the words of the lab's captions, and no sentences."""
    return find(address)[0].reads_words


def describe_text(address: str | BackboneAddress, allow_pickle: bool = False) -> str:
    """Return the digest of a backbone's text tower, for a fingerprint; empty where it is not on this machine."""
    family, asked = find(address, None, allow_pickle)
    return family.identify_text(asked)


def load_cost(address: str | BackboneAddress) -> float:
    """Estimate the cost of loading a backbone in forward passes: much where a snapshot has to be trained."""
    family, asked = find(address)
    return family.cost(asked)
