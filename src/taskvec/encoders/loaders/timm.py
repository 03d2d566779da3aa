"""Encoders of timm: any classifier without its head, convolutional or transformer, from a file or timm's weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskvec.core.errors import TaskvecError, first_line, unknown
from taskvec.core.files import file_digest
from taskvec.core.notes import note
from taskvec.data.images import Preprocessing
from taskvec.encoders.loaders.checkpoints import Reading, find_file, read_checkpoint, separate
from taskvec.encoders.loaders.requests import (
    Family,
    Loaded,
    Outline,
    Request,
    State,
    check_affordable,
    check_bounds,
    check_view,
    no_projection,
    origin_of,
    read_object,
)
from taskvec.weights import hub
from taskvec.weights.keys import CLASSIFIERS, COUNTER, DECODERS, PROJECTORS

FILES = ("model.safetensors", "pytorch_model.bin")
"""What timm's weights are called in a repository of the hub."""
CONFIG = "config.json"
SEEN = ("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "global_pool")
"""What is taken of timm's ``pretrained_cfg``."""
VIEW = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
OURS = (
    "num_classes", "img_size", "in_chans", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path",
    "cache_dir", "features_only", "out_indices", "scriptable", "exportable", "no_jit", "device", "dtype",
)  # fmt: skip
"""Arguments of timm's models that are not taken from a configuration: they are given here, or make no encoder."""
TRANSLATORS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained", "pretrained_filter_fn")
"""What timm calls the functions that translate older checkpoints, in the modules of its architectures."""


def load(request: Request) -> Loaded:
    """Find a timm encoder without its classifier, in a file or in timm's own pre-trained weights."""
    architecture, view = outline(request)
    options = architecture["options"]
    path, repo = find(request)
    if "seen" in options:
        check_affordable(lambda: build(options), [path], f"'{beside(request)}'")
    elif request.file and request.row is None:
        tell_view(request)
    return Loaded(
        architecture,
        view,
        lambda module: state_for(module, read_checkpoint(path, module.state_dict(), request.key), options),
        lambda: origin_of(path, repo),
    )


def outline(request: Request) -> Outline:
    """Return the architecture of an encoder, and how its module sees images."""
    options = options_of(request)
    return {"family": "timm", "options": options}, lambda module: preprocessing(module, options["size"])


def options_of(request: Request) -> dict[str, Any]:
    """Return what ``build`` makes the encoder from: its name, and what the configuration beside its file says of it."""
    check_name(request.name)
    about = configured(request)
    trained_size = about["seen"]["input_size"][-1] if about else own_size(request.name)
    return {"name": request.name, "size": request.size or trained_size} | projection_options(request) | about


# ---------------------------------------------------------------- configurations


def beside(request: Request) -> Path | None:
    """Return the configuration that timm writes beside weights, where it is there."""
    path = Path(request.file).expanduser()
    config = (path if path.is_dir() else path.parent) / CONFIG
    return config if request.file and config.is_file() else None


def configured(request: Request) -> dict[str, Any]:
    """Return what a configuration beside a file says of its encoder, as timm itself reads it; nothing without one.

    These are the arguments that the model was made with, and how it sees images. A file of a name that timm does not
    give may be of another model than the configuration beside it.
    """
    config = beside(request)
    about = read_object(config) if config else {}
    named = Path(request.file).name in FILES or Path(request.file).expanduser().is_dir()
    if named and "architecture" not in about and "model_type" in about:
        folder = config.parent if config else ""
        raise TaskvecError(f"'{request.address}' is a folder of transformers", f"write hf:{folder}")
    model, wanted = str(about.get("architecture", "")).partition(".")[0], request.name.partition(".")[0]
    if named and model and model != wanted:
        raise TaskvecError(f"'{config}' is of '{model}', not of '{wanted}'", f"write timm:{model}@{request.file}")
    if config is None or model != wanted:
        return {}
    return translated(config, about)


def translated(config: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Let timm read a configuration, and check what it says."""
    from timm.models._hub import _parse_model_cfg
    from timm.models._pretrained import PretrainedCfg

    source = f"'{config}'"
    try:
        config_of_timm, _, given = _parse_model_cfg(about, {})
        seen = {name: value for name, value in config_of_timm.items() if name in SEEN}
        seen = {name: value for name, value in asdict(PretrainedCfg(**seen)).items() if name in SEEN}
        arguments = {name: value for name, value in dict(given or {}).items() if name not in OURS}
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise TaskvecError(
            f"{source} is no configuration of timm: {type(error).__name__}: {first_line(error)}", "copy it again"
        ) from None
    check_bounds({**arguments, "input_size": seen["input_size"]}, source)
    check_seen(seen, source)
    return {"seen": seen} | ({"arguments": arguments} if arguments else {})


def check_seen(seen: Mapping[str, Any], source: str) -> None:
    """Raise for a way to see images that is none, or one that is not square or not in colour."""
    size, share = seen["input_size"], seen["crop_pct"]
    whole = isinstance(size, list | tuple) and len(size) == 3 and all(isinstance(side, int) for side in size)
    if not whole or size[0] != 3 or size[1] != size[2]:
        raise TaskvecError(f"{source}: input_size is {size}, not [3, SIZE, SIZE]", "images must be square, in colour")
    if not isinstance(share, int | float) or not 0.1 <= share <= 10:
        raise TaskvecError(f"{source}: crop_pct is '{share}', not a share of an image", "mend it there")
    for name in ("mean", "std"):
        if not isinstance(seen[name], list | tuple):
            raise TaskvecError(f"{source}: {name} is '{seen[name]}', not three numbers", "mend it there")
    view = Preprocessing(size[1], min(share, 1), seen["interpolation"], tuple(seen["mean"]), tuple(seen["std"]))
    check_view(view, source)


def tell_view(request: Request) -> None:
    """Say so where nothing tells how a file's encoder sees images: timm's weights of its name see them unlike."""
    import timm

    model, _, tag = request.name.partition(".")
    taken = timm.get_pretrained_cfg(model)
    tagged = [] if tag or taken is None else timm.list_models(f"{model}.*", pretrained=True)
    views = {name: [getattr(timm.get_pretrained_cfg(name), key) for key in VIEW] for name in tagged}
    others = [name for name, view in views.items() if view != [getattr(taken, key) for key in VIEW]]
    if taken and others:
        note(
            f"'{request.address}': nothing says how it sees images: taking mean {list(taken.mean)}, std "
            f"{list(taken.std)} and crop {taken.crop_pct}, as timm:{model} has by default; timm:{others[0]}@... sees "
            "them otherwise"
        )


# ---------------------------------------------------------------- weights


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
        about = {"content": file_digest(find_file(request.file, FILES, request.allow_pickle))}
        config = beside(request)
        return about | ({"config": file_digest(config)} if config else {})
    weights = hub.first_cached(repository(request), readable(request))
    return {"content": file_digest(weights)} if weights else {}


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


def state_for(module: nn.Module, reading: Reading, options: Mapping[str, Any]) -> State:
    """Translate a checkpoint for the module and leave out its classifier, or the decoder of masked pre-training."""
    translated, unused = translate(reading.tensors, module)
    wanted = module.state_dict().keys()
    tensors, excluded = separate(translated, wanted, (*CLASSIFIERS, *DECODERS, *PROJECTORS))
    if set(tensors) - set(wanted):
        tensors, more = separate(tensors, wanted, heads_of(options, module))
        excluded = (*excluded, *more)
    return State(tensors, tuple(dict.fromkeys((*unused, *excluded, *reading.unused))))


def heads_of(options: Mapping[str, Any], module: nn.Module) -> tuple[str, ...]:
    """Return the keys of what timm's whole model has and the module, made without classifier, has not."""
    with torch.device("meta"):
        whole = made(options, 1000)
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
            translated = call(translator, leaves, module)
    except (KeyError, AttributeError, RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return raw, ()
    made_of = {key: sources(value) for key, value in translated.items()}
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d) and (key := f"{name}.weight") in translated:
            translated[key] = next((leaf for leaf in made_of[key] if is_other(leaf, part.kernel_size)), translated[key])
    used = {id(leaf) for leaves_of in made_of.values() for leaf in leaves_of}
    unused = tuple(key for key, leaf in leaves.items() if id(leaf) not in used and key not in translated)
    return {key: value.detach() for key, value in translated.items()}, unused


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
    leaves, seen, waiting = [tensor], set[Any](), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return leaves


def build(options: dict[str, Any]) -> nn.Module:
    """Make a timm model without classifier, at the input size where the architecture has one."""
    return made(options, options.get("projection", 0))


def made(options: Mapping[str, Any], outputs: int) -> nn.Module:
    """Make a timm model with a classifier of so many outputs, or without one."""
    import timm

    name, size = options["name"], options["size"]
    if not timm.is_model(name):  # which may also be an address of a hub or a folder to timm
        raise unknown("timm model", name, timm.list_models())
    given: dict[str, Any] = {"num_classes": outputs, **options.get("arguments", {})}
    if "seen" in options:
        given["pretrained_cfg"] = options["seen"]
    try:
        try:
            return timm.create_model(name, pretrained=False, img_size=size, **given)
        except TypeError:  # convolutional networks have no input size of their own
            return timm.create_model(name, pretrained=False, **given)
    except Exception as error:  # of many kinds, where a configuration gives odd arguments
        fix = f"mend model_args in its {CONFIG}" if "arguments" in options else f"choose another size{patch_hint(name)}"
        raise TaskvecError(f"timm's '{name}' cannot be made for {size} px: {first_line(error)}", fix) from None


def classifier(request: Request, options: Mapping[str, Any], outputs: int) -> nn.Module | None:
    """Make timm's own classifier of a fine-tuned file, by what lies beside it; None where timm's has other tensors."""
    whole = made({**options, **configured(request)}, outputs)
    tensors, _ = translate(read_checkpoint(Path(request.file), whole.state_dict(), request.key).tensors, whole)
    wanted = {key: value.shape for key, value in whole.state_dict().items()}
    held = {key: value for key, value in tensors.items() if key in wanted and value.shape == wanted[key]}
    if any(key not in held and not key.endswith(COUNTER) for key in wanted):
        return None
    whole.load_state_dict(held, strict=False)  # batch norm's counters may be missing
    return whole


def patch_hint(name: str) -> str:
    """Say which sizes fit where the name tells the patch size."""
    part = name.partition("patch")[2]
    digits = "".join(c for c in part[:2] if c.isdigit())
    return f", a multiple of {digits}" if digits else ""


FAMILY = Family(("timm",), load, build, identify, missing, classifier=classifier, outline=outline)
