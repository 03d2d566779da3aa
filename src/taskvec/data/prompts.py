"""Prompts of classes for zero-shot heads: published sentences for the paper's data sets, general ones for others.

The sentences are those of CLIP (arXiv 2103.00020, its repository's prompts), as task arithmetic (arXiv 2212.04089) uses
them for these eight data sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from taskvec.paper.tasks import key

GENERAL = ("a photo of a {}.", "a photo of the {}.")
"""The sentences for a data set without published ones."""
_NUMBER = ('a photo of the number: "{}".',)
_TEXTURES = tuple(f"a photo of {article} {{}} {noun}." for article in ("a", "the") for noun in
                  ("texture", "pattern", "thing", "object"))  # fmt: skip
_AERIAL = tuple(f"{view} of {article}{{}}." for article in ("", "a ", "the ") for view in
                ("satellite imagery", "aerial imagery", "satellite photo", "aerial photo", "satellite view",
                 "aerial view"))  # fmt: skip
TEMPLATES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cars": (
            "a photo of a {}.",
            "a photo of the {}.",
            "a photo of my {}.",
            "i love my {}!",
            "a photo of my dirty {}.",
            "a photo of my clean {}.",
            "a photo of my new {}.",
            "a photo of my old {}.",
        ),
        "dtd": _TEXTURES,
        "eurosat": tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
        "gtsrb": tuple(f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up")),
        "mnist": _NUMBER,
        "resisc45": _AERIAL,
        "sun397": GENERAL,
        "svhn": _NUMBER,
    }
)
"""Sentences by data set; {} stands for the name of a class."""
OTHER_NAMES = {"stanfordcars": "cars", "eurosatsplits": "eurosat", "eurosatrgb": "eurosat", "nwpuresisc45": "resisc45"}
"""Other names of data sets, in lower case and without punctuation."""


def templates_of(names: Sequence[str]) -> tuple[str, ...]:
    """Return the sentences of the first known data set among names, whatever their case and punctuation."""
    known = [OTHER_NAMES.get(key(name), key(name)) for name in names]
    return next((TEMPLATES[name] for name in known if name in TEMPLATES), GENERAL)


def captions(classes: Sequence[str], data_set: Sequence[str]) -> list[list[str]]:
    """Return each class in all sentences of the data set, which has the given names; underscores become spaces."""
    return [[sentence.format(name.replace("_", " ")) for sentence in templates_of(data_set)] for name in classes]
