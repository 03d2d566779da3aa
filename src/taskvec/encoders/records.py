"""Backbones on disk: the record of an encoder beside its weights, as they are written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from pydantic import Field
from torch import nn

from taskvec.core.errors import TaskvecError, first_line
from taskvec.core.files import Record, read_record, write_json
from taskvec.data.images import Preprocessing
from taskvec.encoders.backbone import Backbone, assemble, filled
from taskvec.encoders.loaders import families
from taskvec.encoders.loaders.families import build, build_hollow
from taskvec.encoders.loaders.requests import check_affordable, check_bounds, check_parameters
from taskvec.engine.pipeline import versions
from taskvec.weights.flat import Slot, Weights, align, check_filled, layout_of, open_saved, outline, read, save

Mean = Annotated[float, Field(ge=-1000, le=1000)]
Deviation = Annotated[float, Field(ge=1e-4, le=1000)]
BASE = "around.safetensors"
"""The file of a kept model with the weights that its linearised encoder is expanded around."""


class View(Record):
    """The record of a preprocessing, within bounds that keep the encoder's input finite."""

    model_config = pydantic.ConfigDict(extra="forbid")

    size: int = Field(ge=1, le=4096)
    crop: float = Field(ge=0.01, le=1)
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"]
    mean: Annotated[tuple[Mean, Mean, Mean], pydantic.Strict(False)]
    std: Annotated[tuple[Deviation, Deviation, Deviation], pydantic.Strict(False)]
    squash: bool


class Architecture(Record):
    """What ``build`` makes a module of."""

    family: str
    options: dict[str, Any]


class Encoder(Record):
    """The record of a backbone, beside its weights."""

    architecture: Architecture
    preprocessing: View
    width: int | None = Field(default=None, ge=1, le=10**9)
    """Of its features; older records of kept models do not tell."""

    @pydantic.model_validator(mode="after")
    def same_size(self) -> Encoder:
        """Raise where the module is made for images of another size than it is to see."""
        made, seen = self.architecture.options.get("size", self.preprocessing.size), self.preprocessing.size
        if made != seen:
            raise ValueError(f"an encoder for images of {made} px cannot see {seen} px")
        return self


def write_backbone(backbone: Backbone, folder: Path) -> None:
    """Write the encoder's weights and what is needed to make the module again."""
    save(backbone.pretrained, folder / "encoder.safetensors")
    record: dict[str, Any] = {
        "architecture": backbone.architecture,
        "packages": versions(families.packages(backbone.architecture["family"])),
        "preprocessing": backbone.preprocessing.to_json(),
        "width": backbone.width,
        "left_out": list(backbone.left_out),
    }
    if backbone.origin:  # not where it lay: the same weights from another path are the same
        record["sha256"] = backbone.origin["sha256"]
    write_json(folder / "backbone.json", record)


def read_layout(folder: Path) -> tuple[Slot, ...]:
    """Return the layout of a kept backbone's weights; neither weights nor memory for them are taken."""
    architecture = read_record(folder / "backbone.json", Encoder).architecture.model_dump()
    with torch.device("meta"):
        return layout_of(build(architecture).state_dict(keep_vars=True))


def read_backbone(folder: Path, device: str = "cpu", name: str = "encoder") -> Backbone:
    """Open a backbone that ``write_backbone`` wrote and nobody changes, under a name: it is kept without one."""
    return restore(folder / "backbone.json", folder / "encoder.safetensors", device, name, kept=True)


def restore(about: Path, weights: Path, device: str, name: str, kept: bool = False) -> Backbone:
    """Make a backbone from the file of its record and the file of its weights; what does not fit is an error.

    A file of weights that a store has ``kept`` is used where it lies; any other is read and checked.
    """
    record = read_record(about, Encoder)
    if not weights.is_file():
        raise TaskvecError(f"no weights file at '{weights}'", "restore the file, or make it again")
    architecture, preprocessing = record.architecture.model_dump(), Preprocessing(**record.preprocessing.model_dump())
    try:
        check_bounds(architecture["options"], f"'{about}'")
        module = made(architecture, weights, f"'{about}'")
    except TaskvecError:
        raise
    except Exception as error:  # modules of many libraries, which raise errors of many kinds
        what = f"no encoder can be made of its architecture: {first_line(error)}"
        raise TaskvecError(f"'{about}': {what}", "restore the file, or make it again") from None
    like = outline(module.state_dict(keep_vars=True))
    if kept:
        pretrained = open_saved(weights, like, device)
        check_filled(pretrained, f"'{weights}'")
    else:
        pretrained = filled(read(weights), like, f"'{weights}'")
    return assemble(name, module, preprocessing, architecture, device, pretrained, record.width)


def made(architecture: dict[str, Any], weights: Path, source: str) -> nn.Module:
    """Make the module for a file of weights: without values where it can be; one that the file cannot fill raises."""
    module = build_hollow(architecture)
    if module is None:
        check_affordable(lambda: build(architecture), [weights], source)
        return build(architecture)
    check_parameters(module, [weights], source)
    return module


def read_weights(path: Path, like: Weights) -> Weights:
    """Read a safetensors file that must have exactly the keys and shapes of ``like``."""
    return align(read(path), like, f"'{path}'")
