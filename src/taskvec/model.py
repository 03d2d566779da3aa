"""The model to keep: one encoder, a head for every task, and how to look at images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from taskvec.backbones import Backbone, restore
from taskvec.compute import choose_device
from taskvec.errors import TaskvecError, unknown
from taskvec.heads import Head, read_heads, save_heads
from taskvec.images import open_image, resize_and_crop
from taskvec.store import read_json, write_json
from taskvec.weights import Weights, save

ABOUT = ("method", "heads", "scale", "scales", "validation")
"""What model.json says of the merge; ``scales``, one a task in their order, are there where each has its own."""


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
    """An encoder with a head for every task; all heads that read the same features answer from one forward pass."""

    backbone: Backbone
    heads: Mapping[str, Head]
    classes: Mapping[str, Sequence[str]]
    about: Mapping[str, Any]

    def logits(
        self, features: Float[Tensor, "batch *patches width"], per_patch: bool = False
    ) -> dict[str, Float[Tensor, "batch *patches classes"]]:
        """Return the scores of every task that reads features of images, or of every patch."""
        return {task: head.logits(features) for task, head in self.heads.items() if head.rules.per_patch == per_patch}

    def predict(self, images: Sequence[str | Path], task: str | None = None) -> list[Prediction]:
        """Classify image files by every task's head, or by one task's."""
        if task is not None and task not in self.heads:
            raise unknown("task", task, self.heads)
        size = self.backbone.preprocessing
        pixels = [resize_and_crop(open_image(Path(image)), size) for image in images]
        if not pixels:
            return []
        names = [task] if task is not None else list(self.heads)
        scores: dict[str, Tensor] = {}
        for per_patch in {self.heads[name].rules.per_patch for name in names}:
            scores |= self.logits(self.backbone.features(np.stack(pixels), per_patch=per_patch), per_patch)
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
) -> None:
    """Write encoder.safetensors, heads.safetensors and model.json (classes, preprocessing, method, scale)."""
    folder.mkdir(parents=True, exist_ok=True)
    save(weights, folder / "encoder.safetensors")
    save_heads(dict(heads), folder / "heads.safetensors")
    record = {
        "name": backbone.name,
        "architecture": backbone.architecture,
        "preprocessing": backbone.preprocessing.to_json(),
        "tasks": [{"name": name, "classes": list(c)} for name, c in zip(heads, classes, strict=True)],
    }
    write_json(folder / "model.json", record | dict(about))


def load(folder: str | Path, device: str = "auto") -> MultiTaskModel:
    """Load a model folder, or the best model (on validation) of a run folder."""
    chosen = find_model(Path(folder))
    record = read_json(chosen / "model.json")
    backbone = restore(record, chosen / "encoder.safetensors", choose_device(device))
    heads = read_heads(chosen / "heads.safetensors")
    return MultiTaskModel(
        backbone,
        {task["name"]: heads[task["name"]] for task in record["tasks"]},
        {task["name"]: task["classes"] for task in record["tasks"]},
        {key: record[key] for key in ABOUT if key in record},
    )


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
