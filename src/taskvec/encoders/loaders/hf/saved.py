"""Folders that ``save_pretrained`` wrote, given or in the hub's cache: which files they hold, checked and digested."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from taskvec.core.errors import TaskvecError
from taskvec.core.files import file_digest, fingerprint
from taskvec.encoders.loaders.checkpoints import dictionaries, read_weights_only
from taskvec.encoders.loaders.hf import processors
from taskvec.encoders.loaders.requests import Request, read_object
from taskvec.weights import hub
from taskvec.weights.flat import COMPUTED, check_kinds, read, read_keys
from taskvec.weights.formats import refuse_pickle
from taskvec.weights.keys import BUFFERS, COUNTER, unwrapped
from taskvec.weights.reader import FLOATS, Checkpoint, read_index

CONFIG = "config.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def locate(request: Request) -> Path | None:
    """Return the folder of a model on this machine: the one given, or where the hub's cache holds the repository."""
    folder = Path(request.name).expanduser()
    if folder.is_file():
        folder = folder_of(folder)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file() and not (folder / CONFIG).is_file():
            raise TaskvecError(
                f"folder '{folder}' holds adapters such as LoRA, not a whole model",
                "merge them into their base first (peft: merge_and_unload()), and save_pretrained() that model",
            )
        if not (folder / CONFIG).is_file():
            raise TaskvecError(f"folder '{folder}' has no {CONFIG}", "give a folder that save_pretrained wrote")
        return folder
    if request.name.startswith(("/", ".", "~")) or request.name.count("/") != 1:
        raise TaskvecError(f"no folder at '{folder}'", "give a folder that save_pretrained wrote, or OWNER/NAME")
    config = hub.cached(request.name, CONFIG)
    return config.parent if config and is_whole(config.parent, request.allow_pickle) else None


def folder_of(file: Path) -> Path:
    """Return the folder of a weights file, which must be the one that transformers loads from there."""
    if is_folder(file.parent) and weights_in(file.parent) == file:
        return file.parent
    raise TaskvecError(
        f"'{file}' is not what transformers loads from its folder: it wants {CONFIG} and weights called {WEIGHTS[0]}",
        f"put it into a folder of its own as {WEIGHTS[0]}, beside its {CONFIG}, and give that folder",
    )


def is_whole(folder: Path, allow_pickle: bool = True) -> bool:
    """Say whether the hub's cache holds all that a model needs: weights, and how it wants to see images."""
    weights = weights_in(folder, allow_pickle)
    seen = any((folder / name).is_file() for name in processors.FILES)
    return seen and weights is not None and all(file.is_file() for file in shards(weights))


def is_folder(folder: Path) -> bool:
    """Say whether a folder holds a model of transformers: its configuration names a type of model."""
    return (folder / CONFIG).is_file() and "model_type" in read_config(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's configuration; one that is not a JSON object is an error with its path."""
    return read_object(folder / CONFIG)


def weight_names(folder: Path) -> tuple[str, ...]:
    """Return what a folder's weights may be called, best first; those that its configuration names go before all."""
    named = read_config(folder).get("transformers_weights")
    if named is None:
        return WEIGHTS
    if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise TaskvecError(
            f"'{folder / CONFIG}': transformers_weights is '{named}', not a name that ends in .safetensors or "
            ".safetensors.index.json",
            f"take it out, and call the weights {WEIGHTS[0]}",
        )
    inside(named, folder / CONFIG)
    return (named,)


def inside(name: Any, source: Path) -> Path:
    """Return the file that a configuration names, which must be one of its own folder."""
    path = Path(name) if isinstance(name, str) and "\0" not in name and len(name.encode()) < 256 else Path("..")
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise TaskvecError(f"'{source}' names '{name}', which is no file of its folder", "copy the whole folder again")
    return source.parent / path


def obtain(request: Request) -> Path:
    """Return the folder of a model, downloading what the hub's cache lacks."""
    folder = locate(request)
    if folder is not None:
        return folder
    repo, address = request.name, request.address
    instead = f"with no network, give a local folder: hf:FOLDER, with {CONFIG}, {processors.FILES[0]} and {WEIGHTS[0]}"
    config = hub.fetch(repo, (CONFIG,), True, address, instead)
    hub.fetch(repo, processors.FILES, True, address, instead)
    for name in TOKENIZER if read_config(config.parent).get("model_type") == "clip" else ():
        if hub.cached(repo, name) is None and hub.exists(repo, name, address, instead):
            hub.download(repo, name, address, instead)
    for file in shards(hub.fetch(repo, weight_names(config.parent), request.allow_pickle, address, instead)):
        hub.fetch(repo, (file.name,), request.allow_pickle, address, instead)
    folder = locate(request)
    if folder is None:
        raise TaskvecError(f"'{repo}' was changed on the hub while it was downloaded", "run it again")
    return folder


def weights_in(folder: Path, allow_pickle: bool = True) -> Path | None:
    """Return the weights file of a folder, or the index of its parts; None where it has none that may be read."""
    names = [name for name in weight_names(folder) if allow_pickle or ".safetensors" in name]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def holds(files: Sequence[Path], prefix: str, config: dict[str, Any]) -> bool:
    """Say whether weights hold tensors of a part, by their keys, or of pickles by the class that wrote them."""
    if all(file.suffix == ".safetensors" for file in files):
        return any(key.startswith(prefix) for file in files for key in unwrapped(read_keys(file)).values())
    names = " ".join(architectures(config))
    return "CLIPModel" in names or (prefix == "visual_projection." and "WithProjection" in names)


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the library's classes that a configuration says its weights are of."""
    named = config.get("architectures")
    return [*map(str, named)] if isinstance(named, list) else []


def shards(weights: Path) -> list[Path]:
    """Return the files that hold the tensors."""
    if weights.suffix != ".json":
        return [weights]
    return sorted({weights.parent / name for name in read_index(weights)["weight_map"].values()})


def checked_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """Return the weights files of a folder; a missing or damaged one, or a pickle not asked for, is an error."""
    weights = weights_in(folder)
    if weights is None:
        raise TaskvecError(f"folder '{folder}' has no weights", f"it should hold {WEIGHTS[0]}")
    files = shards(weights)
    for file in files:
        refuse_pickle(file, allow_pickle)
        if not file.is_file():
            raise TaskvecError(f"'{weights}' names '{file.name}', which is missing", "copy the whole folder again")
        if file.suffix == ".safetensors":
            read_keys(file)
    return files


def bare_state(files: Sequence[Path]) -> dict[str, Tensor] | None:
    """Return the tensors of files by names without what wrappers add to them; None where these are plain."""
    if any(file.suffix != ".safetensors" for file in files):
        return None
    known = ["module.weight"]  # LeViT's names have that part
    names = unwrapped([name for file in files for name in read_keys(file)], known)
    if all(bare.startswith("module.") for bare in names.values()):
        names = {name: bare.removeprefix("module.") for name, bare in names.items()}
    if all(name == bare for name, bare in names.items()):
        return None
    return {names[name]: tensor for file in files for name, tensor in read(file).items()}


def check_types(files: Sequence[Path]) -> None:
    """Raise for tensors of files that are no weights, before the library casts them and gives them other names."""
    for file in files:
        if file.suffix == ".safetensors":
            with Checkpoint(file) as checkpoint:
                types = {name: stored.dtype for name, stored in checkpoint.tensors.items()}
        else:
            state = dictionaries(read_weights_only(file)).get("", {})
            check_kinds(state, {}, f"'{file}'")
            types = {name: "F32" if tensor.dtype in COMPUTED else str(tensor.dtype) for name, tensor in state.items()}
        for name, kind in types.items():
            if kind not in FLOATS and not name.endswith((*BUFFERS, COUNTER)):
                raise TaskvecError(
                    f"'{file}': tensor '{name}' is of type {kind}, which is none of weights",
                    "give the weights in floating-point numbers; of a quantised model those before that",
                )


def digest(folder: Path, allow_pickle: bool, more: Sequence[str] = ()) -> str:
    """Return a digest of everything in a folder that decides a model's features."""
    names = (CONFIG, *processors.FILES, *weight_names(folder), *more)
    files = [*(folder / name for name in names if ".json" in name), *checked_files(folder, allow_pickle)]
    return fingerprint({str(file.relative_to(folder)): file_digest(file) for file in files if file.is_file()})


def content(files: Sequence[Path]) -> str:
    """Return the SHA-256 of a weights file; of several, that of their SHA-256s in hexadecimal, one after the other."""
    digests = [file_digest(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
