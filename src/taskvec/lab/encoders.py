"""The lab's encoders by name: the weights that the package ships, and how each came to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from taskvec.errors import unknown

WEIGHTS = Path(__file__).parent / "weights"
"""Where the encoders that the package ships lie."""
DESCRIPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "supervised": "small ViT, pre-trained to classify glyphs that no task uses",
        "random": "the same ViT with seeded random weights: the control",
    }
)
"""Every encoder of the lab by name."""


def path(name: str) -> Path | None:
    """Return the file of a shipped encoder, or None for random weights; an unknown name raises with the nearest."""
    if name not in DESCRIPTIONS:
        raise unknown("lab encoder", name, DESCRIPTIONS)
    return None if name == "random" else WEIGHTS / f"{name}.safetensors"


def record(name: str) -> dict[str, Any]:
    """Return how a shipped encoder came to be: command, versions, figures, hash, architecture."""
    file = path(name) or WEIGHTS / "supervised.safetensors"
    data: dict[str, Any] = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    return data


def options(name: str) -> dict[str, Any]:
    """Return what the encoder's module is made with; random weights have the supervised encoder's architecture."""
    return dict(record(name)["architecture"])
