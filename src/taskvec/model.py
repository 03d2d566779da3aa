"""The model to keep: one encoder, a head for every task, and how to look at images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from taskvec import vectors
from taskvec.backbones import AROUND, Backbone, linearised, read_weights, restore
from taskvec.compute import choose_device
from taskvec.errors import TaskvecError, unknown
from taskvec.heads import Head, read_heads, save_heads
from taskvec.images import corrupt, open_image, resize_and_crop
from taskvec.merging.buffers import DIRECTIONS, TaskDirections, read_directions, save_directions
from taskvec.store import read_json, write_json
from taskvec.weights import Weights, save

ABOUT = ("method", "config", "heads", "scale", "scales", "validation")
"""What model.json says of the merge; ``scales``, one a task in their order, are there where each has its own, and
``config`` where hyperparameters are not the authors'."""


@dataclass(frozen=True)
class Prediction:
    """A task's answer for one image: the class and its softmax probability.

    Tasks of other kinds answer how many patches are of each class, with the mean of their probabilities, or an angle in
    degrees, with the length of the predicted vector (1 is sure, 0 is at a loss).
    """

    image: str
    task: str
    label: str
    probability: float


@dataclass(frozen=True)
class MultiTaskModel:
    """An encoder with a head for every task; all heads that read the same features answer from one forward pass.

    With ``directions``, of a per-task merge, the encoder moves for every task, and each has a pass of its own.
    """

    backbone: Backbone
    heads: Mapping[str, Head]
    classes: Mapping[str, Sequence[str]]
    about: Mapping[str, Any]
    directions: TaskDirections | None = None

    def logits(
        self, features: Float[Tensor, "batch *patches width"], per_patch: bool = False
    ) -> dict[str, Float[Tensor, "batch *patches classes"]]:
        """Return the scores of every task that reads features of images, or of every patch."""
        return {task: head.logits(features) for task, head in self.heads.items() if head.rules.per_patch == per_patch}

    def scores(self, images: UInt8[np.ndarray, "count 3 size size"], tasks: Sequence[str]) -> dict[str, Tensor]:
        """Return the scores of tasks and of those that read the same features, from one pass for each kind."""
        if self.directions is not None:
            return {task: self.own_scores(images, task) for task in tasks}
        found: dict[str, Tensor] = {}
        for per_patch in {self.heads[task].rules.per_patch for task in tasks}:
            found |= self.logits(self.backbone.features(images, per_patch=per_patch), per_patch)
        return found

    def own_scores(self, images: UInt8[np.ndarray, "count 3 size size"], task: str) -> Tensor:
        """Return one task's scores for decoded images, with the encoder moved by its own direction."""
        assert self.directions is not None
        backbone, place = self.backbone, list(self.heads).index(task)
        vectors.move(backbone.bound, backbone.pretrained, [self.directions.of(place)], [self.about["scale"]])
        per_patch = self.heads[task].rules.per_patch
        found = self.heads[task].logits(backbone.features(images, per_patch=per_patch))
        backbone.use(backbone.pretrained)
        return found

    def predict(self, images: Sequence[str | Path], task: str | None = None) -> list[Prediction]:
        """Classify image files by every task's head, or by one task's."""
        if task is not None and task not in self.heads:
            raise unknown("task", task, self.heads)
        size = self.backbone.preprocessing
        pixels = []
        for image in images:
            with corrupt(image):
                pixels.append(resize_and_crop(open_image(Path(image), size), size))
        if not pixels:
            return []
        names = [task] if task is not None else list(self.heads)
        scores = self.scores(np.stack(pixels), names)
        return [
            Prediction(str(image), name, *self.heads[name].rules.answer(scores[name][index], self.classes[name]))
            for index, image in enumerate(images)
            for name in names
        ]


def save_model(
    folder: Path,
    backbone: Backbone,
    weights: Weights,
    heads: Mapping[str, Head],
    classes: Sequence[Sequence[str]],
    about: Mapping[str, Any],
    directions: TaskDirections | None = None,
) -> None:
    """Write encoder.safetensors, heads.safetensors and model.json (classes, preprocessing, method, scale).

    A per-task merge has its ``directions`` in a file of their own, beside the pre-trained encoder; model.json says how
    many bytes each task adds. A linearised encoder has the weights that it is expanded around in a file of their own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save(weights, folder / "encoder.safetensors")
    if backbone.around is not None:
        save(backbone.around, folder / AROUND)
    save_heads(dict(heads), folder / "heads.safetensors")
    record: dict[str, Any] = {
        "name": backbone.name,
        "architecture": backbone.architecture,
        "preprocessing": backbone.preprocessing.to_json(),
        "tasks": [{"name": name, "classes": list(c)} for name, c in zip(heads, classes, strict=True)],
    }
    if directions is not None:
        save_directions(directions, folder / DIRECTIONS)
        record["bytes_per_task"] = directions.bytes_per_task
    write_json(folder / "model.json", record | dict(about))


def load(folder: str | Path, device: str = "auto") -> MultiTaskModel:
    """Load a model folder, or the best model (on validation) of a run folder."""
    chosen = find_model(Path(folder))
    record = read_json(chosen / "model.json")
    backbone = open_encoder(chosen, record, choose_device(device))
    heads = read_heads(chosen / "heads.safetensors")
    return MultiTaskModel(
        backbone,
        {task["name"]: heads[task["name"]] for task in record["tasks"]},
        {task["name"]: task["classes"] for task in record["tasks"]},
        {key: record[key] for key in ABOUT if key in record},
        read_directions(chosen / DIRECTIONS, backbone.pretrained) if (chosen / DIRECTIONS).exists() else None,
    )


def open_encoder(folder: Path, record: Mapping[str, Any], device: str) -> Backbone:
    """Open a model's encoder, linearised around weights of their own where the folder has them."""
    if not (folder / AROUND).exists():
        return restore(record, folder / "encoder.safetensors", device)
    backbone = linearised(restore(record, folder / AROUND, device))
    backbone.use(read_weights(folder / "encoder.safetensors", backbone.pretrained))
    return backbone


def find_model(folder: Path) -> Path:
    """Return the folder itself if it is a model's, or the model of a run with the best mean validation accuracy."""
    if (folder / "model.json").is_file():
        return folder
    found = sorted((folder / "models").glob("*/model.json"))
    if not found:
        raise TaskvecError(
            f"no model in '{folder}'", "give a run folder (it holds models/) or one of the folders in its models/"
        )
    return max(found, key=lambda path: float(read_json(path)["validation"])).parent
