"""Backbones: pre-trained encoders by address, with feature width, preprocessing and the origin of the weights."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn

from taskvec.core.compute import choose_device
from taskvec.core.errors import TaskvecError, first_line
from taskvec.core.files import Record, read_record, write_json
from taskvec.core.notes import note
from taskvec.core.progress import Progress, no_progress
from taskvec.data.images import Preprocessing, normalise
from taskvec.encoders import linearised as tangents
from taskvec.encoders.addresses import default_name, parse
from taskvec.encoders.loaders import families as loaders
from taskvec.encoders.loaders.checkpoints import parts
from taskvec.encoders.loaders.families import build
from taskvec.encoders.loaders.requests import check_affordable, check_bounds
from taskvec.engine.pipeline import versions
from taskvec.lab import encoders
from taskvec.weights.flat import Weights, align, bind, check_filled, read, save
from taskvec.weights.keys import COUNTER

Mean = Annotated[float, Field(ge=-1000, le=1000)]
Deviation = Annotated[float, Field(ge=1e-4, le=1000)]
AROUND = "around.safetensors"
"""The file of a kept model with the weights that its linearised encoder is expanded around."""


@dataclass
class Backbone:
    """An encoder bound to a flat weight buffer; ``pretrained`` keeps the weights it came with, on the same device.

    ``architecture`` is what ``build`` needs to make the module again without the original file; ``left_out`` names the
    tensors of that file that are no part of the encoder, and ``origin`` the file and the SHA-256 of its content.
    Where there are weights ``around``, the encoder is linearised: its features are those of its first-order expansion
    around them. Threads may share a backbone: its ``lock`` lets one at a time move it (``at``) or ask for features.
    """

    name: str
    module: nn.Module
    width: int
    preprocessing: Preprocessing
    architecture: dict[str, Any]
    pretrained: Weights
    bound: Weights
    device: str = "cpu"
    left_out: tuple[str, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)
    around: Weights | None = None
    lock: contextlib.AbstractContextManager[Any] = field(default_factory=threading.RLock, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of: its module is bound anew, and its lock is its own."""
        return {name: value for name, value in vars(self).items() if name not in ("bound", "lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy, in this process or another."""
        vars(self).update(state, bound=bind(state["module"]), lock=threading.RLock())

    def use(self, weights: Weights) -> None:
        """Move the encoder to other weights of its layout, for good; integer buffers stay the pre-trained encoder's."""
        self.bound.flat.copy_(weights.flat)

    @contextlib.contextmanager
    def at(self, weights: Weights | None = None) -> Iterator[None]:
        """Be at other weights inside, or wherever the block moves to; after it, however it ends, at those of before."""
        with self.lock, mode_kept(self.module):
            flat, start = self.bound.flat, self.pretrained.flat
            before = start if torch.equal(flat, start) else flat.clone()
            try:
                if weights is not None:
                    self.use(weights)
                yield
            finally:
                flat.copy_(before)

    @property
    def expansion(self) -> tuple[Weights, ...]:
        """Return the weights that the encoder is linearised around, or nothing, as ``encode`` takes them last."""
        return () if self.around is None else (self.around,)

    @torch.inference_mode()
    def features(
        self,
        images: UInt8[np.ndarray, "count 3 size size"],
        batch_size: int = 256,
        progress: Progress = no_progress,
        per_patch: bool = False,
    ) -> Float[Tensor, "count *patches width"]:
        """Return the float32 features of all images under the present weights, on the CPU; one a patch if wanted."""
        out = torch.empty(0, self.width)
        with self.lock, mode_kept(self.module):
            self.module.eval()
            for start in range(0, len(images), batch_size):
                pixels = torch.from_numpy(np.array(images[start : start + batch_size]))
                batch = normalise(pixels, self.preprocessing, self.device)
                found = encode(self.module, batch, per_patch, *self.expansion).float().cpu()
                out = out if start else torch.empty(len(images), *found.shape[1:])
                out[start : start + len(batch)] = found
                progress((start + len(batch)) / len(images))
        return out


@contextlib.contextmanager
def mode_kept(module: nn.Module) -> Iterator[None]:
    """Put every part of a module back into its mode, of training or evaluation, after a block."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def encode(
    module: nn.Module, images: Float[Tensor, "batch 3 size size"], per_patch: bool, around: Weights | None = None
) -> Float[Tensor, "batch *patches width"]:
    """Return a module's feature of every image, or of every patch; linearised ``around`` weights where given."""
    function = patch_tokens if per_patch else image_features
    return function(module, images) if around is None else tangents.expand(module, function, images, around)


def image_features(module: nn.Module, images: Float[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch width"]:
    """Return a module's feature of every image."""
    features: Tensor = module(images)
    return features


def linearised(backbone: Backbone) -> Backbone:
    """Return the backbone as its first-order expansion around the pre-trained weights (arXiv 2305.12827, section 5).

    Both share the module and its weights. Fine-tuning, merging and measuring it is done as with any backbone.
    """
    return replace(backbone, around=backbone.pretrained)


def patch_tokens(module: nn.Module, images: Float[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch patches width"]:
    """Return the final token of every patch, row by row: those of the lab's transformer, or of timm's.

    Raises for a module that has none, such as a convolutional network.
    """
    encoder: Any = module
    if not hasattr(encoder, "tokens") and not hasattr(encoder, "num_prefix_tokens"):
        raise TaskvecError(
            f"a {type(module).__name__} gives no feature a patch, which a task with a label a patch needs",
            "choose a vision transformer, or leave the task out",
        )
    tokens: Tensor
    if hasattr(encoder, "tokens"):
        tokens = encoder.tokens(images)
    else:
        tokens = encoder.forward_features(images)[:, encoder.num_prefix_tokens :]
    return tokens


def describe(
    address: str, size: int | None, allow_pickle: bool = False, projection: bool | None = None
) -> dict[str, Any]:
    """Return what identifies a backbone, for a fingerprint: its architecture's name and the digest of its weights.

    Nothing is downloaded: of weights that the hub's cache does not hold there is no digest.
    """
    kind, name, _ = parse(address)
    family, asked = loaders.find(address, size, allow_pickle, projection)
    about = {"kind": kind, "name": name, "size": size, "packages": versions(family.packages)} | family.identify(asked)
    about |= {"part": asked.key} if asked.key else {}
    return about if projection is None else about | {"projection": projection}


def to_download(address: str, allow_pickle: bool = False) -> str:
    """Return what loading a backbone would download (repository and file of the hub), empty where it is here."""
    family, asked = loaders.find(address, None, allow_pickle)
    return family.missing(asked)


def has_text(address: str, allow_pickle: bool = False, projection: bool | None = None) -> bool:
    """Say whether a backbone comes with a text tower, from which zero-shot heads can be built."""
    family, asked = loaders.find(address, None, allow_pickle, projection)
    return family.has_text(asked)


def describe_text(address: str, allow_pickle: bool = False) -> str:
    """Return the digest of a backbone's text tower, for a fingerprint; empty where it is not on this machine."""
    family, asked = loaders.find(address, None, allow_pickle)
    return family.identify_text(asked)


def load_cost(address: str) -> float:
    """Estimate the cost of loading a backbone in forward passes: much where a snapshot has to be trained."""
    kind, name, _ = parse(address)
    return 10.0 + 200.0 * (encoders.split_step(name)[1] or 0) if kind == "lab" else 10.0


def text_features(
    address: str, captions: Sequence[str], allow_pickle: bool = False
) -> tuple[Float[Tensor, "captions width"], float]:
    """Return the text features of captions, of unit length, and the scale of similarities (1 / temperature)."""
    family, asked = loaders.find(address, None, allow_pickle)
    if family.texts is None:
        raise TaskvecError(f"'{address}' has no text tower", "choose a CLIP model, or lab:contrastive")
    return family.texts(asked, captions)


def load_backbone(
    address: str,
    size: int | None = None,
    name: str | None = None,
    device: str = "auto",
    allow_pickle: bool = False,
    projection: bool | None = None,
) -> Backbone:
    """Load an encoder by address (docs/backbones.md) at an input size in pixels, its own by default.

    ``allow_pickle`` admits .pt and .bin files, which are then read with ``weights_only=True``; ``projection`` says
    whether the features of a CLIP model are those after its projection.
    """
    family, asked = loaders.find(address, size, allow_pickle, projection)
    loaded = loaders.load(asked, family)
    module = build(loaded.architecture)
    check_size(module, size, address)
    state = loaded.state(module)
    origin = loaded.origin()
    named, device = name or default_name(address), choose_device(device)
    backbone = assemble(named, module, loaded.preprocessing(module), loaded.architecture, device)
    if state is not None:
        source = f"'{origin.get('from', asked.file or asked.name)}'"
        fill(backbone, state.tensors, source)
        backbone.left_out = state.left_out
        if state.left_out:
            note(f"{source}: left out {parts(state.left_out)}")
    backbone.origin = origin
    return backbone


def assemble(
    name: str,
    module: nn.Module,
    preprocessing: Preprocessing,
    architecture: dict[str, Any],
    device: str,
    weights: Path | None = None,
) -> Backbone:
    """Bind a module to a flat buffer, take the weights of a file, and find its feature width by one forward pass."""
    module = module.to(device).float().eval()
    bound = bind(module)
    backbone = Backbone(name, module, 0, preprocessing, architecture, bound.clone(), bound, device)
    if weights is not None:
        fill(backbone, read(weights), f"'{weights}'")
    backbone.width = feature_width(module, preprocessing, device, name)
    return backbone


@torch.inference_mode()
def feature_width(module: nn.Module, preprocessing: Preprocessing, device: str, name: str) -> int:
    """Return the width of the module's features, or raise if it cannot look at images of that size."""
    images = torch.zeros(2, 3, preprocessing.size, preprocessing.size, device=device)
    return int(tried(module, images, name).shape[1])


def tried(module: nn.Module, images: Float[Tensor, "batch 3 size size"], name: str) -> Float[Tensor, "batch width"]:
    """Return a module's features, or raise if it cannot look at such images or gives no vector of each."""
    try:
        features: Any = module(images)
    except Exception as error:  # modules of many libraries, which raise errors of many kinds
        raise TaskvecError(
            f"'{name}' cannot look at {images.shape[-1]} px images: {first_line(error)}", "choose another size"
        ) from None
    if not isinstance(features, Tensor) or features.ndim != 2:
        what = f"features of shape {list(features.shape[1:])}" if isinstance(features, Tensor) else "several outputs"
        raise TaskvecError(f"'{name}' gives {what}, not one vector an image", "choose a classifier")
    return features


def check_size(module: nn.Module, size: int | None, name: str) -> None:
    """Raise where a size that is asked for is no multiple of the patches, so that a border of images is never seen."""
    patch = patch_side(module)
    if size is None or size % patch == 0:
        return
    below = size - size % patch
    near = f"{below} or {below + patch}" if below else str(patch)
    raise TaskvecError(
        f"'{name}' cuts images into patches of {patch} px, and {size} px leave {size % patch} px that no patch sees",
        f"choose another size, a multiple of {patch}: {near}; or leave size out for the encoder's own",
    )


def patch_side(module: nn.Module) -> int:
    """Return the side of the patches that images are cut into, 1 for convolutions or where the library pads images."""
    parts = list(module.modules())
    if any(hasattr(part, "maybe_pad") or getattr(part, "dynamic_img_pad", False) for part in parts):
        return 1
    wide = [part for part in parts if isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1]
    cuts = len(wide) == 1 and wide[0].kernel_size == wide[0].stride and wide[0].padding in ((0, 0), "valid")
    return int(wide[0].stride[0]) if cuts else 1


def fill(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> None:
    """Make ``state`` the pre-trained weights: keys and shapes must fit."""
    wanted = backbone.pretrained.state()
    counters = {key: value for key, value in wanted.items() if key.endswith(COUNTER) and key not in state}
    backbone.pretrained = align({**state, **counters}, backbone.pretrained, source)
    check_filled(backbone.pretrained, source)
    backbone.use(backbone.pretrained)
    for name, tensor in backbone.pretrained.carried.items():
        backbone.bound.carried[name].copy_(tensor)


def write_backbone(backbone: Backbone, folder: Path) -> None:
    """Write the encoder's weights and what is needed to make the module again."""
    save(backbone.pretrained, folder / "encoder.safetensors")
    record: dict[str, Any] = {
        "architecture": backbone.architecture,
        "packages": versions(loaders.packages(backbone.architecture["family"])),
        "preprocessing": backbone.preprocessing.to_json(),
        "width": backbone.width,
        "left_out": list(backbone.left_out),
    }
    if backbone.origin:  # not where it lay: the same weights from another path are the same
        record["sha256"] = backbone.origin["sha256"]
    write_json(folder / "backbone.json", record)


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

    @pydantic.model_validator(mode="after")
    def same_size(self) -> Encoder:
        """Raise where the module is made for images of another size than it is to see."""
        made, seen = self.architecture.options.get("size", self.preprocessing.size), self.preprocessing.size
        if made != seen:
            raise ValueError(f"an encoder for images of {made} px cannot see {seen} px")
        return self


def read_backbone(folder: Path, device: str = "cpu", name: str = "encoder") -> Backbone:
    """Open a backbone that ``write_backbone`` wrote, under a name: it is kept without one."""
    return restore(folder / "backbone.json", folder / "encoder.safetensors", device, name)


def restore(about: Path, weights: Path, device: str, name: str) -> Backbone:
    """Make a backbone from the file of its record and the file of its weights; what does not fit is an error."""
    record = read_record(about, Encoder)
    if not weights.is_file():
        raise TaskvecError(f"no weights file at '{weights}'", "restore the file, or make it again")
    architecture, preprocessing = record.architecture.model_dump(), Preprocessing(**record.preprocessing.model_dump())
    try:
        check_bounds(architecture["options"], f"'{about}'")
        check_affordable(lambda: build(architecture), [weights], f"'{about}'")
        module = build(architecture)
    except TaskvecError:
        raise
    except Exception as error:  # modules of many libraries, which raise errors of many kinds
        what = f"no encoder can be made of its architecture: {first_line(error)}"
        raise TaskvecError(f"'{about}': {what}", "restore the file, or make it again") from None
    return assemble(name, module, preprocessing, architecture, device, weights)


def read_weights(path: Path, like: Weights) -> Weights:
    """Read a safetensors file that must have exactly the keys and shapes of ``like``."""
    return align(read(path), like, f"'{path}'")
