"""CLIP models of open_clip: the image tower, with its projection or without, and zero-shot heads by the text tower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from taskvec.core.errors import TaskvecError, did_you_mean, first_line, unknown
from taskvec.core.files import file_digest
from taskvec.core.notes import note
from taskvec.data.images import RESAMPLING, Preprocessing
from taskvec.encoders.addresses import is_file
from taskvec.encoders.loaders.checkpoints import find_file, read_checkpoint, separate, stripped
from taskvec.encoders.loaders.requests import (
    LARGEST,
    Family,
    Loaded,
    Request,
    State,
    Texts,
    check_affordable,
    check_bounds,
    check_view,
    import_extra,
    origin_of,
    read_object,
)
from taskvec.paper.checkpoints import CLIP
from taskvec.weights import hub
from taskvec.weights.flat import check_keys, read_keys, save_tensors
from taskvec.weights.hub import asked_once
from taskvec.weights.keys import TEXTS, unwrapped

FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""What open_clip's weights are called in a folder, or a repository of the hub."""
CONFIG = "open_clip_config.json"
VISUAL = "visual."
OTHER_SIZE = "choose another size"
SHAPE = ("width", "layers", "patch_size", "head_width", "timm_model_name", "timm_proj")
UNSAID = {"width": 768, "layers": 12, "patch_size": 16, "head_width": 64, "timm_proj": "linear"}
"""What tells the image tower of one model from that of another, and what open_clip takes where nothing is said."""


def package(address: str) -> ModuleType:
    """Import open_clip, or name the extra that brings it."""
    return import_extra("open_clip", "open_clip_torch", "clip", address)


def load(request: Request) -> Loaded:
    """Find an image tower by open_clip's name of the model, with weights by tag or from a file."""
    config, tag = model_config(request), tag_config(request)
    vision = vision_of(request, config, tag)
    pixels = request.size or int(tag.get("image_size") or config["vision_cfg"].get("image_size", 224))
    path, repo = find(request)
    if not tag and not request.hub and request.row is None:
        note(f"'{request.address}': nothing says how it sees images: taking CLIP's mean and std")
    options = {
        "model": request.name,
        "size": pixels,
        "quick_gelu": bool(tag.get("quick_gelu", config.get("quick_gelu", False))),
        "projection": request.projection is not False,
    } | ({"vision": vision} if vision else {})
    check_affordable(lambda: build(options), [path], f"'{request.address}'")
    return Loaded(
        {"family": "open_clip", "options": options},
        lambda _: preprocessing(tag, pixels),
        lambda module: state_for(module, path, request.key),
        lambda: origin_of(path, repo),
    )


def model_config(request: Request) -> dict[str, Any]:
    """Return open_clip's description of a model, or raise with the nearest names and its tags."""
    open_clip = package(request.address)
    known = open_clip.list_models()
    if request.name not in known:
        raise unknown("open_clip model", request.name, known)
    tags = open_clip.list_pretrained_tags_by_model(request.name)
    if not request.file and not request.hub:
        raise TaskvecError(
            f"'{request.address}' names no weights", f"give a file after the @, or one of the tags {', '.join(tags)}"
        )
    if request.file and not is_file(request.file) and not tag_config(request):
        raise TaskvecError(
            f"open_clip has no weights '{request.file}' of '{request.name}'", f"{did_you_mean(request.file, tags)}"
        )
    config: dict[str, Any] = open_clip.get_model_config(request.name)
    return config


def vision_of(request: Request, config: dict[str, Any], tag: dict[str, Any]) -> dict[str, Any]:
    """Return the image tower that a folder's own configuration describes, where it is not the name's to the letter.

    The folder decides on what no name says (norms, activations, pooling); a tower of another shape raises.
    """
    model = tag.get("model_cfg", {})
    vision, named = dict(model.get("vision_cfg") or {}), config["vision_cfg"]
    if not vision:
        return {}
    other = [key for key in SHAPE if vision.get(key, UNSAID.get(key)) != named.get(key, UNSAID.get(key))]
    if model.get("embed_dim", config["embed_dim"]) != config["embed_dim"]:
        other.append("embed_dim")
    if config.get("quick_gelu") and not model.get("quick_gelu"):
        other.append("quick_gelu")
    if other:
        raise TaskvecError(
            f"'{request.address}': {CONFIG} beside the weights is of another model than '{request.name}' "
            f"({', '.join(other)})",
            "name the model that it is of",
        )
    return vision if vision != named else {}


def tag_config(request: Request) -> dict[str, Any]:
    """Return what open_clip knows of a tag: where its weights are and how they see images; of a file, what lies by it.

    open_clip keeps weights beside a configuration that says how they see images, and whether they have quick GELUs.
    """
    if not request.file:
        return {}
    if is_file(request.file):
        return configured(beside(request.file)) or published(request)
    published_config: dict[str, Any] = package(request.address).get_pretrained_cfg(request.name, request.file)
    return published_config


def beside(file: str) -> Path | None:
    """Return the configuration that open_clip writes beside weights of its own names, where there is one."""
    path = Path(file).expanduser()
    config = (path if path.is_dir() else path.parent) / CONFIG
    return config if config.is_file() and (path.is_dir() or path.name in FILES) else None


def configured(config: Path | None) -> dict[str, Any]:
    """Return what a configuration says as ``tag_config`` says it; nothing where there is none."""
    if config is None:
        return {}
    fix = "copy it again, or take it away and say size: in the study"
    about = read_object(config)
    model, seen = about.get("model_cfg"), about.get("preprocess_cfg", {})
    if not isinstance(model, dict) or not isinstance(seen, dict):
        raise TaskvecError(f"'{config}' has no model_cfg and preprocess_cfg", fix)
    vision = model.get("vision_cfg") or {}
    if not isinstance(vision, dict):
        raise TaskvecError(f"'{config}': vision_cfg is '{vision}'", fix)
    check_bounds(vision, f"'{config}'")
    size = vision.get("image_size") or seen.get("size")  # the first goes before, as in open_clip
    sides = set(size if isinstance(size, list) else [size] if size else [])
    if not all(isinstance(side, int) and 0 < side <= LARGEST for side in sides):
        raise TaskvecError(f"'{config}': '{size}' is no size in pixels", fix)
    if len(sides) > 1:
        raise TaskvecError(f"'{config}': images of {size} px are not square", fix)
    check_seen(seen, str(config), fix)
    view = {"image_size": max(sides, default=None), "quick_gelu": bool(model.get("quick_gelu")), "model_cfg": model}
    return seen | {key: value for key, value in view.items() if value is not None}


def check_seen(seen: dict[str, Any], source: str, fix: str) -> None:
    """Raise for a way to see images that is not known here."""
    for name, known in (("interpolation", RESAMPLING), ("resize_mode", ("shortest", "squash"))):
        if name in seen and str(seen[name]) not in known:
            raise TaskvecError(f"'{source}': {name} is '{seen[name]}', known are {', '.join(known)}", fix)
    for name in ("mean", "std"):
        if name in seen and not is_triple(seen[name]):
            raise TaskvecError(f"'{source}': {name} is '{seen[name]}', not three numbers", fix)
    check_view(preprocessing(seen, 224), f"'{source}'")


def is_triple(value: Any) -> bool:
    """Say whether a value is a number for red, green and blue."""
    return (
        isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(number, int | float) for number in value)
    )


def published(request: Request) -> dict[str, Any]:
    """Return how all published weights of a model see images, where they agree; else nothing."""
    open_clip = package(request.address)
    tags = open_clip.list_pretrained_tags_by_model(request.name)
    every = [open_clip.get_pretrained_cfg(request.name, tag) for tag in tags]
    ways = [{key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in tag} for tag in every]
    return ways[0] if ways and all(way == ways[0] for way in ways) else {}


def places(request: Request) -> tuple[str, tuple[str, ...]]:
    """Return the hub's repository of the weights, and what the file may be called there, best first."""
    if request.hub:
        return request.hub[0], (request.hub[1],)
    model_config(request)
    repo, _, file = tag_config(request)["hf_hub"].rpartition("/")
    return repo, (f"{Path(file).stem}.safetensors", file) if file else FILES


def find(request: Request) -> tuple[Path, str]:
    """Return the weights file, and the hub's repository that it is of (empty for a local file)."""
    if request.file and is_file(request.file):
        return find_file(request.file, FILES, request.allow_pickle), ""
    repo, files = places(request)
    name = request.address if request.hub else f"open_clip:{request.name}"
    instead = f"with no network, give a local file: {name}@FILE.safetensors"
    return hub.fetch(repo, files, request.allow_pickle, request.address, instead), repo


def held(request: Request) -> Path | None:
    """Return the weights file where it is on this machine, given or cached."""
    if request.file and is_file(request.file):
        return find_file(request.file, FILES, request.allow_pickle)
    return hub.first_cached(*places(request))


def identify(request: Request) -> dict[str, Any]:
    """Return the digest of the weights, where they are on this machine."""
    package(request.address)
    path = held(request)
    about = {}
    if request.file and is_file(request.file) and (config := beside(request.file)):
        about["config"] = file_digest(config)
    return about | ({"content": file_digest(path)} if path else {})


def missing(request: Request) -> str:
    """Say what would have to be downloaded."""
    if held(request) is not None:
        return ""
    repo, files = places(request)
    return f"{repo}/{files[0]}"


def preprocessing(tag: dict[str, Any], size: int) -> Preprocessing:
    """Return how the weights want to see images: by their tag or configuration, or as CLIP does."""
    mean, std = (tuple(tag.get(name, default)) for name, default in zip(("mean", "std"), CLIP, strict=True))
    squash = tag.get("resize_mode") == "squash"
    return Preprocessing(size, 1.0, tag.get("interpolation", "bicubic"), mean, std, squash)


def state_for(module: nn.Module, path: Path, part: str = "") -> State:
    """Take the image tower out of a checkpoint, its position embeddings resampled by open_clip."""
    from open_clip.model import resize_pos_embed

    reading = read_checkpoint(path, {VISUAL + key: value for key, value in module.state_dict().items()}, part)
    raw = reading.tensors
    if VISUAL + "positional_embedding" in raw and hasattr(module, "grid_size"):
        raw[VISUAL + "positional_embedding"] = raw[VISUAL + "positional_embedding"].float()  # half cannot be resampled
        try:
            resize_pos_embed(raw, SimpleNamespace(visual=module))
        except RuntimeError as error:
            raise TaskvecError(
                f"'{path}': its positions cannot be resampled: {first_line(error)}", OTHER_SIZE
            ) from None
    wanted = {VISUAL + key: tuple(value.shape) for key, value in module.state_dict().items()}
    prefixes = (*TEXTS, VISUAL + "proj") if getattr(module, "proj", None) is None else TEXTS
    tensors, excluded = separate(raw, wanted, prefixes)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    check_keys(shapes, wanted, f"'{path}'", "give a checkpoint of that model of open_clip")
    return State({key.removeprefix(VISUAL): value for key, value in tensors.items()}, (*excluded, *reading.unused))


def build(options: dict[str, Any]) -> nn.Module:
    """Make an image tower alone, at an input size, with its projection or without."""
    address = f"open_clip:{options['model']}"
    open_clip = package(address)
    config = open_clip.get_model_config(options["model"])
    vision = options.get("vision", config["vision_cfg"]) | {"image_size": options["size"]}
    try:
        tower: nn.Module = open_clip.model._build_vision_tower(config["embed_dim"], vision, options["quick_gelu"])
    except Exception as error:  # of many kinds, where a folder's configuration says odd things
        raise TaskvecError(
            f"'{address}' cannot be made for {options['size']} px: {first_line(error)}", OTHER_SIZE
        ) from None
    setattr(tower, "output_tokens", False)  # noqa: B010 - CoCa's would give the tokens beside the feature
    if not options["projection"]:
        if not isinstance(getattr(tower, "proj", None), nn.Parameter):
            raise TaskvecError(f"the projection of '{address}' cannot be taken off", "leave out projection: false")
        tower.register_parameter("proj", None)
    return tower


def has_text(request: Request) -> bool:
    """Say whether zero-shot heads can be built: with the projection, and not from a file of the image tower alone."""
    path = held(request) if request.projection is not False else None
    if path is None or path.suffix != ".safetensors":
        return request.projection is not False
    tails = (tail for key in read_keys(path) for tail in (key, key.partition(".")[2]))
    return any(tail.startswith(("text.", "token_embedding.")) for tail in tails)


def identify_text(request: Request) -> str:
    """Return the digest of the weights, which are those of the text tower too."""
    return str(identify(request).get("content", ""))


@contextlib.contextmanager
def plain(path: Path, part: str) -> Iterator[Path]:
    """Give a file that open_clip itself can read: the same, or a copy for the moment whose keys have no wrappers."""
    state = stripped(read_checkpoint(path, key=part).tensors)
    bare = {name: state[key] for key, name in unwrapped(state).items()}
    if path.suffix == ".safetensors" and bare.keys() == set(read_keys(path)):
        yield path
        return
    with TemporaryDirectory() as folder:
        save_tensors({key: value.contiguous() for key, value in bare.items()}, Path(folder) / FILES[0])
        yield Path(folder) / FILES[0]


@torch.inference_mode()
def texts(request: Request, captions: Sequence[str]) -> Texts:
    """Return the features of captions by the whole model's text tower, and its logit scale."""
    open_clip = package(request.address)
    config, tag = model_config(request), tag_config(request)
    path, _ = find(request)
    gelu = bool(tag.get("quick_gelu", config.get("quick_gelu", False)))
    configs = {key: value for key, value in tag.get("model_cfg", {}).items() if key in ("vision_cfg", "text_cfg")}
    alone = not {"hf_model_name", "hf_tokenizer_name"} & set((config | configs)["text_cfg"])
    words = f"local-dir:{path.parent}" if "text_cfg" in configs else request.name
    try:
        with asked_once(alone), plain(path, request.key) as file:
            model = open_clip.create_model(request.name, pretrained=None, force_quick_gelu=gelu, **configs).eval()
            open_clip.load_checkpoint(model, str(file))
            tokens = open_clip.get_tokenizer(words)(list(captions))
    except Exception as error:  # text towers of other libraries need files of their own, which may be missing
        raise TaskvecError(
            f"'{request.address}': its text tower cannot be made: {first_line(error)}", "leave out the open regimes"
        ) from None
    features: Tensor = torch.cat([model.encode_text(part, normalize=True) for part in tokens.split(256)])
    return features.float(), float(model.logit_scale.exp())


FAMILY = Family(("open_clip_torch", "timm"), load, build, identify, missing, has_text, identify_text, texts)
