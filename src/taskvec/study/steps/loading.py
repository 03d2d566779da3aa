"""Steps that load backbones, decode tasks, and cache the frozen encoder's features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from taskvec.core.files import read_json, write_json
from taskvec.core.notes import note
from taskvec.core.progress import Progress
from taskvec.data import tasks
from taskvec.data.images import Preprocessing
from taskvec.data.sources import parse
from taskvec.data.splits import SPLITS
from taskvec.encoders import backbone as backbones
from taskvec.encoders import batch_norm, records
from taskvec.engine.pipeline import Config, Inputs, Step, Untracked, step_type
from taskvec.engine.work import Work
from taskvec.evaluation import precision
from taskvec.learning.heads import features_of
from taskvec.study import artifacts
from taskvec.study.artifacts import AGREEMENTS, ENCODER, PRECISION, OnDevice
from taskvec.study.forecast.sizes import NUMBER, Sizes, encoder, small_side

WIDER = 4 / 3
"""How much longer the long side of a photograph is."""

NEAR = (0.0, 0.05)
"""Scales at which predictions in different precisions are compared, beside the middle of the grid."""


class BackboneConfig(Config):
    """Which encoder is loaded: ``source`` is what identifies its weights, wherever its address finds them."""

    source: dict[str, Any]
    size: int | None
    projection: bool | None = None
    batch_norm: str = "merged"
    address: Untracked[str]
    name: Untracked[str]
    allow_pickle: Untracked[bool]

    def threaded(self) -> bool:
        """Return whether it is an encoder of the lab along its pre-training, which is then run again."""
        return "recipe" in self.source


@step_type(3, ("torch",), writes=(ENCODER, "backbone.json"), work=encoder)
def load_backbone(config: BackboneConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Load a pre-trained encoder by address and keep its weights as safetensors."""
    how = ("cpu", config.allow_pickle, config.projection)
    backbone = backbones.load_backbone(config.address, config.size, config.name, *how)
    if config.batch_norm != "merged":
        batch_norm.check(backbone)
    records.write_backbone(backbone, out)


@step_type(1, reads=["backbone"], writes=["preprocessing.json"])
def preprocessing(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Keep the part of the preprocessing that decides decoded pixels, so that backbones share decoded tasks."""
    record = read_json(inputs["backbone"] / "backbone.json")
    write_json(out / "preprocessing.json", Preprocessing.from_json(record["preprocessing"]).decoding())


class DecodeConfig(Config):
    """Which images are decoded: ``source`` is what identifies them; where nothing does, their address counts."""

    source: dict[str, Any]
    limit: int | None
    skip_corrupt: bool = False
    address: str

    def tracked(self) -> dict[str, Any]:
        """Return what counts."""
        fields = super().tracked()
        return {n: v for n, v in fields.items() if n != "address"} if parse(self.address).source.has_whole else fields

    def reading(self) -> dict[str, Any]:
        """Return how images are read: whether corrupt ones are skipped, and what the plan knew of the task."""
        return {"skip_corrupt": self.skip_corrupt, "known": self.source}

    def decoding(self, images: float, disk: float) -> Work:
        """Return the decoding of so many images into so many bytes: photographs, or small ones.

        The lab draws all images of a task, also where a study is limited to some.
        """
        address = parse(self.address)
        if address.source.counts:
            return Work(drawings=self.source["images"], disk=disk)
        return Work(drawings=images, disk=disk) if small_side(address) else Work(photographs=images, disk=disk)


def views(step: Step, sizes: Sizes) -> Work:
    """Every image is decoded once, to uint8."""
    images = sum(sizes.decoded(step)[1:])
    work: Work = step.config.decoding(images, images * (3 * sizes.backbone(step).size ** 2 + 8))
    return work


@step_type(
    3,
    ("numpy", "pillow", "torch"),  # torch draws the splits
    reads=["preprocessing"],
    writes=["classes.json", *(f"{split}{end}.npy" for split in SPLITS for end in ("", "-labels"))],
    work=views,
)
def decode_task(config: DecodeConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Decode the evaluation views of a task's images once."""
    tasks.write_task(config.address, artifacts.open_view(inputs), config.limit, out, progress, **config.reading())


def whole_images(step: Step, sizes: Sizes) -> Work:
    """Training images are decoded whole: at most to the short side of the view before its crop, 4:3 on average."""
    images, shape = sizes.decoded(step).train, sizes.backbone(step)
    short = shape.size / (shape.view.crop if shape.view else 1)
    pixels = WIDER * min(short, small_side(parse(step.config.address)) or short) ** 2
    work: Work = step.config.decoding(images, images * (3 * pixels + 16))
    return work


@step_type(
    3,
    ("numpy", "pillow", "torch"),
    reads=["preprocessing"],
    writes=["pixels.npy", "shapes.npy", "kept.json"],
    work=whole_images,
)
def decode_training(config: DecodeConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Decode a task's whole training images once."""
    tasks.write_training(config.address, artifacts.open_view(inputs), config.limit, out, progress, **config.reading())


class PrecisionConfig(OnDevice):
    """The precision that the study wants, and the scales at which predictions are compared."""

    wanted: str
    scales: tuple[float, ...]


def compared(step: Step, sizes: Sizes) -> Work:
    """A sample passes once for heads, and at every scale in float32 and in each precision that is tried."""
    passes = 2 * len(step.config.scales) * (len(precision.FASTEST) if step.config.wanted == "auto" else 1)
    fitted = min(sum(size.train for size in sizes.tasks(step)), precision.FITTED)
    return sizes.passes(step, fitted + passes * precision.PREDICTED)


@step_type(1, ("torch",), reads=["backbone", "tasks"], writes=[AGREEMENTS], work=compared, heading="probing")
def compare_precisions(config: PrecisionConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Compare what an encoder predicts on a GPU in several precisions, on a sample of all tasks."""
    backbone, tasks = artifacts.open_backbone(inputs, config), artifacts.open_tasks(inputs)
    choice = precision.choose_precision(backbone, tasks, config.scales, config.wanted, progress=progress)
    if text := choice.explanation():
        note(text)
    write_json(out / AGREEMENTS, choice.to_json())


@step_type(1, reads=["comparison"], writes=[PRECISION])
def choose_precision(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Keep the precision of an encoder's passes alone, so that another comparison with the same outcome counts not."""
    write_json(out / PRECISION, {"precision": read_json(inputs["comparison"] / AGREEMENTS)["precision"]})


def feature_work(step: Step, sizes: Sizes) -> Work:
    """Training and validation images pass once."""
    images = sizes.task(step).train + sizes.task(step).validation
    return sizes.passes(step, images, disk=NUMBER * images * sizes.backbone(step).width)


@step_type(
    1,
    ("torch",),
    reads=["backbone", "precision", "task"],
    writes=["train.npy", "validation.npy"],
    work=feature_work,
    heading="probing",
)
def features(config: OnDevice, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Cache the frozen encoder's features of training and validation images."""
    backbone, task = artifacts.open_backbone(inputs, config), artifacts.open_task(inputs)
    total = len(task.train) + len(task.validation)
    share = len(task.train) / total
    train, _ = features_of(backbone, task.train, task.kind, lambda x: progress(x * share))
    validation, _ = features_of(backbone, task.validation, task.kind, lambda x: progress(share + x * (1 - share)))
    np.save(out / "train.npy", train.cpu().numpy())
    np.save(out / "validation.npy", validation.cpu().numpy())
