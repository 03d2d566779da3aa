"""The model to keep: one encoder, a head for every task, and how to look at images."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from taskvec.core.compute import PassPrecision, choose_device
from taskvec.core.errors import TaskvecError, unknown
from taskvec.core.files import Record, file_digest, read_record, write_json
from taskvec.data.images import Source, corrupt, decode, named, resize_and_crop
from taskvec.encoders.backbone import Backbone, linearised
from taskvec.encoders.loaders import families
from taskvec.encoders.records import BASE, Encoder, read_weights, restore
from taskvec.engine.pipeline import versions
from taskvec.learning.heads import Head, read_heads, save_heads
from taskvec.merging.in_memory import DIRECTIONS, TaskDirections, read_directions, save_directions
from taskvec.merging.variants import DIFFERENCES
from taskvec.weights import vectors
from taskvec.weights.flat import Weights, save

ABOUT = "model.json"
"""The file of a kept model that says what it is."""
ENCODER, HEADS = "encoder.safetensors", "heads.safetensors"
"""The files of its weights, beside those of a linearised encoder and of a per-task merge."""
Scale = Annotated[float, Field(ge=-1e6, le=1e6)]
RESTORE = "restore the whole folder, or make it again"
CHUNK = 512
"""Images that are decoded before the encoder looks at them, in batches of its own; a per-task model moves as often."""
TOLD = {"method", *DIFFERENCES, "config", "heads", "scale", "scales", "validation"}
"""What it says of the merge; ``scales``, one a task in their order, are there where each has its own, and
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
        return {
            task: head.logits(features) for task, head in self.heads.items() if head.task_type.per_patch == per_patch
        }

    def scores(self, images: UInt8[np.ndarray, "count 3 size size"], tasks: Sequence[str]) -> dict[str, Tensor]:
        """Return the scores of tasks and of those that read the same features, from one pass for each kind."""
        if self.directions is not None:
            return {task: self.moved_scores(images, task) for task in tasks}
        scores_of: dict[str, Tensor] = {}
        for per_patch in {self.heads[task].task_type.per_patch for task in tasks}:
            scores_of |= self.logits(self.backbone.features(images, per_patch=per_patch), per_patch)
        return scores_of

    def moved_scores(self, images: UInt8[np.ndarray, "count 3 size size"], task: str) -> Tensor:
        """Return one task's scores for decoded images, with the encoder moved by its own direction."""
        assert self.directions is not None
        backbone, head, place = self.backbone, self.heads[task], list(self.heads).index(task)
        with backbone.at():
            vectors.move(backbone.bound, backbone.pretrained, [self.directions.of(place)], [self.about["scale"]])
            return head.logits(backbone.features(images, per_patch=head.task_type.per_patch))

    def predict(self, images: Source | Iterable[Source], task: str | None = None) -> list[Prediction]:
        """Answer for one image, or for any number of them, by every task's head or by one task's.

        An image is a path, an image of Pillow, an array of pixels (uint8, height x width, or with 3 or 4 channels
        behind), a tensor (uint8, channels first), a file opened in binary mode, or its bytes. Answers are one list,
        image by image; images without a path are called ``image 0``, ``image 1`` and so on. Threads may share a model.
        """
        if task is not None and str(task) not in self.heads:
            raise unknown("task", str(task), self.heads)
        tasks, given = list(self.heads) if task is None else [str(task)], named(images)
        answers: list[Prediction] = []
        while batch := list(itertools.islice(given, CHUNK)):
            answers += self.answers([name for name, _ in batch], [self.view(*image) for image in batch], tasks)
        return answers

    def view(self, name: str, image: Source) -> UInt8[np.ndarray, "3 size size"]:
        """Return an image as the encoder sees it."""
        with corrupt(name):
            return resize_and_crop(decode(image, name, self.backbone.preprocessing), self.backbone.preprocessing)

    def answers(
        self, names: Sequence[str], views: Sequence[UInt8[np.ndarray, "3 size size"]], tasks: Sequence[str]
    ) -> Iterator[Prediction]:
        """Yield the answers of tasks for decoded images; scores that are no numbers are an error."""
        scores = {task: logits.cpu() for task, logits in self.scores(np.stack(views), tasks).items()}
        for index, name in enumerate(names):
            for task in tasks:
                logits = scores[task][index]
                if not bool(logits.isfinite().all()):
                    raise TaskvecError(
                        f"the model's scores of '{name}' for task '{task}' are no numbers: its weights are too large",
                        RESTORE,
                    )
                yield Prediction(name, task, *self.heads[task].task_type.describe(logits, self.classes[task]))


def save_model(
    folder: Path,
    backbone: Backbone,
    weights: Weights,
    heads: Mapping[str, Head],
    classes: Sequence[Sequence[str]],
    about: Mapping[str, Any],
    directions: TaskDirections | None = None,
) -> None:
    """Write encoder.safetensors, heads.safetensors and model.json (classes, preprocessing, method, scale, digests).

    A per-task merge has its ``directions`` in a file of their own, beside the pre-trained encoder; model.json says of
    which tasks they are, in order, and how many bytes each adds. A linearised encoder has the weights that it is
    expanded around in a file of their own. The precision that its passes may have on a GPU is there if not float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save(weights, folder / ENCODER)
    if backbone.base is not None:
        save(backbone.base, folder / BASE)
    save_heads(dict(heads), folder / HEADS)
    record: dict[str, Any] = {
        "name": backbone.name,
        "architecture": backbone.architecture,
        "packages": versions(families.packages(backbone.architecture["family"])),
        "preprocessing": backbone.preprocessing.to_json(),
        "width": backbone.width,
        "tasks": [{"name": name, "classes": list(c)} for name, c in zip(heads, classes, strict=True)],
    }
    if backbone.base is not None:
        record["linearised"] = True
    if backbone.precision != "float32":
        record["precision"] = backbone.precision
    if directions is not None:
        save_directions(directions, folder / DIRECTIONS)
        record |= {"bytes_per_task": directions.bytes_per_task, "directions": list(heads)}
    record["files"] = digests(folder)
    write_json(folder / ABOUT, record | dict(about))


def digests(folder: Path) -> dict[str, str]:
    """Return the digests of a model's files of weights, which belong together, by their names."""
    present = [name for name in (ENCODER, HEADS, BASE, DIRECTIONS) if (folder / name).exists()]
    return {name: file_digest(folder / name) for name in present}


class TaskRecord(Record):
    """A task of a kept model."""

    name: str = Field(min_length=1)
    classes: list[str] = Field(min_length=1)

    @pydantic.field_validator("classes")
    @classmethod
    def distinct(cls, classes: list[str]) -> list[str]:
        """Raise where two outputs have one name."""
        twice = next((name for name in classes if classes.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two classes are named '{twice}'")
        return classes


class ModelRecord(Encoder):
    """The fields of model.json; further ones are of no concern."""

    name: str
    tasks: list[TaskRecord] = Field(min_length=1)
    method: str
    correction: str | None = None
    statistics: str | None = None
    scaling: str | None = None
    config: dict[str, Any] | None = None
    heads: str
    scale: Scale
    scales: list[Scale] | None = None
    validation: float = Field(ge=0, le=1)
    bytes_per_task: int | None = None
    directions: list[str] | None = None
    linearised: bool | None = None
    precision: PassPrecision = "float32"
    files: dict[str, str] | None = None

    @pydantic.model_validator(mode="after")
    def one_a_task(self) -> ModelRecord:
        """Raise where scales or directions are not of the tasks, in their order."""
        names = [task.name for task in self.tasks]
        if self.directions not in (None, names) or (self.scales and len(self.scales) != len(names)):
            raise ValueError(f"its scales or directions are not those of the tasks {', '.join(names)}")
        return self


def load(folder: str | Path, device: str = "auto") -> MultiTaskModel:
    """Load a model folder, or the best model (on validation) of a run folder; files that do not fit are an error."""
    chosen = find_model(Path(folder))
    record = read_record(chosen / ABOUT, ModelRecord)
    backbone = open_encoder(chosen, record, choose_device(device))
    if backbone.device.startswith("cuda"):
        backbone.precision = record.precision
    heads = {name: head.on(backbone.device) for name, head in open_heads(chosen, record, backbone).items()}
    directions = open_directions(chosen, record, backbone)
    check_files(chosen, record)
    classes = {task.name: task.classes for task in record.tasks}
    return MultiTaskModel(backbone, heads, classes, record.model_dump(include=TOLD, exclude_unset=True), directions)


def check_files(folder: Path, record: ModelRecord) -> None:
    """Raise where a file fits and is not the one that the model was written with, such as another run's heads."""
    if record.files is None:
        return
    other = sorted(set(digests(folder).items()) ^ set(record.files.items()))
    if other:
        raise TaskvecError(f"'{folder / other[0][0]}' is not the file that {ABOUT} was written with", RESTORE)


def open_encoder(folder: Path, record: ModelRecord, device: str) -> Backbone:
    """Open a model's encoder, linearised around weights of their own where the folder has them."""
    base, linear = folder / BASE, record.linearised
    if base.exists() != (base.exists() if linear is None else linear):
        what = "is missing" if linear else "does not belong to this model"
        raise TaskvecError(f"'{base}' {what}: {ABOUT} says whether the encoder is linearised", RESTORE)
    if not base.exists():
        return restore(folder / ABOUT, folder / ENCODER, device, record.name)
    backbone = linearised(restore(folder / ABOUT, base, device, record.name))
    backbone.use(read_weights(folder / ENCODER, backbone.pretrained))
    return backbone


def open_heads(folder: Path, record: ModelRecord, backbone: Backbone) -> dict[str, Head]:
    """Open the heads of a model's tasks: one for each, that reads its encoder's features and scores its classes."""
    path, wanted = folder / HEADS, {task.name: len(task.classes) for task in record.tasks}
    heads = read_heads(path)
    if set(heads) != set(wanted) or len(wanted) < len(record.tasks):
        tasks = ", ".join(task.name for task in record.tasks)
        raise TaskvecError(
            f"'{path}' has heads of {', '.join(heads) or 'no task'}; the tasks of {ABOUT} are {tasks}", RESTORE
        )
    for name, head in heads.items():
        if tuple(head.weight.shape) != (wanted[name], backbone.width):
            shapes = f"{list(head.weight.shape)}, not [{wanted[name]} classes, {backbone.width} features]"
            raise TaskvecError(f"'{path}': the head of '{name}' has the shape {shapes}", RESTORE)
    return {name: heads[name] for name in wanted}


def open_directions(folder: Path, record: ModelRecord, backbone: Backbone) -> TaskDirections | None:
    """Open the directions of a per-task merge, of which model.json tells how many bytes a task they take."""
    path, size = folder / DIRECTIONS, record.bytes_per_task
    if not path.exists() and size is None:
        return None
    directions = read_directions(path, backbone.pretrained)
    if (len(directions.masks), directions.bytes_per_task) != (len(record.tasks), size):
        what = f"{len(directions.masks)} tasks of {directions.bytes_per_task} bytes"
        raise TaskvecError(f"'{path}' is of {what}; {ABOUT} has {len(record.tasks)} of {size}", RESTORE)
    return directions


def find_model(folder: Path) -> Path:
    """Return the folder itself if it is a model's, or the model of a run with the best mean validation accuracy."""
    if (folder / ABOUT).is_file():
        return folder
    models = sorted((folder / "models").glob(f"*/{ABOUT}"))
    if not models:
        raise TaskvecError(
            f"no model in '{folder}'", "give a run folder (it holds models/) or one of the folders in its models/"
        )
    return max(models, key=lambda path: read_record(path, ModelRecord).validation).parent
