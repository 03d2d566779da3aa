"""Checkpoints that a task brings: an encoder fine-tuned elsewhere, checked against its backbone, and a head for it.

The paper takes checkpoints "downloaded from online repositories" for its task vectors (appendix A).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.backbones import AROUND, Backbone
from taskvec.errors import TaskvecError, did_you_mean
from taskvec.heads import Head
from taskvec.kinds import CLASSIFICATION
from taskvec.loaders import FAMILIES
from taskvec.loaders.checkpoints import CLASSIFIERS, COUNTER, check_file, read_checkpoint, stripped
from taskvec.loaders.requests import Request
from taskvec.notes import note
from taskvec.store import read_json
from taskvec.tasks import Task
from taskvec.weights import Weights, align, read_metadata

NAMING = ("model.json", "config.json")
"""Files beside a checkpoint that may name the outputs of its head."""
FAR = 0.7
"""Length of a task vector, in lengths of the pre-trained weights, that speaks of another pre-training."""


@dataclass(frozen=True)
class Checkpoint:
    """An encoder that was fine-tuned elsewhere, its file, and the tensors of a classifier in it."""

    path: Path
    encoder: Weights
    classifier: Mapping[str, Tensor]


def given_file(path: Path, key: str, task: str, allow_pickle: bool) -> Path:
    """Return the file that a task's ``finetuned`` or ``head`` names, or raise if it is missing or a pickle."""
    if not path.is_file():
        raise TaskvecError(
            f"no file at '{path}', which task '{task}' names as {key}",
            "give a .safetensors file; relative paths start from the study file's folder",
        )
    return check_file(str(path), allow_pickle)


def read_finetuned(path: Path, backbone: Backbone, allow_pickle: bool = False) -> Checkpoint:
    """Read a fine-tuned encoder of a backbone: in the backbone's own keys, or in any that its kind of address reads.

    Every key and shape must be the backbone's, but for a classifier; one whose vector looks wrong is noted.
    """
    if path.name == "encoder.safetensors" and (path.parent / AROUND).exists():
        raise TaskvecError(f"'{path}' is of a linearised encoder", "bring the checkpoint of an ordinary one")
    source, wanted = f"'{path}'", backbone.pretrained.state()
    raw = stripped(read_checkpoint(path), wanted)
    classifier = {key: value for key, value in raw.items() if key not in wanted and key.startswith(CLASSIFIERS)}
    counters = {key: value for key, value in wanted.items() if key.endswith(COUNTER) and key not in raw}
    own = all(key in raw and raw[key].shape == value.shape for key, value in wanted.items() if key not in counters)
    own = own and not set(raw) - set(wanted) - set(classifier)
    state = raw if own else translate(path, backbone, allow_pickle)
    kept = {key: value for key, value in state.items() if key in wanted or not key.startswith(CLASSIFIERS)}
    encoder = align(counters | kept, backbone.pretrained, source)
    warn_of(encoder, backbone, source)
    return Checkpoint(path, encoder, classifier)


def translate(path: Path, backbone: Backbone, allow_pickle: bool) -> Mapping[str, Tensor]:
    """Read a file as if it were the backbone's own checkpoint: other key styles, positions of another input size.

    Weights of transformers need the config.json that lies beside them.
    """
    family, options = backbone.architecture["family"], backbone.architecture["options"]
    name = str(path) if family == "hf" else options.get("name") or options.get("model") or "random"
    projection = bool(options.get("projection")) or None
    asked = Request(f"{family}:{name}@{path}", family, name, str(path), options["size"], projection, allow_pickle)
    state = FAMILIES[family].load(asked).state(backbone.module)
    return state.tensors if state else {}


def warn_of(encoder: Weights, backbone: Backbone, source: str) -> None:
    """Note when a task vector is zero, or too long to come from this pre-training."""
    start = backbone.pretrained.flat
    length = float(torch.dist(encoder.flat, start) / start.norm())
    if length == 0:
        note(f"{source} is the pre-trained encoder itself: its task vector is zero")
    elif length > FAR:
        what = f"{length:.2f} times as long as the pre-trained weights"
        note(f"{source}: its task vector is {what}; was it fine-tuned from another checkpoint?")


def head_of(checkpoint: Checkpoint, given: Sequence[str], task: Task, width: int, start: Head | None) -> Head:
    """Return the classifier in a checkpoint as the task's head, or else the frozen head that its regime starts from.

    ``given`` are the names of its outputs in order, by default those that its file knows; without any head it raises.
    """
    found, source = dict(checkpoint.classifier), f"'{checkpoint.path}'"
    fix = "give its head: as a .safetensors file with weight and bias"
    if not found and start is not None:
        return start
    if not found:
        raise TaskvecError(f"{source} holds no head for task '{task.name}', and the regime has none", fix)
    weights = [key for key, value in found.items() if key.endswith("weight") and value.ndim == 2]
    if len(weights) != 1 or set(found) - layer(weights[0]):
        raise TaskvecError(f"{source}: {', '.join(sorted(found)[:6])} are not one linear layer", fix)
    names = given or class_names(checkpoint.path, task.name, len(found[weights[0]]))
    return fitted(found, weights[0], {}, names, task, width, source)


def layer(weight: str) -> set[str]:
    """Return the keys of a linear layer, from that of its weight."""
    return {weight, weight.removesuffix("weight") + "bias"}


def read_head(path: Path, given: Sequence[str], task: Task, width: int) -> Head:
    """Read a task's head from a file: ``weight`` and ``bias``, a classifier's ``NAME.weight``, or a model's heads.

    Of several heads the one with the task's name is taken. Its outputs are named by ``given``, or else by the file's
    metadata ``classes`` (JSON), the model.json or the config.json beside it, and brought into the order of the task's.
    """
    source, tensors = f"'{path}'", read_checkpoint(path)
    weights = [key for key in tensors if key.endswith("weight") and tensors[key].ndim == 2]
    named = f"{task.name}.weight"
    chosen = named if named in weights else weights[0] if len(weights) == 1 else None
    if chosen is None:
        several = [key.removesuffix("weight").rstrip(".") for key in weights]
        what = f"heads of {', '.join(several)}, none of them named '{task.name}'" if several else "no linear layer"
        raise TaskvecError(f"{source} holds {what}", did_you_mean(named, weights) if several else "give another head:")
    if len(weights) == 1 and (odd := sorted(set(tensors) - layer(chosen))):
        raise TaskvecError(f"{source} is not one linear layer: it holds {', '.join(odd[:3])}", "give another head:")
    label = chosen.removesuffix("weight").removesuffix(".")
    unusual = head_metadata(path).get("heads", {}).get(label, {})
    names = given or class_names(path, label, len(tensors[chosen]))
    return fitted(tensors, chosen, unusual, names, task, width, source)


def head_metadata(path: Path) -> dict[str, Any]:
    """Return what a head file says of its heads in its metadata, whose values are JSON."""
    found = read_metadata(path) if path.suffix == ".safetensors" else {}
    try:
        return {key: json.loads(found[key]) for key in ("heads", "classes") if key in found}
    except ValueError:
        raise TaskvecError(f"'{path}': its metadata are not JSON", "give classes: in the study file") from None


def class_names(path: Path, label: str, outputs: int) -> Sequence[str]:
    """Return the names of a head's outputs that its file knows, or a model.json or config.json beside it; else none."""
    known = head_metadata(path).get("classes", {})
    if isinstance(known, dict) and label not in known and (beside := path.with_name("model.json")).is_file():
        about = read_json(beside)  # of a kept model; another program's file of that name has other things in it
        told = about.get("tasks") if isinstance(about, dict) else None
        every = [task for task in told if isinstance(task, dict)] if isinstance(told, list) else []
        known = {task.get("name"): task.get("classes") or [] for task in every}
    names = known.get(label, []) if isinstance(known, dict) else known
    return [str(name) for name in names] or configured_names(path.with_name("config.json"), outputs)


def naming(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the files beside checkpoints and heads that may name their outputs."""
    beside = {f"{key}, {name}": path.with_name(name) for key, path in files.items() for name in NAMING}
    return {key: path for key, path in beside.items() if path.is_file()}


def configured_names(config: Path, outputs: int) -> list[str]:
    """Return the names of so many outputs in a config.json of transformers (``id2label``) or timm (``label_names``)."""
    about = read_json(config) if config.is_file() else {}
    found = (about.get("id2label") or about.get("label_names") or []) if isinstance(about, dict) else []
    numbered = isinstance(found, dict) and all(str(key).isdecimal() for key in found)
    names = [found[key] for key in sorted(found, key=int)] if numbered else found if isinstance(found, list) else []
    nameless = all(re.fullmatch(r"LABEL_\d+", str(name)) for name in names)
    return [] if nameless or len(names) != outputs else [str(name) for name in names]


def fitted(
    tensors: Mapping[str, Tensor],
    weight: str,
    unusual: Mapping[str, Any],
    names: Sequence[str],
    task: Task,
    width: int,
    source: str,
) -> Head:
    """Make a head out of a linear layer's tensors, with its outputs in the order of the task's classes."""
    rows = tensors[weight].float()
    bias = tensors.get(weight.removesuffix("weight") + "bias", torch.zeros(len(rows))).float()
    head = Head(rows, bias, **{"kind": task.kind, **unusual})
    if head.kind != task.kind:
        raise TaskvecError(f"{source} is a head for {head.kind}, and '{task.name}' is a task of {task.kind}", "swap it")
    check_shape(rows, bias, task, width, source)
    if not names and task.kind == CLASSIFICATION:
        note(f"{source} names no classes: its outputs are taken in the order of task '{task.name}'")
    return arranged(head, names or task.classes, task, source)


def check_shape(
    rows: Float[Tensor, "outputs width"], bias: Float[Tensor, " outputs"], task: Task, width: int, source: str
) -> None:
    """Raise unless a head reads as many features as the encoder gives and has as many outputs as the task."""
    outputs, wanted, what = len(rows), len(task.classes), "classes" if task.kind == CLASSIFICATION else "outputs"
    if tuple(rows.shape) == (width, wanted) and width != wanted:
        raise TaskvecError(f"{source}: the weight is [features, {what}]", "transpose it: torch keeps the outputs first")
    if rows.shape[1] != width:
        raise TaskvecError(
            f"{source} reads {rows.shape[1]} features, and the encoder gives {width}", "give the head of this encoder"
        )
    if bias.shape != rows.shape[:1]:
        raise TaskvecError(f"{source}: {len(rows)} outputs and {bias.numel()} biases", "give a linear layer's own bias")
    if outputs != wanted:
        raise TaskvecError(
            f"{source} has {outputs} outputs, and task '{task.name}' has {wanted} {what}",
            "give the head that goes with this task, or the task that it was trained on",
        )
    if not (rows.isfinite().all() and bias.isfinite().all()):
        raise TaskvecError(f"{source}: the head holds NaN or infinity", "give one whose training did not diverge")


def arranged(head: Head, names: Sequence[str], task: Task, source: str) -> Head:
    """Return a head with its outputs, which ``names`` name, in the order of the task's classes."""
    names = [unicodedata.normalize("NFC", name) for name in names]
    if len(names) != len(task.classes):
        raise TaskvecError(
            f"{source}: {len(names)} classes are named, and task '{task.name}' has {len(task.classes)}",
            "name every output once, in order: classes: [...]",
        )
    strange = [name for name in names if name not in task.classes]
    if strange or len(set(names)) < len(names):
        what = f"class '{strange[0]}' is none of task '{task.name}'" if strange else "a class is named twice"
        near = did_you_mean(strange[0], task.classes) if strange else "each class once"
        raise TaskvecError(f"{source}: {what}", f"{near}; classes: names the head's outputs in order, as the task does")
    order = [names.index(name) for name in task.classes]
    return replace(head, weight=head.weight[order], bias=head.bias[order])
