"""Checkpoints that a task brings: an encoder fine-tuned elsewhere, checked against its backbone, and a head for it.

The paper takes checkpoints "downloaded from online repositories" for its task vectors (appendix A).
"""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Json, TypeAdapter, ValidationError
from torch import Tensor, nn

from taskvec.core.errors import TaskvecError, did_you_mean
from taskvec.core.files import read_json
from taskvec.core.notes import note
from taskvec.core.task_types import CLASSIFICATION
from taskvec.data.tasks import Task
from taskvec.encoders.addresses import split_key
from taskvec.encoders.backbone import Backbone, checked_features
from taskvec.encoders.loaders.checkpoints import check_file, read_checkpoint
from taskvec.encoders.loaders.families import FAMILIES
from taskvec.encoders.loaders.requests import Request
from taskvec.encoders.records import BASE
from taskvec.learning.heads import Head, HeadRecord, Names, head_records, metadata_value
from taskvec.weights.flat import Weights, align, check_filled, check_kinds
from taskvec.weights.keys import CLASSIFIERS, COUNTER, parts

NAMES = TypeAdapter(Names)
OUTPUTS = TypeAdapter(Json[Names | dict[str, Names]])
NAMING = ("model.json", "config.json")
"""Files beside a checkpoint that may name the outputs of its head."""
TOLERATED = 0.01
"""How far scores may be from a classifier's own, in their standard deviations: another feature's are as far as that."""
OTHER_FEATURE = "its classifier reads another feature than this backbone gives"
LONGEST_VECTOR = 0.7
"""Length of a task vector, in lengths of the pre-trained weights, that speaks of another pre-training."""


@dataclass(frozen=True)
class Checkpoint:
    """An encoder that was fine-tuned elsewhere, its file, and the tensors of a classifier in it.

    ``objection`` says why that classifier is no head on the backbone's features, or nothing.
    """

    path: Path
    encoder: Weights
    classifier: Mapping[str, Tensor]
    objection: str = ""


def given_file(given: Path, key: str, task: str, allow_pickle: bool) -> Path:
    """Return the file that a task's ``finetuned`` or ``head`` names, or raise if it is missing or a pickle."""
    path = Path(split_key(str(given))[0])
    if not path.is_file():
        raise TaskvecError(
            f"no file at '{path}', which task '{task}' names as {key}",
            "give a .safetensors file; relative paths start from the study file's folder",
        )
    return check_file(str(path), allow_pickle)


def read_finetuned(given: Path, backbone: Backbone, allow_pickle: bool = False) -> Checkpoint:
    """Read a fine-tuned encoder of a backbone: in the backbone's own keys, or in any that its kind of address reads.

    Every key and shape must be the backbone's, but for a classifier; one whose vector looks wrong is noted.
    ``FILE#NAME`` is a part of a file.
    """
    file, part = split_key(str(given))
    path = Path(file)
    if path.name == "encoder.safetensors" and (path.parent / BASE).exists():
        raise TaskvecError(f"'{path}' is of a linearised encoder", "bring the checkpoint of an ordinary one")
    source, wanted = f"'{path}'", backbone.pretrained.state()
    reading = read_checkpoint(path, wanted, part)
    raw = reading.tensors
    classifier = {key: value for key, value in raw.items() if key not in wanted and key.startswith(CLASSIFIERS)}
    counters = {key: value for key, value in wanted.items() if key.endswith(COUNTER) and key not in raw}
    same_keys = all(
        key in raw and raw[key].shape == value.shape for key, value in wanted.items() if key not in counters
    )
    same_keys = same_keys and not set(raw) - set(wanted) - set(classifier)
    request = request_of(path, part, backbone, allow_pickle)
    state, unused = (raw, reading.unused) if same_keys else translate(request, backbone)
    if rest := [key for key in unused if not key.startswith(CLASSIFIERS)]:
        note(f"{source}: left out {parts(rest)}")
    tensors = {key: value for key, value in state.items() if key in wanted or not key.startswith(CLASSIFIERS)}
    encoder = align(counters | tensors, backbone.pretrained, source)
    check_filled(encoder, source)
    note_length(encoder, backbone, source)
    return Checkpoint(path, encoder, classifier, objection(request, encoder, classifier, backbone))


def translate(request: Request, backbone: Backbone) -> tuple[Mapping[str, Tensor], Sequence[str]]:
    """Read a file as if it were the backbone's own checkpoint: other key styles, positions of another input size.

    What is left out of it comes second. Weights of transformers need the config.json that lies beside them.
    """
    state = FAMILIES[request.kind].load(request).state(backbone.module)
    return (state.tensors, state.left_out) if state else ({}, ())


def request_of(path: Path, part: str, backbone: Backbone, allow_pickle: bool) -> Request:
    """Return what asks for a file, or a part of it, as if it were the backbone's own checkpoint."""
    family, options = backbone.architecture["family"], backbone.architecture["options"]
    name = str(path) if family == "hf" else options.get("name") or options.get("model") or "random"
    projection = bool(options.get("projection")) or None
    address = f"{family}:{name}@{path}"
    return Request(address, family, name, str(path), options["size"], projection, allow_pickle, key=part)


def objection(request: Request, encoder: Weights, classifier: Mapping[str, Tensor], backbone: Backbone) -> str:
    """Say why a classifier is no head on the backbone's features: it is not linear, or its library's scores differ."""
    if not classifier:
        return ""
    rows, bias = linear_layer(classifier)
    if rows is None:
        return f"its classifier ({', '.join(sorted(classifier)[:6])}) is not one linear layer"
    make = FAMILIES[request.kind].classifier if request.kind in FAMILIES else None
    whole = make(request, backbone.architecture["options"], len(rows)) if make else None
    if make and whole is None:
        unknown = "its classifier is none that the library knows; it is taken to read the encoder's feature"
        note(f"'{request.file}': {unknown}")
    return "" if whole is None or same_scores(whole, encoder, Head(rows, bias), backbone) else OTHER_FEATURE


def same_scores(whole: nn.Module, encoder: Weights, head: Head, backbone: Backbone) -> bool:
    """Say whether a classifier gives random images the scores that a head on the encoder's features gives them."""
    size, device = backbone.preprocessing.size, backbone.device
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    with backbone.at(encoder), torch.inference_mode():
        features = backbone.module.eval()(images)
        if features.shape[1] != head.weight.shape[1]:
            return False
        wanted, scores = head.logits(features), checked_features(whole.to(device).eval(), images, backbone.name)
    spread = float((wanted - head.bias.to(device)).std())
    return scores.shape == wanted.shape and float((scores - wanted).abs().max()) <= TOLERATED * spread


def linear_layer(
    tensors: Mapping[str, Tensor],
) -> tuple[Float[Tensor, "outputs width"] | None, Float[Tensor, " outputs"]]:
    """Return weight and bias of a linear layer, whatever it is called; no weight where tensors are no such layer."""
    weights = [key for key, value in tensors.items() if key.endswith("weight") and value.ndim == 2]
    if len(weights) != 1 or set(tensors) - linear_keys(weights[0]):
        return None, torch.empty(0)
    rows = tensors[weights[0]].float()
    return rows, tensors.get(weights[0].removesuffix("weight") + "bias", torch.zeros(len(rows))).float()


def note_length(encoder: Weights, backbone: Backbone, source: str) -> None:
    """Note when a task vector is zero, or too long to come from this pre-training."""
    start = backbone.pretrained.flat
    length = float(torch.dist(encoder.flat, start) / start.norm())
    if length == 0:
        note(f"{source} is the pre-trained encoder itself: its task vector is zero")
    elif length > LONGEST_VECTOR:
        what = f"{length:.2f} times as long as the pre-trained weights"
        note(f"{source}: its task vector is {what}; was it fine-tuned from another checkpoint?")


def head_of(checkpoint: Checkpoint, given: Sequence[str], task: Task, width: int, start: Head | None) -> Head:
    """Return the classifier in a checkpoint as the task's head, or else the frozen head that its regime starts from.

    ``given`` are the names of its outputs in order, by default those that its file knows; without any head it raises.
    """
    layer, source = checkpoint.classifier, f"'{checkpoint.path}'"
    fix = "give its head: as a .safetensors file with weight and bias, or take the regime aligned, which probes one"
    if checkpoint.objection and start is not None:
        note(f"{source}: {checkpoint.objection}; the head of '{task.name}' that its regime starts from is used instead")
    if start is not None and (checkpoint.objection or not layer):
        return start
    if checkpoint.objection:
        raise TaskvecError(f"{source}: {checkpoint.objection}, and the regime has no head of its own", fix)
    if not layer:
        raise TaskvecError(f"{source} holds no head for task '{task.name}', and the regime has none", fix)
    weight = next(key for key in layer if key.endswith("weight"))
    names = given or class_names(checkpoint.path, task.name, len(layer[weight]))
    return make_head(layer, weight, {}, names, task, width, source)


def linear_keys(weight: str) -> set[str]:
    """Return the keys of a linear layer, from that of its weight."""
    return {weight, weight.removesuffix("weight") + "bias"}


def read_head(path: Path, given: Sequence[str], task: Task, width: int) -> Head:
    """Read a task's head from a file: ``weight`` and ``bias``, a classifier's ``NAME.weight``, or a model's heads.

    Of several heads the one with the task's name is taken. Its outputs are named by ``given``, or else by the file's
    metadata ``classes`` (JSON), the model.json or the config.json beside it, and brought into the order of the task's.
    """
    file, part = split_key(str(path))
    path = Path(file)
    source, tensors = f"'{path}'", read_checkpoint(path, key=part).tensors
    weights = [key for key in tensors if key.endswith("weight") and tensors[key].ndim == 2]
    named = f"{task.name}.weight"
    chosen = named if named in weights else weights[0] if len(weights) == 1 else None
    if chosen is None:
        several = [key.removesuffix("weight").rstrip(".") for key in weights]
        what = f"heads of {', '.join(several)}, none of them named '{task.name}'" if several else "no linear layer"
        raise TaskvecError(f"{source} holds {what}", did_you_mean(named, weights) if several else "give another head:")
    if len(weights) == 1 and (odd := sorted(set(tensors) - linear_keys(chosen))):
        raise TaskvecError(f"{source} is not one linear layer: it holds {', '.join(odd[:3])}", "give another head:")
    label = chosen.removesuffix("weight").removesuffix(".")
    if f"{label}.down" in tensors:
        what = f"head '{label}' corrects the features of a merged encoder (surgery)"
        raise TaskvecError(f"{source}: {what}", "give the head without a correction, kept or re-probed")
    every = head_records(path) if path.suffix == ".safetensors" else {}
    fields = every.get(label, HeadRecord()).model_dump(exclude_unset=True)
    names = given or class_names(path, label, len(tensors[chosen]))
    return make_head(tensors, chosen, fields, names, task, width, source)


def class_names(path: Path, label: str, outputs: int) -> Sequence[str]:
    """Return the names of a head's outputs that its file knows, or a model.json or config.json beside it; else none."""
    known = metadata_value(path, "classes", OUTPUTS) if path.suffix == ".safetensors" else None
    names = known.get(label, []) if isinstance(known, dict) else known
    return (
        names
        or model_names(path.with_name("model.json"), label)
        or config_names(path.with_name("config.json"), outputs)
    )


def model_names(about: Path, label: str) -> list[str]:
    """Return the names of a task's classes in the model.json of a kept model, or nothing: others use that name too."""
    record = read_json(about) if about.is_file() else {}
    every = record.get("tasks") if isinstance(record, dict) else None
    tasks = [task for task in every if isinstance(task, dict)] if isinstance(every, list) else []
    named = (task["classes"] for task in tasks if task.get("name") == label and task.get("classes"))
    return next((checked_names(names, about) for names in named), [])


def checked_names(names: Any, source: Path) -> list[str]:
    """Return names of outputs as text, numbers too; anything else in their place is an error."""
    try:
        return NAMES.validate_python(names)
    except ValidationError as error:
        what = error.errors(include_url=False)[0]
        raise TaskvecError(
            f"'{source}' names no classes: {what['msg']}, not {reprlib.repr(what['input'])}",
            "mend it, or name the head's outputs in order: classes: [...]",
        ) from None


def naming(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the files beside checkpoints and heads that may name their outputs."""
    beside = {f"{key}, {name}": path.with_name(name) for key, path in files.items() for name in NAMING}
    return {key: path for key, path in beside.items() if path.is_file()}


def config_names(config: Path, outputs: int) -> list[str]:
    """Return the names of so many outputs in a config.json of transformers (``id2label``) or timm (``label_names``).

    They count from 0 in the order of their numbers, not of the file; what does not name every output is told, not used.
    """
    about = read_json(config) if config.is_file() else {}
    labels = (about.get("id2label") or about.get("label_names") or []) if isinstance(about, dict) else []
    if isinstance(labels, dict) and all(re.fullmatch("[0-9]{1,9}", key) for key in labels):
        numbers = sorted(labels, key=int)
        labels = [labels[key] for key in numbers] if [*map(int, numbers)] == [*range(len(numbers))] else labels
    if isinstance(labels, dict):
        note(f"'{config}': its labels are not numbered from 0 without a gap; they are not taken as the head's classes")
        return []
    names = checked_names(labels, config)
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        return []
    if len(names) != outputs:
        note(f"'{config}' names {len(names)} classes, and the head beside it has {outputs} outputs: it is not used")
        return []
    return names


def make_head(
    tensors: Mapping[str, Tensor],
    weight: str,
    fields: Mapping[str, Any],
    names: Sequence[str],
    task: Task,
    width: int,
    source: str,
) -> Head:
    """Make a head out of a linear layer's tensors, with its outputs in the order of the task's classes."""
    layers = {key: tensors[key] for key in sorted(linear_keys(weight)) if key in tensors}
    check_kinds(layers, {key: torch.empty(0) for key in layers}, source)
    rows = tensors[weight].float()
    bias = tensors.get(weight.removesuffix("weight") + "bias", torch.zeros(len(rows))).float()
    fields = {"kind": task.kind, **fields}
    if (kind := fields["kind"]) != task.kind:
        raise TaskvecError(f"{source} is a head for {kind}, and '{task.name}' is a task of {task.kind}", "swap it")
    check_shape(rows, bias, task, width, source)
    head = Head(rows, bias, **fields)
    if not names and task.kind == CLASSIFICATION:
        note(f"{source} names no classes: its outputs are taken in the order of task '{task.name}'")
    return in_task_order(head, names or task.classes, task, source)


def check_shape(
    rows: Float[Tensor, "outputs width"], bias: Float[Tensor, " biases"], task: Task, width: int, source: str
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


def in_task_order(head: Head, names: Sequence[str], task: Task, source: str) -> Head:
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
