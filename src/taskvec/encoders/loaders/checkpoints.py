"""Checkpoint files: where a name after the @ points, how files are read, and what is excluded of them."""

from __future__ import annotations

import argparse
import contextlib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskvec.core.errors import TaskvecError, did_you_mean, first_line
from taskvec.core.notes import note
from taskvec.weights.flat import check_kinds, read
from taskvec.weights.formats import WEIGHT_SUFFIXES, format_of, is_safetensors, refuse_pickle
from taskvec.weights.keys import AVERAGED, CLASSIFIERS, COUNTER, WRAPPERS, prefixes, unwrapped

MEMBERS = ("model.", "net.", "network.", "backbone.", "encoder.")
"""What classes of training scripts call the encoder that they hold."""
PREFERRED = (
    "state_dict", "model", "model_state_dict", "module", "net", "network", "teacher", "online_network",
    "online_encoder", "encoder_q", "base_encoder", "student",
)  # fmt: skip
"""What is taken first where several parts of a file fit, before others in the file's order."""
AVERAGES = re.compile(r"(.*_)?(ema|shadow|swa|averaged|average|momentum|target)(_.*|model)?|encoder_k")
"""Parts of names of moving averages, which are taken after the others."""
STATISTICS = re.compile(r"(.*_)?(grads?|gradients?|optim|optimizers?|fisher|exp_avg|exp_avg_sq|momentum_buffer)(_.*)?")
"""Parts of names of what has a model's names and shapes and is no model, which is taken last."""
DEPTH = 6
"""How many containers deep tensors are looked for."""


def separate(
    state: Mapping[str, Tensor], wanted: Collection[str], prefixes: tuple[str, ...]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Exclude the tensors that are not wanted and whose keys begin with one of ``prefixes``; return their keys too.

    Other tensors that are not wanted stay, so that the strict check names them.
    """
    excluded = {key: None for key in state if key not in wanted and key.startswith(prefixes)}
    return {key: value for key, value in state.items() if key not in excluded}, tuple(excluded)


def find_file(given: str, names: Sequence[str], allow_pickle: bool) -> Path:
    """Return the weights file that is given, or the first of ``names`` in the folder that is given.

    A missing file, or a pickle not asked for, is an error with the fix.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        return check_file(given, allow_pickle)
    files = [path / name for name in names if (path / name).is_file()]
    if not files and (others := [(file, told) for file in sorted(path.iterdir()) if (told := format_of(file.name))]):
        raise TaskvecError(f"folder '{path}' holds {others[0][1][0]} ('{others[0][0].name}')", others[0][1][1])
    if not files:
        raise TaskvecError(f"folder '{path}' holds none of {', '.join(names)}", "give the path of the weights file")
    return check_file(str(files[0]), allow_pickle)


def check_file(given: str, allow_pickle: bool) -> Path:
    """Return the path of a weights file; a missing file, or a pickle not asked for, is an error with the fix."""
    path = Path(given).expanduser()
    if not path.is_file() and path.suffix not in WEIGHT_SUFFIXES and "/" not in given:
        raise TaskvecError(
            f"'@{given}' is not a file: it has neither a folder nor a suffix such as .safetensors", "give a path"
        )
    if not path.is_file():
        raise TaskvecError(f"no weights file at '{path}'", "give the path of a .safetensors file after the @")
    refuse_pickle(path, allow_pickle)
    return path


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Reading:
    """What a file holds for an encoder: tensors by its names, and the names of those that are unused."""

    tensors: dict[str, Tensor]
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A part of a file: the names behind a prefix in a dictionary, and where that stands in its containers.

    The encoder has the prefix ``own`` in its place.
    """

    place: str
    state: Mapping[str, Tensor]
    prefix: str = ""
    own: str = ""

    @property
    def label(self) -> str:
        """What the part is called, such as ``teacher.backbone``."""
        return ".".join(part for part in (self.place, self.prefix[:-1]) if part)

    def misfits(self, wanted: Mapping[str, Tensor]) -> tuple[int, int]:
        """Count the keys of an encoder that are missing, but for counters, and those whose shape is not the same."""
        keys = [key for key in wanted if not key.endswith(COUNTER)]
        tensors = {key: self.state.get(self.prefix + key.removeprefix(self.own)) for key in keys}
        present = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        return len(keys) - len(present), sum(tensor.shape != wanted[key].shape for key, tensor in present.items())

    def rank(self) -> tuple[bool, bool, list[int]]:
        """Return what sorts the parts of a file: usual names first, then moving averages, then what is no model."""
        names = self.label.split(".") if self.label else []
        odd, averaged = (any(map(pattern.fullmatch, names)) for pattern in (STATISTICS, AVERAGES))
        return odd, averaged, [PREFERRED.index(name) if name in PREFERRED else len(PREFERRED) for name in names]

    def read(self) -> Reading:
        """Return the part's tensors by the encoder's names, a classifier beside it by its own, and the unused names.

        Names never come to coincide: one behind the prefix then keeps it.
        """
        outside = {name: beyond(name, self.prefix) for name in self.state if not name.startswith(self.prefix)}
        heads = {key: self.state[name] for name, key in outside.items() if key.startswith(CLASSIFIERS)}
        inside = {name: self.own + name[len(self.prefix) :] for name in self.state if name not in outside}
        encoder = {name if key in heads else key: self.state[name] for name, key in inside.items()}
        return Reading(encoder | heads, tuple(name for name, key in outside.items() if key not in heads))


def beyond(name: str, prefix: str) -> str:
    """Take off a name the parts that it has in common with the beginning of a prefix."""
    parts, common = name.split("."), prefix.split(".")
    while len(parts) > 1 and parts[0] == common[0]:
        parts, common = parts[1:], common[1:]
    return ".".join(parts)


def read_checkpoint(path: Path, wanted: Mapping[str, Tensor] | None = None, key: str = "") -> Reading:
    """Read the part of a file that holds ``wanted``: a dictionary in its containers, the names behind a prefix.

    What wrappers add to names is taken off. Of several parts that fit, ``key`` chooses by name, else ``PREFERRED``
    does and a note tells. Where most of what is wanted is nowhere, one of the largest dictionaries is read.
    """
    wanted = wanted or {}
    states = {"": read(path)} if is_safetensors(path) else dictionaries(read_weights_only(path))
    if not any(states.values()):
        raise TaskvecError(f"'{path}' is not a dictionary of tensors", "save the model's state_dict() as safetensors")
    parts = [part for place, state in states.items() for part in parts_of(place, state, wanted)]
    fewest = min(part.misfits(wanted) for part in parts)
    if not wanted or 2 * fewest[0] > len(wanted):
        most = max(map(len, states.values()))
        fitting = [bare(place, state, wanted) for place, state in states.items() if 2 * len(state) >= most or key]
    else:
        fitting = [part for part in parts if part.misfits(wanted) == fewest]
    chosen = choose(fitting, key, path)
    reading = chosen.read()
    check_kinds(reading.tensors, wanted, f"'{path}'")
    return reading


def dictionaries(content: Any) -> dict[str, dict[str, Tensor]]:
    """Return the dictionaries of tensors in nested containers, by the keys that lead to them, joined by dots."""
    states: dict[str, dict[str, Tensor]] = {}
    waiting, seen = [("", content, 0)], set[int]()
    for place, container, depth in waiting:
        if not isinstance(container, dict | list | tuple) or depth > DEPTH or id(container) in seen:
            continue
        seen.add(id(container))
        value = container if isinstance(container, dict) else dict(enumerate(container))
        tensors = {name: item for name, item in value.items() if isinstance(name, str) and isinstance(item, Tensor)}
        states |= {place: tensors} if tensors else {}
        waiting += [(f"{place}.{name}".lstrip("."), item, depth + 1) for name, item in value.items()]
    return states


def parts_of(place: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Iterator[Part]:
    """Yield the parts of a dictionary that may hold an encoder: behind each prefix that many names share."""
    names = unwrapped(state, wanted)
    tensors = {names[name]: tensor for name, tensor in state.items() if names[name].rpartition(".")[2] != AVERAGED}
    shared = prefixes(wanted, len(wanted))[-1]
    for prefix in prefixes(tensors, max(1, len(wanted) / 2)):
        yield Part(place, tensors, prefix)
        if shared and not prefix.endswith(shared):
            yield Part(place, tensors, prefix, shared)


def bare(place: str, state: Mapping[str, Tensor], wanted: Collection[str]) -> Part:
    """Return a dictionary as it is, but for what training classes, or wrappers alone, put before all its names."""
    counted = {name: tensor for name, tensor in state.items() if name != AVERAGED}
    tensors = stripped(counted, wanted, [f"{wrapper}." for wrapper in sorted(WRAPPERS)])
    if wanted:
        names = unwrapped(tensors, wanted)
        tensors = stripped({names[name]: tensor for name, tensor in tensors.items()}, wanted)
    return Part(place, tensors)


def stripped(
    state: Mapping[str, Tensor], wanted: Collection[str] = (), begins: Sequence[str] = MEMBERS
) -> dict[str, Tensor]:
    """Take off prefixes that all keys have and no wanted key has."""
    for prefix in begins:
        shared = all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in wanted)
        if state and shared:
            return stripped({key.removeprefix(prefix): value for key, value in state.items()}, wanted, begins)
    return dict(state)


def choose(parts: Sequence[Part], key: str, path: Path) -> Part:
    """Return the part of a file that is asked for by name, or else the first by ``Part.rank``, and tell which."""
    named = [part for part in parts if f".{key}." in f".{part.label}."] if key else parts
    if not named:
        raise TaskvecError(f"'{path}' has no part '{key}' that fits", did_you_mean(key, [p.label for p in parts]))
    chosen = min(named, key=Part.rank)
    others = [f"'{part.label}'" for part in named if part.label != chosen.label]
    if others:
        alternatives = f", not {' or '.join(others)}, which fit as well; FILE#NAME takes the part of that name"
        note(f"'{path}': took '{chosen.label}'{alternatives}")
    elif set(chosen.label.split(".")) - {"", "state_dict", *(member[:-1] for member in MEMBERS)}:
        note(f"'{path}': took '{chosen.label}'")
    return chosen


def options_admitted() -> contextlib.AbstractContextManager[Any]:
    """Admit what timm, DeiT and MAE keep their options in beside weights; torch before 2.5 cannot be told to."""
    admitted = getattr(torch.serialization, "safe_globals", None)
    return contextlib.nullcontext() if admitted is None else admitted([argparse.Namespace])


def read_weights_only(path: Path) -> Any:
    """Read what was pickled with ``weights_only=True``."""
    try:
        with warnings.catch_warnings(), options_admitted():
            warnings.simplefilter("ignore")  # timm, DeiT and MAE keep their options as a Namespace
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and end-of-file errors are many kinds
        why = re.search(r"Unsupported (?:global|class|operand)[^\n]*|GLOBAL \S+ was not an allowed", str(error))
        said = why.group() if why else first_line(error)
        raise TaskvecError(
            f"'{path}' cannot be read with weights_only=True: {said}", "save the model's state_dict() as safetensors"
        ) from None
