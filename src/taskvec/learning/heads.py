"""Heads: linear probes on frozen features, all learning rates at once, and re-probing on a merged encoder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import pydantic
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from taskvec.core.errors import TaskvecError
from taskvec.core.notes import note
from taskvec.core.progress import Progress, no_progress
from taskvec.core.settings import Probe
from taskvec.core.task_types import CLASSIFICATION, TASK_TYPES, TaskType
from taskvec.core.training import Group, Schedule, train
from taskvec.data.tasks import Split, Task
from taskvec.data.uploads import on_device
from taskvec.encoders.backbone import Backbone
from taskvec.learning.batches import index_stream
from taskvec.weights.flat import read, read_metadata, save_tensors

Value = TypeVar("Value")
Names = list[Annotated[str, pydantic.Field(coerce_numbers_to_str=True)]]
PARTS = ("weight", "bias", "down", "up")
"""The tensors of a head in a file; the last two are there where it corrects features."""
Features = Float[Tensor, "count *patches width"]
Labels = Shaped[Tensor, "count ..."]


@dataclass(frozen=True)
class Head:
    """A linear layer on features: one row of weights a class, or an output of another kind of task.

    Where it is ``normalised``, features are brought to unit length first. One with ``down`` and ``up`` corrects
    features before anything else (representation surgery, arXiv 2402.02705).
    """

    weight: Float[Tensor, "classes width"]
    bias: Float[Tensor, " classes"]
    normalised: bool = False
    kind: str = CLASSIFICATION
    down: Float[Tensor, "rank width"] | None = None
    up: Float[Tensor, "width rank"] | None = None

    @property
    def task_type(self) -> TaskType:
        """The type of its task, which says what its scores mean."""
        return TASK_TYPES[self.kind]

    def logits(self, features: Features) -> Float[Tensor, "count *patches classes"]:
        """Return scores in float32, on the features' device."""
        features = self.corrected(features.float())
        features = F.normalize(features, dim=-1) if self.normalised else features
        return F.linear(features, self.weight.to(features.device), self.bias.to(features.device))

    def corrected(self, features: Features) -> Features:
        """Return features z as z - up relu(down z), or as they are for a head without a correction."""
        if self.down is None or self.up is None:
            return features
        device = features.device
        return features - F.linear(F.linear(features, self.down.to(device)).relu(), self.up.to(device))

    def on(self, device: str, learns: bool = False) -> Head:
        """Return a copy on a device, whose weights are leaves that learn or constants, as a correction always is."""
        weight, bias = (p.detach().to(device, copy=True).requires_grad_(learns) for p in (self.weight, self.bias))
        down, up = (None if p is None else p.detach().to(device, copy=True) for p in (self.down, self.up))
        return replace(self, weight=weight, bias=bias, down=down, up=up)

    def predict(self, features: Features) -> Int64[Tensor, " count *patches"]:
        """Return the class of highest score, ties to the first; -1 (no class) where a score is NaN or infinite.

        A head for regression gives the sector of the predicted angle (``task_types.sector``).
        """
        return self.task_type.predict(self.logits(features))

    def score(self, features: Features, labels: Labels) -> Shaped[Tensor, " count"]:
        """Return how right the head is on every image: true or false, or the share of patches."""
        return self.task_type.score(self.logits(features), labels)

    def accuracy(self, features: Features, labels: Labels) -> float:
        """Return the share of samples whose predicted class is their label, or the metric of another type of task."""
        return float(self.score(features, labels).double().mean())

    def loss(self, features: Features, labels: Labels) -> Float[Tensor, ""]:
        """Return the mean training loss."""
        return self.task_type.loss(self.logits(features), labels)


@dataclass(frozen=True)
class ProbeResult:
    """The outcome of probing: a head and its validation accuracy (a fraction) for each learning rate."""

    rates: tuple[float, ...]
    heads: tuple[Head, ...]
    validation: tuple[float, ...]

    def best(self) -> int:
        """Return the index of the rate with the highest validation accuracy; ties go to the smaller rate."""
        return max(range(len(self.rates)), key=lambda i: (self.validation[i], -self.rates[i]))


def fit(
    features: Float[Tensor, "scales count *patches width"],
    labels: Labels,
    classes: int,
    rates: Sequence[float],
    settings: Probe,
    seed: int,
    progress: Progress = no_progress,
    kind: str = CLASSIFICATION,
) -> list[Head]:
    """Fit one linear head for every learning rate on the features of every scale, as one problem where these lie.

    All see the same batches, from the same random start; gradients are clipped and steps taken for every head by
    itself. Returns heads on the CPU, scale by scale.
    """
    features, labels = finite(features), labels.to(features.device)
    start = random_head(features.shape[-1], classes, seed, kind)
    heads = [start.on(str(features.device), learns=True) for _ in features for _ in rates]

    def loss(batch: Int64[Tensor, " batch"]) -> Float[Tensor, ""]:
        return summed_loss(heads, features[:, batch], labels[batch])

    schedule = Schedule(settings.steps, min(settings.warmup, settings.steps // 2), settings.weight_decay)
    groups = [Group([head.weight, head.bias], rate) for head, rate in zip(heads, cycle(rates), strict=False)]
    batches = index_stream(len(labels), settings.batch_size, seed, str(features.device))
    train(groups, loss, batches, schedule, progress=progress, graph=True)
    return [head.on("cpu") for head in heads]


def summed_loss(
    heads: Sequence[Head], features: Float[Tensor, "scales batch *patches width"], labels: Labels
) -> Float[Tensor, ""]:
    """Return the sum of the mean losses of heads, as many for each scale, which they follow.

    A step on a GPU takes the time of its launches, and one product serves all heads. On a CPU, where that is no faster,
    each head has its own: its bits do not depend on the others.
    """
    if features.is_cuda:
        return joint_loss(heads, features, labels)
    rates = len(heads) // len(features)
    return torch.stack([head.loss(features[place // rates], labels) for place, head in enumerate(heads)]).sum()


def joint_loss(
    heads: Sequence[Head], features: Float[Tensor, "scales batch *patches width"], labels: Labels
) -> Float[Tensor, ""]:
    """Return what ``summed_loss`` does by one product: heads of a scale side by side, and all as one large batch."""
    scores = scores_of(heads, features)
    targets = labels.expand(len(heads), *labels.shape)
    mean = heads[0].task_type.loss(scores.flatten(0, 1), targets.flatten(0, 1))
    return len(heads) * mean


def scores_of(
    heads: Sequence[Head], features: Float[Tensor, "scales batch *patches width"]
) -> Float[Tensor, "heads batch *patches classes"]:
    """Return the scores of plain heads, as many for each scale, by one product with their rows side by side."""
    scales, (classes, width) = len(features), heads[0].weight.shape
    weight = torch.stack([head.weight for head in heads]).view(scales, -1, width)
    bias = torch.stack([head.bias for head in heads]).view(scales, -1)
    scores = products(features.flatten(1, -2), weight, bias).view(scales, -1, len(heads) // scales, classes)
    return scores.movedim(2, 1).reshape(len(heads), *features.shape[1:-1], classes)


def products(
    inputs: Float[Tensor, "scales samples width"],
    weight: Float[Tensor, "scales outputs width"],
    bias: Float[Tensor, "scales outputs"] | None = None,
) -> Float[Tensor, "scales samples outputs"]:
    """Return the outputs of linear layers, one a scale, of which each sees its own inputs."""
    if len(inputs) == 1:
        return F.linear(inputs[0], weight[0], None if bias is None else bias[0])[None]
    return inputs @ weight.mT if bias is None else torch.baddbmm(bias[:, None], inputs, weight.mT)


def finite(features: Float[Tensor, "*samples width"]) -> Float[Tensor, "*samples width"]:
    """Return features with zeros in the place of NaN and infinity, from which no head could learn, and tell of them.

    A merged encoder that overflows thus ends no study: what its heads predict from such features counts as wrong.
    """
    valid = features.isfinite()
    if bool(valid.all()):
        return features
    share = float((~valid).any(-1).double().mean())
    note(f"{share:.2%} of the training features hold NaN or infinity, which count as zero while heads are fitted")
    return features.where(valid, 0.0)


def probe(
    train_features: Float[Tensor, "train *patches width"],
    train_labels: Shaped[Tensor, "train ..."],
    validation_features: Float[Tensor, "validation *patches width"],
    validation_labels: Shaped[Tensor, "validation ..."],
    classes: int,
    settings: Probe,
    seed: int = 0,
    progress: Progress = no_progress,
    kind: str = CLASSIFICATION,
) -> ProbeResult:
    """Fit heads for all learning rates on cached features, where these lie, and measure each on validation."""
    rates = tuple(settings.learning_rates)
    heads = fit(train_features[None], train_labels, classes, rates, settings, seed, progress, kind)
    means = [head.score(validation_features, validation_labels).double().mean() for head in heads]
    return ProbeResult(rates, tuple(heads), tuple(torch.stack(means).tolist()))


def features_of(
    backbone: Backbone, split: Split, kind: str = CLASSIFICATION, progress: Progress = no_progress
) -> tuple[Features, Labels]:
    """Return the features that a kind of task needs, and the labels, of a split under the backbone's present weights.

    Raises where the encoder has another number of patches than are labelled.
    """
    per_patch = TASK_TYPES[kind].per_patch
    features = backbone.features(split.images, progress=progress, per_patch=per_patch)
    if per_patch and features.shape[1] != split.labels.shape[1]:
        raise TaskvecError(
            f"'{backbone.name}' has {features.shape[1]} patches an image, but {split.labels.shape[1]} are labelled",
            "choose an encoder or an input size with as many patches, or leave out the tasks with a label a patch",
        )
    return features, on_device(split.labels, backbone.device)


def fit_head(backbone: Backbone, task: Task, settings: Probe | None = None, seed: int = 0) -> Head:
    """Probe a task on the backbone's present weights and return the head of the best rate on validation."""
    probed = probe(
        *features_of(backbone, task.train, task.kind),
        *features_of(backbone, task.validation, task.kind),
        len(task.classes),
        settings or Probe(),
        seed,
        kind=task.kind,
    )
    return probed.heads[probed.best()]


def random_head(width: int, classes: int, seed: int, kind: str = CLASSIFICATION) -> Head:
    """Return a head as torch initialises a linear layer after ``manual_seed``; threads share no random state in it."""
    generator = torch.Generator().manual_seed(seed)
    bound = math.sqrt(3) * (math.sqrt(2 / (1 + math.sqrt(5) ** 2)) / math.sqrt(width))  # as torch, to the bit
    weight = torch.empty(classes, width).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(classes).uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
    return Head(weight, bias, kind=kind)


def class_texts(texts: Float[Tensor, "captions width"], counts: Sequence[int]) -> Float[Tensor, "classes width"]:
    """Return one feature a class: the mean of its captions' features, each of unit length, brought to unit length.

    ``counts`` says how many captions each class has, in their order (CLIP, arXiv 2103.00020, section 3.1.4).
    """
    unit = F.normalize(texts.float(), dim=1)
    return F.normalize(torch.stack([group.mean(0) for group in unit.split(list(counts))]), dim=1)


def zero_shot_head(texts: Float[Tensor, "classes width"], scale: float) -> Head:
    """Return the head that scores by the cosine of features and text features, times ``scale`` (paper, appendix B)."""
    weight = scale * F.normalize(texts.float(), dim=1)
    return Head(weight, torch.zeros(len(weight)), normalised=True)


def save_heads(heads: dict[str, Head], path: Path) -> None:
    """Write heads by name to a safetensors file: ``NAME.weight`` and ``NAME.bias``; what else they are is metadata."""
    tensors = {f"{name}.weight": head.weight.contiguous() for name, head in heads.items()}
    tensors |= {f"{name}.bias": head.bias.contiguous() for name, head in heads.items()}
    for name, head in heads.items():
        if head.down is not None and head.up is not None:
            tensors |= {f"{name}.down": head.down.contiguous(), f"{name}.up": head.up.contiguous()}
    about = {name: _record_of(head) for name, head in heads.items() if _record_of(head)}
    save_tensors(tensors, path, {"heads": json.dumps(about, sort_keys=True)} if about else None)


def _record_of(head: Head) -> dict[str, bool | str]:
    """Return what tells a head from a plain classifier."""
    return ({"normalised": True} if head.normalised else {}) | (
        {"kind": head.kind} if head.kind != CLASSIFICATION else {}
    )


class HeadRecord(pydantic.BaseModel):
    """What metadata may say of a head that is no plain classifier."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    normalised: bool = False
    kind: Literal["classification", "segmentation", "regression"] = "classification"


HEAD_RECORDS = pydantic.TypeAdapter(pydantic.Json[dict[str, HeadRecord]])


def metadata_value(path: Path, key: str, kind: pydantic.TypeAdapter[Value]) -> Value | None:
    """Return what the metadata of a file of heads say by a key, as JSON; what is not of its kind is an error."""
    text = read_metadata(path).get(key)
    try:
        return None if text is None else kind.validate_python(text)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, [key, *first["loc"]]))
        what = f"its metadata cannot be understood: {where}: {first['msg']}"
        raise TaskvecError(f"'{path}': {what}", "write the file again without them, or as they should be") from None


def head_records(path: Path) -> dict[str, HeadRecord]:
    """Return what tells heads of a file from plain classifiers, by their names."""
    return metadata_value(path, "heads", HEAD_RECORDS) or {}


def read_heads(path: Path) -> dict[str, Head]:
    """Read heads by name from a safetensors file; tensors that are no heads, or do not fit together, are an error.

    There may be none: a round of re-probing that had no scale left to try fitted no head.
    """
    tensors, about = read(path), head_records(path)
    names = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    odd = sorted(set(tensors) - {f"{name}.{part}" for name in names for part in PARTS} | set(about) - set(names))
    if odd:
        raise TaskvecError(f"'{path}' is no file of heads: {', '.join(odd[:3])}", "make it again")
    return {name: read_parts(name, tensors, about.get(name, HeadRecord()), path) for name in names}


def read_parts(name: str, tensors: Mapping[str, Tensor], about: HeadRecord, path: Path) -> Head:
    """Return one head of a file, or raise where its tensors are no finite numbers or do not fit together."""
    parts = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
    for part, tensor in parts.items():
        if not (tensor.is_floating_point() and tensor.float().isfinite().all()):
            raise TaskvecError(
                f"'{path}': '{name}.{part}' holds other than finite numbers", "restore it, or train again"
            )
    shapes = {part: list(tensor.shape) for part, tensor in parts.items()}
    outputs, width, rank = *[*shapes["weight"], 0, 0][:2], [*shapes.get("down", []), 0][0]
    wanted = {"weight": [outputs, width], "bias": [outputs]}
    wanted |= {"down": [rank, width], "up": [width, rank]} if set(shapes) - set(wanted) else {}
    if shapes != wanted or not outputs * width or (about.kind == "regression" and outputs != 2):
        raise TaskvecError(f"'{path}': head '{name}' of {about.kind} cannot have the shapes {shapes}", "make it again")
    copies = {part: tensor.to(torch.float32, copy=True) for part, tensor in parts.items()}  # the file may be replaced
    weight, bias, down, up = (copies.get(part) for part in PARTS)
    assert weight is not None
    assert bias is not None
    return Head(weight, bias, about.normalised, about.kind, down, up)
