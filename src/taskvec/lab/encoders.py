"""The lab's encoders by name: the weights that the package ships, and the record of each pre-training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from taskvec.core.errors import TaskvecError, unknown

WEIGHTS = Path(__file__).parent / "weights"
"""The folder of the encoders that the package ships."""
DESCRIPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "supervised": "small ViT, pre-trained to classify 389 kinds of glyph that no task uses",
        "supervised-few": "the same with 130 of these kinds, to see what more classes give",
        "supervised-vit-l": "a larger ViT (160 wide, 6 deep) with all 389 kinds, to see what scale gives",
        "mae": "small ViT, pre-trained to paint hidden patches of 130 kinds of glyph (MAE)",
        "dino": "small ViT, pre-trained to agree with its own average across views of 130 kinds of glyph (DINO)",
        "contrastive": "small ViT, pre-trained to match glyphs with their Unicode names, ever new images",
        "contrastive-few": "the same with 19968 scenes again and again, to see what more data gives",
        "random": "the same ViT with seeded random weights: the control",
    }
)
"""Every encoder of the lab by name."""


def pretrained() -> tuple[str, ...]:
    """Return the names of the encoders that were trained, which is all but random weights."""
    return tuple(name for name in DESCRIPTIONS if name != "random")


def path(name: str) -> Path | None:
    """Return the file of a shipped encoder, or None for random weights; an unknown name raises with the nearest."""
    if name not in DESCRIPTIONS:
        raise unknown("lab encoder", name, DESCRIPTIONS)
    return None if name == "random" else WEIGHTS / f"{name}.safetensors"


def text_path(name: str) -> Path | None:
    """Return the file of the text encoder that was trained together with an encoder, or None."""
    file = path(name)
    text = file.with_suffix(".text.safetensors") if file else None
    return text if text and text.exists() else None


def has_text(name: str) -> bool:
    """Return whether a lab encoder comes with a text encoder, so that captions can be its head."""
    return text_path(name) is not None


def record(name: str) -> dict[str, Any]:
    """Return the record of a shipped encoder: command, versions, figures, hash, architecture."""
    file = path(name) or WEIGHTS / "supervised.safetensors"
    data: dict[str, Any] = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    return data


def options(name: str) -> dict[str, Any]:
    """Return the arguments of the encoder's module; random weights have the supervised encoder's architecture."""
    return dict(record(name)["architecture"])


def split_step(name: str) -> tuple[str, int | None]:
    """Return name and step of ``NAME@STEP``, an encoder during its pre-training; None is the finished one.

    A step that is no number, or not in the run, raises.
    """
    base, at, step = name.partition("@")
    if not at:
        return base, None
    if not step.isdecimal():
        raise TaskvecError(
            f"'@{step}' in 'lab:{name}' is neither a step nor a file", "for example lab:supervised@500, or give a path"
        )
    if path(base) is None:
        raise TaskvecError(f"'lab:{base}' was not pre-trained and has no step {step}", f"use lab:{base}")
    last = int(record(base)["steps"])
    if int(step) > last:
        raise TaskvecError(f"'lab:{base}' has no step {step}", f"choose 0 to {last}")
    return base, int(step)
