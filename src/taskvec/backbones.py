"""Backbones: pre-trained encoders from timm and the lab, with their feature width and preprocessing."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from taskvec.compute import choose_device
from taskvec.errors import TaskvecError, did_you_mean
from taskvec.images import Preprocessing, normalise
from taskvec.lab import encoders
from taskvec.loaders import LOADERS, WEIGHT_SUFFIXES, build
from taskvec.store import file_digest, read_json, write_json
from taskvec.training import Progress, no_progress
from taskvec.weights import Weights, align, bind, read, save

CLASSIFIERS = ("head.", "fc.", "classifier.", "head_dist.", "last_linear.")
"""Key prefixes of heads that a file of an encoder may hold and that are dropped on purpose."""


@dataclass
class Backbone:
    """An encoder bound to a flat weight buffer; ``pretrained`` keeps the weights it came with, on the same device.

    ``architecture`` is what ``build`` needs to make the module again without the original file; ``left_out`` names the
    tensors of a classifier in that file.
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

    def use(self, weights: Weights) -> None:
        """Move the encoder to other weights of its layout; integer buffers stay the pre-trained encoder's."""
        self.bound.flat.copy_(weights.flat)

    @torch.inference_mode()
    def features(
        self,
        images: UInt8[np.ndarray, "count 3 size size"],
        batch_size: int = 256,
        progress: Progress = no_progress,
        per_patch: bool = False,
    ) -> Float[Tensor, "count *patches width"]:
        """Return the float32 features of all images under the present weights, on the CPU; one a patch if wanted."""
        self.module.eval()
        out = torch.empty(0, self.width)
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.array(images[start : start + batch_size]))
            found = encode(self.module, normalise(batch, self.preprocessing, self.device), per_patch).float().cpu()
            out = out if start else torch.empty(len(images), *found.shape[1:])
            out[start : start + len(batch)] = found
            progress((start + len(batch)) / len(images))
        return out


def encode(
    module: nn.Module, images: Float[Tensor, "batch 3 size size"], per_patch: bool
) -> Float[Tensor, "batch *patches width"]:
    """Return a module's feature of every image, or of every patch."""
    features: Tensor = patch_tokens(module, images) if per_patch else module(images)
    return features


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


def parse(address: str) -> tuple[str, str, str]:
    """Split ``kind:name[@file]``, or raise and say which kinds there are; a missing file is an error."""
    kind, colon, rest = address.partition(":")
    if not colon or not rest:
        raise TaskvecError(
            f"backbone address '{address}' is not of the form kind:name", "for example lab:supervised or timm:NAME@FILE"
        )
    if kind not in LOADERS:
        raise TaskvecError(f"unknown kind of backbone '{kind}' in '{address}'", did_you_mean(kind, LOADERS))
    name, _, file = rest.partition("@")
    if kind == "lab" and file and not is_file(file):
        return kind, rest, ""
    return kind, name, file


def default_name(address: str) -> str:
    """Return the name a backbone gets when none is given."""
    return parse(address)[1]


def describe(address: str, size: int | None, allow_pickle: bool = False) -> dict[str, Any]:
    """Return what identifies a backbone, for a fingerprint: its architecture's name and the digest of its weights."""
    kind, name, file = parse(address)
    about: dict[str, Any] = {"kind": kind, "name": name, "size": size}
    if file:
        about["content"] = file_digest(weights_file(file, allow_pickle))
    elif kind == "lab":
        base, step = encoders.split_step(name)
        path = encoders.path(base)
        about["content"] = file_digest(path) if path else None
        if step is not None:  # it is trained again, so the recipe counts and not only what came of it
            about["recipe"] = encoders.record(base)["recipe"]
    return about


def has_text(address: str) -> bool:
    """Say whether a backbone comes with a text tower, from which zero-shot heads can be built."""
    kind, name, file = parse(address)
    return kind == "lab" and not file and encoders.split_step(name)[1] is None and encoders.has_text(name)


def describe_text(address: str) -> str:
    """Return the digest of a backbone's text tower, for a fingerprint."""
    path = encoders.text_path(parse(address)[1])
    return file_digest(path) if path else ""


def is_file(after: str) -> bool:
    """Say whether what follows the @ of an address is a file: it has a path separator or a weight suffix."""
    return "/" in after or Path(after).suffix in WEIGHT_SUFFIXES


def load_cost(address: str) -> float:
    """Estimate the cost of loading a backbone in forward passes: much where a snapshot has to be trained."""
    kind, name, _ = parse(address)
    return 10.0 + 200.0 * (encoders.split_step(name)[1] or 0) if kind == "lab" else 10.0


def text_features(address: str, captions: Sequence[str]) -> tuple[Float[Tensor, "captions width"], float]:
    """Return the text features of captions, of unit length, and the scale of similarities (1 / temperature)."""
    from taskvec.lab.contrastive import logit_scale, text_features

    name = parse(address)[1]
    return text_features(name, captions), logit_scale(name)


def weights_file(file: str, allow_pickle: bool = False) -> Path:
    """Return the path of a weights file; a missing file, or a pickle not asked for, is an error with the fix."""
    path = Path(file).expanduser()
    if path.suffix not in WEIGHT_SUFFIXES and "/" not in file:
        raise TaskvecError(
            f"'@{file}' is not a file: it has neither a folder nor a suffix such as .safetensors", "give a path"
        )
    if not path.is_file():
        raise TaskvecError(f"no weights file at '{path}'", "give the path of a .safetensors file after the @")
    if path.suffix != ".safetensors" and not allow_pickle:
        raise TaskvecError(
            f"'{path}' is not a .safetensors file; pickled checkpoints can run code when loaded",
            "convert it to safetensors, or set allow_pickle: true (it is then read with weights_only=True)",
        )
    return path


def load_backbone(
    address: str,
    size: int | None = None,
    name: str | None = None,
    device: str = "auto",
    allow_pickle: bool = False,
) -> Backbone:
    """Load an encoder by address (``lab:NAME``, ``timm:NAME@FILE``) at an input size in pixels, its own by default.

    ``allow_pickle`` admits .pt and .bin files, which are then read with ``weights_only=True``.
    """
    kind, model, file = parse(address)
    path = weights_file(file, allow_pickle) if file else None
    loaded = LOADERS[kind](model, path, size)
    module = build(loaded.architecture)
    backbone = assemble(name or model, module, loaded.preprocessing(module), loaded.architecture, choose_device(device))
    state = loaded.state(module)
    if state is not None:
        fill(backbone, state, f"'{path or model}'")
    return backbone


def assemble(
    name: str, module: nn.Module, preprocessing: Preprocessing, architecture: dict[str, Any], device: str
) -> Backbone:
    """Bind a module to a flat buffer and find its feature width by one forward pass."""
    module = module.to(device).float().eval()
    bound = bind(module)
    width = feature_width(module, preprocessing, device, name)
    return Backbone(name, module, width, preprocessing, architecture, bound.clone(), bound, device)


@torch.inference_mode()
def feature_width(module: nn.Module, preprocessing: Preprocessing, device: str, name: str) -> int:
    """Return the width of the module's features, or raise if it cannot look at images of that size."""
    images = torch.zeros(2, 3, preprocessing.size, preprocessing.size, device=device)
    try:
        features = module(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise TaskvecError(
            f"'{name}' cannot look at {preprocessing.size} px images: {reason}", "choose another size"
        ) from None
    if features.ndim != 2:
        raise TaskvecError(
            f"'{name}' gives features of shape {list(features.shape[1:])}, not one vector an image",
            "choose a classifier",
        )
    return int(features.shape[1])


def fill(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> None:
    """Make ``state`` the pre-trained weights: keys and shapes must fit; a classifier is dropped on purpose."""
    wanted = backbone.pretrained.state()
    dropped = [key for key in state if key not in wanted and key.startswith(CLASSIFIERS)]
    counters = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked") and key not in state}
    kept = {key: value for key, value in state.items() if key not in dropped}
    backbone.pretrained = align(kept | counters, backbone.pretrained, source)
    backbone.use(backbone.pretrained)
    for name, tensor in backbone.pretrained.carried.items():
        backbone.bound.carried[name].copy_(tensor)
    backbone.left_out = tuple(dropped)
    if dropped:
        print(f"{source}: left out {len(dropped)} tensors of a classifier ({', '.join(dropped[:3])})", file=sys.stderr)


def write_backbone(backbone: Backbone, folder: Path) -> None:
    """Write the encoder's weights and what is needed to make the module again."""
    save(backbone.pretrained, folder / "encoder.safetensors")
    record = {
        "name": backbone.name,
        "architecture": backbone.architecture,
        "preprocessing": backbone.preprocessing.to_json(),
        "width": backbone.width,
        "left_out": list(backbone.left_out),
    }
    write_json(folder / "backbone.json", record)


def read_backbone(folder: Path, device: str = "cpu") -> Backbone:
    """Open a backbone that ``write_backbone`` wrote."""
    record = read_json(folder / "backbone.json")
    return restore(record, folder / "encoder.safetensors", device)


def restore(record: Mapping[str, Any], weights: Path, device: str) -> Backbone:
    """Make a backbone from its record and a file of its weights."""
    preprocessing = Preprocessing.from_json(record["preprocessing"])
    backbone = assemble(record["name"], build(record["architecture"]), preprocessing, record["architecture"], device)
    fill(backbone, read(weights), f"'{weights}'")
    return backbone


def read_weights(path: Path, like: Weights) -> Weights:
    """Read a safetensors file that must have exactly the keys and shapes of ``like``."""
    return align(read(path), like, f"'{path}'")
