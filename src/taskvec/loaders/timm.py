"""Encoders of timm: any classifier without its head, convolutional or transformer, from a file or timm's weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskvec.errors import TaskvecError, unknown
from taskvec.images import Preprocessing
from taskvec.loaders import hub
from taskvec.loaders.checkpoints import CLASSIFIERS, DECODERS, PROJECTORS, Reading, find_file, read_checkpoint, separate
from taskvec.loaders.requests import Family, Loaded, Request, State, no_projection, origin_of
from taskvec.notes import note
from taskvec.store import file_digest

FILES = ("model.safetensors", "pytorch_model.bin")
"""What timm's weights are called in a repository of the hub."""
TRANSLATORS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained", "pretrained_filter_fn")
"""What timm calls the functions that translate older checkpoints, in the modules of its architectures."""


def load(request: Request) -> Loaded:
    """Find a timm encoder without its classifier, in a file or in timm's own pre-trained weights."""
    check_name(request.name)
    pixels = request.size or own_size(request.name)
    options: dict[str, Any] = {"name": request.name, "size": pixels}
    options |= projection_options(request)
    path, repo = find(request)
    return Loaded(
        {"family": "timm", "options": options},
        lambda module: preprocessing(module, pixels),
        lambda module: state_for(module, read_checkpoint(path, module.state_dict(), request.key), request.name),
        lambda: origin_of(path, repo),
    )


def find(request: Request) -> tuple[Path, str]:
    """Return the weights file, and the hub's repository that it is of (empty for a local file)."""
    if request.file:
        return find_file(request.file, FILES, request.allow_pickle), ""
    instead = f"with no network, give a local file: {request.address}@FILE.safetensors"
    repo = repository(request)
    return hub.fetch(repo, FILES, request.allow_pickle, request.address, instead), repo


def repository(request: Request) -> str:
    """Return the hub's repository of timm's weights for a model; where there are none, a file is needed."""
    import timm

    check_name(request.name)
    config = timm.get_pretrained_cfg(request.name)
    if config is None or not config.hf_hub_id:
        raise TaskvecError(
            f"timm has no weights of '{request.name}' on the hub", f"give a file: timm:{request.name}@FILE.safetensors"
        )
    return str(config.hf_hub_id)


def identify(request: Request) -> dict[str, Any]:
    """Return the digest of the weights, where they are on this machine."""
    if request.file:
        return {"content": file_digest(find_file(request.file, FILES, request.allow_pickle))}
    held = hub.first_cached(repository(request), readable(request))
    return {"content": file_digest(held)} if held else {}


def readable(request: Request) -> list[str]:
    """Return the files of a repository that may be read, best first."""
    return [name for name in FILES if request.allow_pickle or name.endswith(".safetensors")]


def missing(request: Request) -> str:
    """Say what would have to be downloaded."""
    repo = "" if request.file else repository(request)
    return f"{repo}/{FILES[0]}" if repo and hub.first_cached(repo, readable(request)) is None else ""


def check_name(name: str) -> None:
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


def projection_options(request: Request) -> dict[str, int]:
    """Return the width of a CLIP model's projection where it is asked for; timm has it in place of the classifier."""
    import timm

    if request.projection is None:
        return {}
    config = timm.get_pretrained_cfg(request.name)
    has_one = "clip" in request.name and config and config.num_classes and "_ft_" not in (config.tag or "")
    if not has_one:
        no_projection(request, "timm's model was not trained with texts, or was fine-tuned to classify since")
    return {"projection": int(config.num_classes)} if request.projection and config else {}


def preprocessing(module: nn.Module, size: int) -> Preprocessing:
    """Translate timm's data configuration of a model."""
    from timm.data.config import resolve_data_config

    config = resolve_data_config({"input_size": (3, size, size)}, model=module)
    mean, std = tuple(config["mean"]), tuple(config["std"])
    mode, crop = config.get("crop_mode"), float(config["crop_pct"])
    if mode == "border" or crop > 1:
        note("timm lays a border around this model's images; here their centre is cut, without one")
    return Preprocessing(size, min(crop, 1.0), config["interpolation"], mean, std, mode == "squash")


def state_for(module: nn.Module, found: Reading, name: str) -> State:
    """Translate a checkpoint for the module and leave out its classifier, or the decoder of masked pre-training."""
    tensors, unused = translate(found.tensors, module)
    wanted = module.state_dict().keys()
    kept, dropped = separate(tensors, wanted, (*CLASSIFIERS, *DECODERS, *PROJECTORS))
    if set(kept) - set(wanted):
        kept, more = separate(kept, wanted, heads_of(name, module))
        dropped = (*dropped, *more)
    return State(kept, tuple(dict.fromkeys((*unused, *dropped, *found.beside))))


def heads_of(name: str, module: nn.Module) -> tuple[str, ...]:
    """Return the keys of what timm's whole model has and the module, made without classifier, has not."""
    import timm

    with torch.device("meta"):
        whole = timm.create_model(name, pretrained=False)
    return tuple(key for key in whole.state_dict() if key not in module.state_dict())


def translate(raw: dict[str, Tensor], module: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Let timm translate a checkpoint for the module: other key styles, position embeddings of another size.

    Also returns the keys that went into nothing. A file of another architecture may break timm's translation: it is
    returned as it is, for the strict check, and so are kernels of another patch size, which timm would resample.
    """
    home = sys.modules[type(module).__module__]
    translator = next((getattr(home, name) for name in TRANSLATORS if hasattr(home, name)), None)
    if translator is None:
        return raw, ()
    leaves = {key: traced(value) for key, value in raw.items()}
    try:
        with torch.enable_grad():
            found = call(translator, leaves, module)
    except (KeyError, AttributeError, RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return raw, ()
    made_of = {key: sources(value) for key, value in found.items()}
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d) and (key := f"{name}.weight") in found:
            found[key] = next((leaf for leaf in made_of[key] if is_other(leaf, part.kernel_size)), found[key])
    used = {id(leaf) for leaves_of in made_of.values() for leaf in leaves_of}
    unused = tuple(key for key, leaf in leaves.items() if id(leaf) not in used and key not in found)
    return {key: value.detach() for key, value in found.items()}, unused


def is_other(leaf: Tensor, kernel: tuple[int, ...]) -> bool:
    """Say whether a tensor is a kernel of another size."""
    return leaf.ndim == 4 and tuple(leaf.shape[2:]) != tuple(kernel)


def call(translator: Callable[..., Any], state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Call a translator of timm, which takes the module or not."""
    takes_module = translator.__code__.co_argcount > 1
    return dict(translator(dict(state), module) if takes_module else translator(dict(state)))


def traced(tensor: Tensor) -> Tensor:
    """Return the tensor as a leaf of a graph, from which ``sources`` tells what it went into."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def sources(tensor: Tensor) -> list[Tensor]:
    """Return the leaves that a tensor was made of, by the graph that autograd keeps."""
    found, seen, waiting = [tensor], set[Any](), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return found


def build(options: dict[str, Any]) -> nn.Module:
    """Make a timm model without classifier, at the input size where the architecture has one."""
    import timm

    name, size, outputs = options["name"], options["size"], options.get("projection", 0)
    try:
        module: nn.Module = timm.create_model(name, pretrained=False, num_classes=outputs, img_size=size)
    except TypeError:  # convolutional networks have no input size of their own
        module = timm.create_model(name, pretrained=False, num_classes=outputs)
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


FAMILY = Family(load, identify, missing)
