"""Heads: linear probes on frozen features, all learning rates at once, and re-probing on a merged encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from taskvec.backbones import Backbone
from taskvec.settings import Probe
from taskvec.tasks import Split, Task
from taskvec.training import Group, Progress, Schedule, index_batches, no_progress, train
from taskvec.weights import read, save_tensors


@dataclass(frozen=True)
class Head:
    """A linear classifier on features: one row of weights a class; ``normalised`` features are of unit length first."""

    weight: Float[Tensor, "classes width"]
    bias: Float[Tensor, " classes"]
    normalised: bool = False

    def logits(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        """Return class scores in float32, on the features' device."""
        features = F.normalize(features.float(), dim=1) if self.normalised else features.float()
        return F.linear(features, self.weight.to(features.device), self.bias.to(features.device))

    def on(self, device: str, learns: bool = False) -> Head:
        """Return a copy on a device, whose weights are leaves that learn or constants."""
        weight, bias = (p.detach().to(device, copy=True).requires_grad_(learns) for p in (self.weight, self.bias))
        return Head(weight, bias, self.normalised)

    def predict(self, features: Float[Tensor, "batch width"]) -> Int64[Tensor, " batch"]:
        """Return the class of highest score, ties to the first; -1 (no class) where a score is NaN or infinite."""
        scores = self.logits(features)
        return scores.argmax(dim=1).where(scores.isfinite().all(dim=1), -1)


@dataclass(frozen=True)
class Probed:
    """The outcome of probing: a head and its validation accuracy (a fraction) for each learning rate."""

    rates: tuple[float, ...]
    heads: tuple[Head, ...]
    validation: tuple[float, ...]

    def best(self) -> int:
        """Return the index of the rate with the highest validation accuracy; ties go to the smaller rate."""
        return max(range(len(self.rates)), key=lambda i: (self.validation[i], -self.rates[i]))


def accuracy(head: Head, features: Float[Tensor, "count width"], labels: Int64[Tensor, " count"]) -> float:
    """Return the share of samples whose predicted class is their label."""
    return float((head.predict(features) == labels).double().mean())


def fit(
    features: Float[Tensor, "count width"],
    labels: Int64[Tensor, " count"],
    classes: int,
    rates: Sequence[float],
    settings: Probe,
    seed: int,
    progress: Progress = no_progress,
) -> list[Head]:
    """Fit one linear head for every learning rate on the same batches, from the same random start (cross-entropy)."""
    start = random_head(features.shape[1], classes, seed)
    heads = [[p.detach().clone().requires_grad_() for p in (start.weight, start.bias)] for _ in rates]

    def loss(batch: Tensor) -> Tensor:
        inputs, targets = features[batch], labels[batch]
        return torch.stack([F.cross_entropy(F.linear(inputs, w, b), targets) for w, b in heads]).sum()

    schedule = Schedule(settings.steps, min(settings.warmup, settings.steps // 2), settings.weight_decay)
    groups = [Group(head, rate) for head, rate in zip(heads, rates, strict=True)]
    train(groups, loss, index_batches(len(labels), settings.batch_size, seed), schedule, progress=progress)
    return [Head(weight.detach(), bias.detach()) for weight, bias in heads]


def probe(
    train_features: Float[Tensor, "train width"],
    train_labels: Int64[Tensor, " train"],
    validation_features: Float[Tensor, "validation width"],
    validation_labels: Int64[Tensor, " validation"],
    classes: int,
    settings: Probe,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Probed:
    """Fit heads for all learning rates on cached features and measure each on the validation split."""
    heads = fit(train_features, train_labels, classes, settings.learning_rates, settings, seed, progress)
    values = tuple(accuracy(head, validation_features, validation_labels) for head in heads)
    return Probed(tuple(settings.learning_rates), tuple(heads), values)


def features_of(backbone: Backbone, split: Split) -> tuple[Float[Tensor, "count width"], Int64[Tensor, " count"]]:
    """Return the features and labels of a split under the backbone's present weights."""
    return backbone.features(split.images), torch.from_numpy(split.labels)


def fit_head(backbone: Backbone, task: Task, settings: Probe | None = None, seed: int = 0) -> Head:
    """Probe a task on the backbone's present weights and return the head of the best rate on validation."""
    probed = probe(
        *features_of(backbone, task.train),
        *features_of(backbone, task.validation),
        len(task.classes),
        settings or Probe(),
        seed,
    )
    return probed.heads[probed.best()]


def random_head(width: int, classes: int, seed: int) -> Head:
    """Return a head as torch initialises a linear layer, from a seed and no other random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = torch.nn.Linear(width, classes)
    return Head(start.weight.detach(), start.bias.detach())


def zero_shot_head(texts: Float[Tensor, "classes width"], scale: float) -> Head:
    """Return the head that scores by the cosine of features and text features, times ``scale`` (paper, appendix B)."""
    weight = scale * F.normalize(texts.float(), dim=1)
    return Head(weight, torch.zeros(len(weight)), normalised=True)


def save_heads(heads: dict[str, Head], path: Path) -> None:
    """Write heads by name to one safetensors file: ``NAME.weight``, ``NAME.bias``, perhaps ``NAME.normalised``."""
    tensors = {f"{name}.weight": head.weight.contiguous() for name, head in heads.items()}
    tensors |= {f"{name}.bias": head.bias.contiguous() for name, head in heads.items()}
    tensors |= {f"{name}.normalised": torch.tensor(True) for name, head in heads.items() if head.normalised}
    save_tensors(tensors, path)


def read_heads(path: Path) -> dict[str, Head]:
    """Read heads by name from a safetensors file."""
    tensors = read(path)
    names = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    return {
        name: Head(tensors[f"{name}.weight"], tensors[f"{name}.bias"], f"{name}.normalised" in tensors)
        for name in names
    }
