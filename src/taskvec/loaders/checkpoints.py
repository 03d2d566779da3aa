"""Checkpoint files: where a name after the @ points, how files are read, and what is left out of them on purpose."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskvec.addresses import WEIGHT_SUFFIXES
from taskvec.errors import TaskvecError
from taskvec.notes import note
from taskvec.weights import read

CLASSIFIERS = ("head.", "fc.", "classifier.", "head_dist.", "last_linear.")
"""Key prefixes of heads that a file of an encoder may hold and that are dropped on purpose."""
DECODERS = ("decoder.", "decoder_", "mask_token")
"""Key prefixes of what masked pre-training reads an encoder with."""
TEXTS = (
    "text.", "text_decoder.", "text_model.", "text_projection", "transformer.", "token_embedding.",
    "positional_embedding", "ln_final.", "logit_scale", "logit_bias",
)  # fmt: skip
"""Key prefixes of a CLIP model's text tower, and of what joins it to the image tower."""
WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before the keys of a model."""
AVERAGED = "n_averaged"
"""What torch's AveragedModel counts in."""
MEMBERS = ("model.", "net.", "network.", "backbone.", "encoder.")
"""What classes of training scripts call the encoder that they hold."""
COUNTER = "num_batches_tracked"
"""How the keys of batch norm's counters end, which older files lack."""
PARTS = {"a classifier": CLASSIFIERS, "a decoder": DECODERS, "a text tower": TEXTS, "a pooler": ("pooler.",)}


def separate(
    state: Mapping[str, Tensor], wanted: Collection[str], prefixes: tuple[str, ...]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Split off the tensors that are not wanted and whose keys begin with one of ``prefixes``; return their keys too.

    Other tensors that are not wanted stay, so that the strict check names them.
    """
    dropped = tuple(key for key in state if key not in wanted and key.startswith(prefixes))
    return {key: value for key, value in state.items() if key not in dropped}, dropped


def parts(keys: Iterable[str], most: int = 3) -> str:
    """Say how many tensors of which parts ``keys`` are, such as ``2 tensors of a classifier (head.bias, ...)``."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(part_of(key), []).append(key)
    return ", ".join(f"{len(held)} tensors of {part} ({', '.join(held[:most])})" for part, held in groups.items())


def part_of(key: str) -> str:
    """Name the part of a model that a tensor belongs to, by the beginning of its key or of what follows a dot."""
    tails = [key, *(key[place + 1 :] for place, sign in enumerate(key) if sign == ".")]
    for tail in tails:
        for part, prefixes in PARTS.items():
            if tail.startswith(prefixes):
                return part
    return "what the encoder does not use"


def find_file(given: str, names: Sequence[str], allow_pickle: bool) -> Path:
    """Return the weights file that is given, or the first of ``names`` in the folder that is given.

    A missing file, or a pickle not asked for, is an error with the fix.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        return check_file(given, allow_pickle)
    held = [path / name for name in names if (path / name).is_file()]
    if not held:
        raise TaskvecError(f"folder '{path}' holds none of {', '.join(names)}", "give the path of the weights file")
    return check_file(str(held[0]), allow_pickle)


def check_file(given: str, allow_pickle: bool) -> Path:
    """Return the path of a weights file; a missing file, or a pickle not asked for, is an error with the fix."""
    path = Path(given).expanduser()
    if path.suffix not in WEIGHT_SUFFIXES and "/" not in given:
        raise TaskvecError(
            f"'@{given}' is not a file: it has neither a folder nor a suffix such as .safetensors", "give a path"
        )
    if not path.is_file():
        raise TaskvecError(f"no weights file at '{path}'", "give the path of a .safetensors file after the @")
    check_pickle(path, allow_pickle)
    return path


def check_pickle(file: Path | str, allow_pickle: bool) -> None:
    """Raise unless a file is safetensors, or pickles were allowed."""
    if Path(file).suffix != ".safetensors" and not allow_pickle:
        raise TaskvecError(
            f"'{file}' is not a .safetensors file; pickled checkpoints can run code when loaded",
            "convert it to safetensors, or set allow_pickle: true (it is then read with weights_only=True)",
        )


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or a pickle with ``weights_only=True``, whose tensors may be one level down.

    Prefixes that compiling and several GPUs put before all keys (``WRAPPERS``) are taken off, and the counter that a
    moving average has beside them.
    """
    state = read(path) if path.suffix == ".safetensors" else read_pickle(path)
    wrapped = {key: value for key, value in state.items() if key != AVERAGED}
    bare = stripped(wrapped, (), WRAPPERS)
    return bare if bare.keys() != wrapped.keys() else state


def stripped(
    state: dict[str, Tensor], wanted: Collection[str], prefixes: Sequence[str] = (*WRAPPERS, *MEMBERS)
) -> dict[str, Tensor]:
    """Take off a prefix that no wanted key has and all keys have, or under which every wanted key is; else nothing.

    A training class that holds its encoder as ``backbone`` beside a ``head`` is read so. Keys never come to coincide.
    """
    for prefix in prefixes:
        shared = all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in wanted)
        inside = bool(wanted) and all(prefix + key in state for key in wanted if not key.endswith(COUNTER))
        bare = {key.removeprefix(prefix): value for key, value in state.items()}
        if state and (shared or inside) and len(bare) == len(state):
            return stripped(bare, wanted, prefixes)
    return state


def options_admitted() -> contextlib.AbstractContextManager[Any]:
    """Admit what timm, DeiT and MAE keep their options in beside weights; torch before 2.5 cannot be told to."""
    admitted = getattr(torch.serialization, "safe_globals", None)
    return contextlib.nullcontext() if admitted is None else admitted([argparse.Namespace])


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read a dictionary of tensors, or the one inside a training checkpoint, with ``weights_only=True``."""
    try:
        with options_admitted():
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and end-of-file errors are many kinds
        why = re.search(r"Unsupported (?:global|class|operand)[^\n]*|GLOBAL \S+ was not an allowed", str(error))
        said = why.group() if why else first_line(error)
        raise TaskvecError(
            f"'{path}' cannot be read with weights_only=True: {said}", "save the model's state_dict() as safetensors"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            if averaged := [name for name in state if "ema" in str(name).lower() and isinstance(state[name], dict)]:
                note(f"'{path}': took '{key}', not '{averaged[0]}' (moving average) beside it")
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TaskvecError(f"'{path}' is not a dictionary of tensors", "save the model's state_dict() as safetensors")
    return state


def first_line(error: BaseException) -> str:
    """Return the first line that an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
