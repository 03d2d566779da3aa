"""Steps that load backbones, decode tasks, and cache the frozen encoder's features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from taskvec.core.files import read_json, write_json
from taskvec.core.progress import Progress
from taskvec.data import tasks
from taskvec.data.images import Preprocessing
from taskvec.encoders import backbone as backbones
from taskvec.encoders import batch_norm, records
from taskvec.engine.pipeline import on_cpu, step_type
from taskvec.learning.heads import features_of
from taskvec.study.artifacts import Config, Inputs, open_backbone, open_task, open_view


def trains_snapshot(config: Mapping[str, Any]) -> bool:
    """Say whether a backbone is an encoder of the lab along its pre-training, which is then run again."""
    return "recipe" in config["source"]


@step_type(3, ("torch",), threaded=trains_snapshot)
def load_backbone(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Load a pre-trained encoder by address and keep its weights as safetensors."""
    backbone = backbones.load_backbone(
        config["address"], config["size"], config["name"], "cpu", config["allow_pickle"], config.get("projection")
    )
    if config.get("batch_norm"):
        batch_norm.check(backbone)
    records.write_backbone(backbone, out)


@step_type(1)
def preprocessing(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Keep the part of the preprocessing that decides decoded pixels, so that backbones share decoded tasks."""
    record = read_json(inputs["backbone"][0] / "backbone.json")
    write_json(out / "preprocessing.json", Preprocessing.from_json(record["preprocessing"]).decoding())


@step_type(3, ("numpy", "pillow"))
def decode_task(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Decode the evaluation views of a task's images once."""
    tasks.write_task(config["address"], open_view(inputs), config["limit"], out, progress, **reading(config))


@step_type(3, ("numpy", "pillow"))
def decode_training(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Decode a task's whole training images once."""
    tasks.write_training(config["address"], open_view(inputs), config["limit"], out, progress, **reading(config))


def reading(config: Config) -> Config:
    """Return how images are read: whether corrupt ones are skipped, and what the plan knew of the task."""
    return {"skip_corrupt": config.get("skip_corrupt", False), "known": config["source"]}


@step_type(1, ("torch",), threaded=on_cpu)
def features(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Cache the frozen encoder's features of training and validation images."""
    backbone, task = open_backbone(inputs, config), open_task(inputs)
    total = len(task.train) + len(task.validation)
    share = len(task.train) / total
    train, _ = features_of(backbone, task.train, task.kind, lambda x: progress(x * share))
    validation, _ = features_of(backbone, task.validation, task.kind, lambda x: progress(share + x * (1 - share)))
    np.save(out / "train.npy", train.numpy())
    np.save(out / "validation.npy", validation.numpy())
