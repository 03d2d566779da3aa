"""Backbones: pre-trained encoders from timm and the lab, with their feature width and preprocessing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from taskvec.compute import choose_device
from taskvec.errors import TaskvecError, did_you_mean, unknown
from taskvec.images import Preprocessing, normalise
from taskvec.store import file_digest, read_json, write_json
from taskvec.training import Progress, no_progress
from taskvec.weights import Weights, align, bind, read, save

CLASSIFIERS = ("head.", "fc.", "classifier.", "head_dist.", "last_linear.")
"""Key prefixes of heads that a file of an encoder may hold and that are dropped on purpose."""
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


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


def split_step(name: str) -> tuple[str, int | None]:
    """Split ``NAME@STEP`` of a lab encoder along its pre-training; without a step it is the finished one."""
    base, at, step = name.partition("@")
    if at and not step.isdecimal():
        raise TaskvecError(
            f"'@{step}' in 'lab:{name}' is neither a step nor a file", "for example lab:supervised@500, or give a path"
        )
    return base, int(step) if at else None


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
        from taskvec.lab import encoders

        path = encoders.path(split_step(name)[0])
        about["content"] = file_digest(path) if path else None
    return about


def has_text(address: str) -> bool:
    """Say whether a backbone comes with a text tower, from which zero-shot heads can be built."""
    kind, name, file = parse(address)
    if kind != "lab" or file or split_step(name)[1] is not None:
        return False
    from taskvec.lab import encoders

    return encoders.has_text(name)


def describe_text(address: str) -> str:
    """Return the digest of a backbone's text tower, for a fingerprint."""
    from taskvec.lab import encoders

    path = encoders.text_path(parse(address)[1])
    return file_digest(path) if path else ""


def is_file(after: str) -> bool:
    """Say whether what follows the @ of an address is a file: it has a path separator or a weight suffix."""
    return "/" in after or Path(after).suffix in WEIGHT_SUFFIXES


def load_cost(address: str) -> float:
    """Estimate the cost of loading a backbone in forward passes: much where a snapshot has to be trained."""
    kind, name, _ = parse(address)
    return 10.0 + 200.0 * (split_step(name)[1] or 0) if kind == "lab" else 10.0


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
    from taskvec.lab import encoders

    base, step = split_step(name)
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
