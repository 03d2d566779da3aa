"""What steps left in their folders, opened again by the steps that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from taskvec.core.compute import choose_device
from taskvec.core.files import read_json
from taskvec.data.images import Preprocessing
from taskvec.data.tasks import Task, read_task
from taskvec.encoders import backbone as backbones
from taskvec.encoders import batch_norm, records
from taskvec.encoders.backbone import Backbone
from taskvec.learning.finetuning import task_vector
from taskvec.learning.heads import Head, read_heads, save_heads
from taskvec.merging import in_memory as buffers
from taskvec.weights import vectors
from taskvec.weights.flat import Weights, read

Config = dict[str, Any]
Inputs = dict[str, list[Path]]
"""The folders of other steps, by what they are to the step that reads them."""


def open_backbone(inputs: Inputs, config: Config) -> Backbone:
    """Open the backbone that a step reads, on the study's device, and linearised where its regime is."""
    device = choose_device(config.get("device", "cpu"))
    backbone = records.read_backbone(inputs["backbone"][0], device, config["name"])
    return backbones.linearised(backbone) if config.get("linearised") else backbone


def open_task(inputs: Inputs) -> Task:
    """Open the decoded task that a step reads."""
    return open_tasks(inputs)[0]


def open_tasks(inputs: Inputs) -> list[Task]:
    """Open all decoded tasks that a step reads."""
    folders = inputs["task"]
    return [read_task(one, one.name, whole_of(inputs, place)) for place, one in enumerate(folders)]


def whole_of(inputs: Inputs, place: int) -> Path | None:
    """Return the folder of whole training images of the task at a place, where a step trains on crops of them."""
    return inputs[f"whole{place}"][0] if f"whole{place}" in inputs else None


def open_view(inputs: Inputs) -> Preprocessing:
    """Open the part of a preprocessing that decides decoded pixels."""
    return Preprocessing(**read_json(inputs["preprocessing"][0] / "preprocessing.json"))


def open_head(inputs: Inputs, role: str = "head") -> Head:
    """Open the head that a step reads."""
    return open_heads(inputs, role)[0]


def open_heads(inputs: Inputs, role: str = "head") -> list[Head]:
    """Open the heads in the folders of a role; a fine-tuned encoder's folder holds the head that goes with it."""
    return [read_heads(folder / "head.safetensors")["head"] for folder in inputs[role]]


def save_head(head: Head, out: Path) -> None:
    """Write the one head of a step."""
    save_heads({"head": head}, out / "head.safetensors")


def open_task_vectors(inputs: Inputs, backbone: Backbone) -> list[Weights]:
    """Open the fine-tuned encoders that a step reads, as task vectors."""
    return [task_vector(backbone, open_encoder(folder, backbone)) for folder in inputs["finetuned"]]


def open_vector(folder: Path, backbone: Backbone, config: Config) -> Weights:
    """Open a merged task vector, or of a per-task merge the one of the task whose place the configuration tells."""
    if (folder / buffers.DIRECTIONS).exists():
        return buffers.read_directions(folder / buffers.DIRECTIONS, backbone.pretrained).of(config["task"])
    return records.read_weights(folder / "direction.safetensors", backbone.pretrained)


def open_encoder(folder: Path, backbone: Backbone) -> Weights:
    """Open a fine-tuned encoder's weights."""
    return records.read_weights(folder / "encoder.safetensors", backbone.pretrained)


def merged_weights(backbone: Backbone, vector: Weights, scale: float, estimated: list[Path]) -> Weights:
    """Return the encoder at a scale along a merged vector, with statistics of batch norm where they were estimated."""
    weights = vectors.add(backbone.pretrained, vector, scale)
    for folder in estimated:
        found = read(folder / "statistics.safetensors", [scale_key(scale)])
        weights = batch_norm.with_statistics(weights, found[scale_key(scale)])
    return weights


def validations(folders: list[Path]) -> list[float]:
    """Return the validation accuracies that steps have measured."""
    return [read_json(folder / "metrics.json")["validation"] for folder in folders]


def scale_key(scale: float) -> str:
    """Return the name under which a scale's head is kept; 0.0 and -0.0 are one scale."""
    return repr(float(scale) + 0.0)


def find_head(rounds: list[Path], scale: float) -> Head:
    """Return the head that a round of re-probing fitted at a scale."""
    for folder in rounds:
        heads = read_heads(folder / "heads.safetensors")
        if scale_key(scale) in heads:
            return heads[scale_key(scale)]
    raise ValueError(f"no head was fitted at scale {scale}")
