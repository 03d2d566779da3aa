"""What steps left in their folders, opened again by the steps that read them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from taskvec.core.compute import choose_device
from taskvec.core.files import read_json
from taskvec.data.images import Preprocessing
from taskvec.data.tasks import Task, read_task
from taskvec.encoders import batch_norm, records
from taskvec.encoders.backbone import Backbone, linearised
from taskvec.engine.pipeline import Config, Inputs, Untracked
from taskvec.learning.finetuning import task_vector
from taskvec.learning.heads import Head, read_heads, save_heads
from taskvec.merging.in_memory import DIRECTIONS, read_directions
from taskvec.weights import vectors
from taskvec.weights.flat import Weights, open_saved, read

HEAD, HEADS = "head.safetensors", "heads.safetensors"
ENCODER, DIRECTION, STATISTICS = "encoder.safetensors", "direction.safetensors", "statistics.safetensors"
METRICS, RATE = "metrics.json", "rate.json"
AGREEMENTS, PRECISION = "agreements.json", "precision.json"
CURVE, CHOICE, OPTION, SCORES = "curve.json", "choice.json", "option.json", "scores.npz"
"""The files that steps leave, and by which others read them."""


Opened = TypeVar("Opened")


@dataclass(frozen=True)
class Shared(Generic[Opened]):
    """The ``most`` things that steps of this process opened last, for its next steps; artifacts never change."""

    most: int
    entries: OrderedDict[Hashable, Opened] = field(default_factory=OrderedDict)

    def get(self, key: Hashable, open: Callable[[], Opened]) -> Opened:
        """Return what was opened under a key, or open it; what is dropped for it is dropped before."""
        if key in self.entries:
            self.entries.move_to_end(key)
            return self.entries[key]
        while self.entries and len(self.entries) >= self.most:
            self.entries.popitem(last=False)
        opened = open()
        if self.most:
            self.entries[key] = opened
        return opened


BACKBONES, TASKS = Shared[Backbone](1), Shared[Task](32)
"""Consecutive steps look through one encoder, which has a buffer of its own, and at few tasks, which stay on disk.

Fine-tuned encoders are not shared: they are mapped where they lie, and a merge reads each once.
"""


def close() -> None:
    """Give up what steps have opened, when a run has ended."""
    BACKBONES.entries.clear()
    TASKS.entries.clear()


def identity(folder: Path) -> Hashable:
    """Return what tells an artifact's folder from one that was cleared and made again; a missing folder raises."""
    seen = folder.stat()
    return str(folder), seen.st_dev, seen.st_ino, seen.st_mtime_ns


class OnDevice(Config):
    """What a step is told that looks through an encoder: on which device, and whether the encoder is linearised.

    Which of several devices it is, and what the backbone is called, does not count. No device is the CPU, whatever the
    study's is.
    """

    device: str = ""
    linearised: bool = False
    backbone_name: Untracked[str] = ""

    def tracked(self) -> dict[str, Any]:
        """Return what counts: of a device its kind."""
        fields = super().tracked()
        return fields | {"device": self.device.partition(":")[0]} if self.device else fields

    def threaded(self) -> bool:
        """Return whether it computes on the CPU, where the number of threads changes the last bits of sums."""
        return self.device in ("", "cpu")


def open_backbone(inputs: Inputs, config: OnDevice) -> Backbone:
    """Open the backbone that a step reads, on the study's device, and linearised where its regime is.

    Consecutive steps share its module, which every one leaves at the pre-trained weights (``Backbone.at``).
    """
    folder, device = inputs["backbone"], choose_device(config.device or "cpu")
    shared = BACKBONES.get((identity(folder), device), lambda: records.read_backbone(folder, device))
    backbone = replace(shared, name=config.backbone_name)
    if folder := inputs.get("precision"):
        backbone.precision = read_json(folder / PRECISION)["precision"]
    return linearised(backbone) if config.linearised else backbone


def open_task(inputs: Inputs) -> Task:
    """Open the decoded task that a step reads, with its whole training images where it trains on crops of them."""
    return shared_task(inputs["task"], inputs.get("whole"))


def open_tasks(inputs: Inputs) -> list[Task]:
    """Open all decoded tasks that a step reads."""
    folders = inputs["tasks"]
    whole = inputs.get("whole") or [None] * len(folders)
    return [shared_task(folder, images) for folder, images in zip(folders, whole, strict=True)]


def shared_task(folder: Path, whole: Path | None) -> Task:
    """Return a decoded task, opened once by consecutive steps."""
    key = identity(folder), whole and identity(whole)
    return TASKS.get(key, lambda: read_task(folder, folder.name, whole))


def open_view(inputs: Inputs) -> Preprocessing:
    """Open the part of a preprocessing that decides decoded pixels."""
    return Preprocessing(**read_json(inputs["preprocessing"] / "preprocessing.json"))


def open_head(folder: Path) -> Head:
    """Open the head of a step; a fine-tuned encoder's folder holds the head that goes with it."""
    return read_heads(folder / HEAD)["head"]


def open_heads(folders: Iterable[Path]) -> list[Head]:
    """Open the heads of several steps."""
    return [open_head(folder) for folder in folders]


def save_head(head: Head, out: Path) -> None:
    """Write the one head of a step."""
    save_heads({"head": head}, out / HEAD)


def open_task_vector(folder: Path, backbone: Backbone) -> Weights:
    """Open a fine-tuned encoder as a task vector."""
    return task_vector(backbone, open_encoder(folder, backbone))


def open_task_vectors(inputs: Inputs, backbone: Backbone) -> list[Weights]:
    """Open the fine-tuned encoders that a step reads, as task vectors."""
    return [open_task_vector(folder, backbone) for folder in inputs["finetuned"]]


def open_vector(folder: Path, backbone: Backbone, task: int | None = None) -> Weights:
    """Open a merged task vector, or of a per-task merge the one of the task at a place in the study."""
    if (folder / DIRECTIONS).exists():
        assert task is not None
        return read_directions(folder / DIRECTIONS, backbone.pretrained).of(task)
    return open_saved(folder / DIRECTION, backbone.pretrained, backbone.device)


def open_encoder(folder: Path, backbone: Backbone) -> Weights:
    """Open a fine-tuned encoder's weights."""
    return open_saved(folder / ENCODER, backbone.pretrained, backbone.device)


def merged_weights(backbone: Backbone, vector: Weights, scale: float, estimated: Path | None = None) -> Weights:
    """Return the encoder at a scale along a merged vector, with statistics of batch norm where they were estimated."""
    weights = vectors.add(backbone.pretrained, vector, scale)
    if estimated is None:
        return weights
    key = scale_key(scale)
    return batch_norm.with_statistics(weights, read(estimated / STATISTICS, [key])[key])


def validation(folder: Path) -> float:
    """Return the validation accuracy that a step has measured."""
    value: float = read_json(folder / METRICS)["validation"]
    return value


def validations(folders: Iterable[Path]) -> list[float]:
    """Return the validation accuracies that steps have measured."""
    return [validation(folder) for folder in folders]


def scale_key(scale: float) -> str:
    """Return the name under which a scale's head is kept; 0.0 and -0.0 are one scale."""
    return repr(float(scale) + 0.0)


def find_head(rounds: Iterable[Path], scale: float) -> Head:
    """Return the head that a round of re-probing fitted at a scale."""
    for folder in rounds:
        heads = read_heads(folder / HEADS)
        if scale_key(scale) in heads:
            return heads[scale_key(scale)]
    raise ValueError(f"no head was fitted at scale {scale}")
