"""How the encoders of each kind of address are made: architecture, preprocessing and weights, from timm and the lab."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskvec.errors import TaskvecError, unknown
from taskvec.images import Preprocessing
from taskvec.lab import encoders
from taskvec.weights import read

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or a pickle with ``weights_only=True``, whose tensors may be one level down."""
    if path.suffix == ".safetensors":
        return read(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and end-of-file errors are many kinds
        raise TaskvecError(
            f"'{path}' cannot be read: {str(error).splitlines()[0]}", "convert it to safetensors"
        ) from None
    for key in ("state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TaskvecError(f"'{path}' is not a dictionary of tensors", "save the model's state_dict() as safetensors")
    return state


@dataclass(frozen=True)
class Loaded:
    """What a loader finds: the architecture, and how to get the preprocessing and the weights for its module."""

    architecture: dict[str, Any]
    preprocessing: Callable[[nn.Module], Preprocessing]
    state: Callable[[nn.Module], dict[str, Tensor] | None]


def load_lab(name: str, file: Path | None, size: int | None) -> Loaded:
    """Find one of the lab's encoders, in the package or in a file; ``random`` keeps its seeded random weights.

    ``NAME@STEP`` is pre-trained again up to that step of its run.
    """
    base, step = encoders.split_step(name)
    path = file or encoders.path(base)
    options = encoders.options(base) | ({"size": size} if size else {})

    def state(_: nn.Module) -> dict[str, Tensor] | None:
        if step is None:
            return read_checkpoint(path) if path is not None else None
        from taskvec.lab.pretrain import snapshot

        return dict(snapshot(base, step).state_dict())

    return Loaded({"family": "lab", "options": options}, lambda _: Preprocessing(size=options["size"]), state)


def load_timm(name: str, file: Path | None, size: int | None) -> Loaded:
    """Find a timm encoder without its classifier, in a file or in timm's own pre-trained weights."""
    check_timm(name)
    pixels = size or own_size(name)
    return Loaded(
        {"family": "timm", "options": {"name": name, "size": pixels}},
        lambda module: timm_preprocessing(module, pixels),
        lambda module: resample_timm(read_checkpoint(file) if file else download_timm(name), module),
    )


def check_timm(name: str) -> None:
    """Raise with the nearest names unless timm has the model, and the pre-training tag after its dot."""
    import timm

    model, _, tag = name.partition(".")
    if model not in timm.list_models():
        raise unknown("timm model", name, timm.list_models())
    if tag and name not in (tagged := timm.list_models(f"{model}.*", pretrained=True)):
        raise unknown("timm model", name, tagged)


def own_size(name: str) -> int:
    """Return the input size that a timm model was trained at, 224 where timm does not say."""
    import timm

    config = timm.get_pretrained_cfg(name)
    return int(config.input_size[-1]) if config else 224


def timm_preprocessing(module: nn.Module, size: int) -> Preprocessing:
    """Translate timm's data configuration of a model."""
    from timm.data.config import resolve_data_config

    config = resolve_data_config({"input_size": (3, size, size)}, model=module)
    mean, std = tuple(config["mean"]), tuple(config["std"])
    squash = config.get("crop_mode") == "squash"
    return Preprocessing(size, float(config["crop_pct"]), config["interpolation"], mean, std, squash)


def download_timm(name: str) -> dict[str, Tensor]:
    """Return timm's pre-trained weights of a model, downloaded or from the local cache."""
    import timm

    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # hub and network libraries raise their own many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TaskvecError(
            f"'timm:{name}' could not be downloaded: {reason}",
            f"with no network, give a local file: timm:{name}@FILE.safetensors",
        ) from None
    return dict(model.state_dict())


def resample_timm(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Let timm translate a checkpoint for the module: other key styles, position embeddings of another size.

    A file of another architecture may break timm's translation: it is returned as it is, for the strict check.
    """
    translate = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if translate is None:
        return state
    try:
        return dict(translate(dict(state), module))
    except (KeyError, AttributeError, RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return state


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """Make an encoder module with seeded random weights from its architecture record."""
    options = dict(architecture["options"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILDERS[architecture["family"]](options)


def build_lab(options: dict[str, Any]) -> nn.Module:
    """Make the lab's small ViT."""
    from taskvec.lab.vit import VisionTransformer

    try:
        return VisionTransformer(**options)
    except ValueError as error:
        raise TaskvecError(
            f"the lab's encoder cannot be made for {options['size']} px: {error}", "choose a multiple of 8"
        ) from None


def build_timm(options: dict[str, Any]) -> nn.Module:
    """Make a timm model without classifier, at the input size where the architecture has one."""
    import timm

    name, size = options["name"], options["size"]
    try:
        module: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, img_size=size)
    except TypeError:  # convolutional networks have no input size of their own
        module = timm.create_model(name, pretrained=False, num_classes=0)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise TaskvecError(
            f"timm's '{name}' cannot be made for {size} px: {error}", f"choose another size{patch_hint(name)}"
        ) from None
    return module


def patch_hint(name: str) -> str:
    """Say which sizes fit where the name tells the patch size."""
    part = name.partition("patch")[2]
    digits = "".join(c for c in part[:2] if c.isdigit())
    return f", a multiple of {digits}" if digits else ""


LOADERS: dict[str, Callable[[str, Path | None, int | None], Loaded]] = {"lab": load_lab, "timm": load_timm}
BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {"lab": build_lab, "timm": build_timm}
