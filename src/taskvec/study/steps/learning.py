"""Steps that make heads and fine-tuned encoders: probes, zero-shot heads, training, checkpoints that tasks bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taskvec.core.compute import WIDTHS, choose_device
from taskvec.core.files import read_json, write_json
from taskvec.core.notes import note
from taskvec.core.progress import Progress
from taskvec.core.settings import Finetune, Lora, Probe
from taskvec.core.task_types import CLASSIFICATION
from taskvec.core.training import DivergedError
from taskvec.encoders.backbone import Backbone, text_features
from taskvec.engine.pipeline import Config, Inputs, Step, Untracked, step_type
from taskvec.engine.work import Work
from taskvec.evaluation.accuracy import Scores, accuracy, per_image_scores
from taskvec.evaluation.scale_search import best_candidate
from taskvec.learning import external, finetuning
from taskvec.learning.heads import Head, class_texts, probe, read_heads, save_heads, zero_shot_head
from taskvec.study import artifacts
from taskvec.study.artifacts import ENCODER, HEAD, HEADS, METRICS, RATE, OnDevice
from taskvec.study.forecast.sizes import Sizes, validating
from taskvec.weights.flat import save
from taskvec.weights.keys import parts

LOSSES = "losses.npy"
"""The loss of every step of fine-tuning and its learning rate."""


class ProbeConfig(OnDevice):
    """How a task is probed; without a device on the CPU."""

    probe: Probe
    seed: int

    def unused(self) -> dict[str, set[str]]:
        """Return the settings that only choose among the probes."""
        return {"probe": {"rate_per_task"}}


def probe_work(step: Step, sizes: Sizes) -> Work:
    """A head for every learning rate, on cached features."""
    settings = step.config.probe
    return sizes.heads(step, settings, sizes.task(step), len(settings.learning_rates))


@step_type(1, ("torch",), reads=["task", "features"], writes=[HEADS, "probe.json"], work=probe_work, heading="probing")
def probe_task(config: ProbeConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Probe a task at all learning rates on cached features."""
    task, device = artifacts.open_task(inputs), choose_device(config.device or "cpu")
    cached = {
        split: torch.from_numpy(np.load(inputs["features"] / f"{split}.npy")) for split in ("train", "validation")
    }
    probed = probe(
        cached["train"].to(device),
        torch.from_numpy(task.train.labels).to(device),
        cached["validation"].to(device),
        torch.from_numpy(task.validation.labels).to(device),
        len(task.classes),
        config.probe,
        config.seed,
        progress,
        task.kind,
    )
    save_heads({str(index): head for index, head in enumerate(probed.heads)}, out / HEADS)
    write_json(out / "probe.json", {"rates": probed.rates, "validation": probed.validation})


@step_type(1, reads=["probes"], writes=[RATE], heading="probing")
def choose_rate(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose one learning rate by the mean validation accuracy over the probes read; ties go to the smaller."""
    curves = [read_json(folder / "probe.json") for folder in inputs["probes"]]
    means = np.mean([curve["validation"] for curve in curves], axis=0)
    rates = curves[0]["rates"]
    best = best_candidate(rates, means.tolist())
    write_json(out / RATE, {"index": rates.index(best), "rate": best})


@step_type(1, reads=["probe", "rate"], writes=[HEAD, METRICS], heading="probing")
def pick_head(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Keep the head of the chosen learning rate, with its validation accuracy."""
    index, folder = read_json(inputs["rate"] / RATE)["index"], inputs["probe"]
    artifacts.save_head(read_heads(folder / HEADS)[str(index)], out)
    write_json(out / METRICS, {"validation": read_json(folder / "probe.json")["validation"][index]})


class ZeroShotConfig(OnDevice):
    """Of which captions a head is made: one a class, or several; ``text`` identifies the text tower."""

    captions: list[str] | list[list[str]]
    text: str
    address: Untracked[str]
    allow_pickle: Untracked[bool]

    def threaded(self) -> bool:
        """Return that threads count: captions are read on the CPU, whatever the device."""
        return True


@step_type(
    1, ("torch",), reads=["backbone", "precision", "task"], writes=[HEAD, METRICS], work=validating, heading="probing"
)
def zero_shot(config: ZeroShotConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Build a task's head from the captions of its classes, and measure it on validation."""
    backbone, task = artifacts.open_backbone(inputs, config), artifacts.open_task(inputs)
    groups = [[caption] if isinstance(caption, str) else caption for caption in config.captions]
    every = [caption for group in groups for caption in group]
    texts, scale = text_features(config.address, every, config.allow_pickle)
    several = isinstance(config.captions[0], list)
    head = zero_shot_head(class_texts(texts, list(map(len, groups))) if several else texts, scale)
    artifacts.save_head(head, out)
    right = per_image_scores(backbone, backbone.pretrained, task.validation, head)
    write_json(out / METRICS, {"validation": float(right.mean())})


class TrainingConfig(OnDevice):
    """How an encoder is fine-tuned; the learning rate does not count where a step has searched it."""

    finetune: Finetune
    searched: Untracked[bool] = False
    seed: int
    precision: str

    def unused(self) -> dict[str, set[str]]:
        """Return what is of the search."""
        return {"finetune": {"learning_rates"} | ({"learning_rate"} if self.searched else set())}

    def settings(self, inputs: Inputs) -> Finetune:
        """Return the settings, with the learning rate that a search has chosen where there was one."""
        if inputs["rate"] is None:
            return self.finetune
        return self.finetune.model_copy(update={"learning_rate": read_json(inputs["rate"] / RATE)["rate"]})

    def facts(self, settings: Finetune, backbone: Backbone) -> dict[str, Any]:
        """Return what a fine-tuned encoder's record says of its training."""
        precision = finetuning.training_precision(backbone, self.precision)
        if self.precision not in (*WIDTHS, precision):
            note(f"trained in {precision}, not in {self.precision} as asked: a linearised encoder needs it")
        return {"precision": precision, "learning_rate": settings.learning_rate}


class FinetuneConfig(TrainingConfig):
    """How an encoder is fine-tuned on a task: ``trial`` measures a learning rate, and keeps no encoder."""

    head_learns: bool
    trial: bool = False
    lora: Lora | None = None
    peft: str | None = None


def training_work(step: Step, sizes: Sizes) -> Work:
    """So many batches pass forward and back, shared by the tasks, then validation images; trials keep no encoder."""
    settings, read = step.config.finetune, sizes.tasks(step)
    share = max(1, settings.batch_size // settings.accumulate // len(read))
    images = settings.steps * settings.accumulate * sum(min(share, size.train) for size in read)
    disk = 0.0 if getattr(step.config, "trial", False) else sizes.weights(step)
    updates = settings.steps * settings.accumulate
    return validating(step, sizes) + sizes.passes(step, 0, images, disk, updates)


@step_type(
    3,
    ("torch", "numpy"),
    reads=["backbone", "precision", "task", "whole", "head", "rate"],
    writes=lambda config: (METRICS, LOSSES) if config.trial else (ENCODER, HEAD, METRICS, LOSSES),
    work=training_work,
    heading="training",
)
def finetune(config: FinetuneConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Fine-tune the encoder with its head frozen or learning (from a random head if none), and measure both.

    Trials of learning rates keep the measure only: encoders are large, and the winner is trained again with its seed.
    """
    backbone, task = artifacts.open_backbone(inputs, config), artifacts.open_task(inputs)
    settings = config.settings(inputs)
    head = artifacts.open_head(inputs["head"]) if inputs["head"] else None
    how = (settings, config.seed, config.precision, progress)
    facts = config.facts(settings, backbone)
    try:
        learns, lora = config.head_learns, config.lora
        tuned = finetuning.finetune_tasks(backbone, [task], [head], *how, head_learns=learns, lora=lora)
        weights, head = tuned.encoder, tuned.heads[0]
    except DivergedError as error:
        if not config.trial:
            raise
        note(f"{error.problem}; it counts as accuracy 0")
        save_losses(error.losses, settings, out)
        write_json(out / METRICS, {"validation": 0.0, "diverged": True, **facts})
        return
    save_losses(tuned.losses, settings, out)
    if not config.trial:
        save(weights, out / ENCODER)
        artifacts.save_head(head, out)
    right = per_image_scores(backbone, weights, task.validation, head)
    tell_unlearned(right)
    write_json(out / METRICS, {"validation": float(right.mean()), **facts, **metric_of(head)})


def save_losses(losses: Sequence[float], settings: Finetune, out: Path) -> None:
    """Write the loss of every step of fine-tuning, and its learning rate, which rises and falls."""
    schedule = finetuning.schedule_of(settings)
    rates = [settings.learning_rate * schedule.factor(step) for step in range(len(losses))]
    np.save(out / LOSSES, np.array([losses, rates]).T)


def metric_of(head: Head) -> dict[str, str]:
    """Return the metric that a record tells, where it is not accuracy."""
    return {} if head.kind == CLASSIFICATION else {"metric": head.task_type.metric}


def tell_unlearned(right: Scores) -> None:
    """Tell where a fine-tuned encoder has nothing right, so that no merge can be measured by it."""
    if not right.any():
        note(
            "the fine-tuned encoder gets no validation image right: nothing can be normalised by it, and scales are "
            "chosen by the mean of plain accuracies"
        )


@step_type(
    2,
    ("torch", "numpy"),
    reads=["backbone", "precision", "tasks", "whole", "heads", "rate"],
    writes=[ENCODER, METRICS, LOSSES],
    work=training_work,
    heading="training",
)
def finetune_joint(config: TrainingConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Fine-tune one encoder on all tasks at once with their heads frozen, and measure it on every validation split."""
    backbone, every = artifacts.open_backbone(inputs, config), artifacts.open_tasks(inputs)
    heads = artifacts.open_heads(inputs["heads"])
    settings = config.settings(inputs)
    how = (settings, config.seed, config.precision, progress)
    tuned = finetuning.finetune_tasks(backbone, every, heads, *how)
    save(tuned.encoder, out / ENCODER)
    save_losses(tuned.losses, settings, out)
    measured = [
        accuracy(backbone, tuned.encoder, task.validation, head) for task, head in zip(every, heads, strict=True)
    ]
    write_json(out / METRICS, {"validation": measured, **config.facts(settings, backbone)})


class ExternalConfig(OnDevice):
    """Which files stand in for training: ``source`` has their digests, ``parts`` what is read of them."""

    source: dict[str, str]
    classes: list[str]
    parts: dict[str, Any] | None = None
    task: Untracked[str]
    finetuned: Untracked[str]
    head: Untracked[str] = ""
    allow_pickle: Untracked[bool]


def external_work(step: Step, sizes: Sizes) -> Work:
    """The validation images pass; the encoder is written once more."""
    return validating(step, sizes) + Work(disk=sizes.weights(step))


@step_type(
    2,
    ("torch",),
    reads=["backbone", "precision", "task", "head"],
    writes=[ENCODER, HEAD, METRICS],
    work=external_work,
    heading="unseen training",
)
def import_finetuned(config: ExternalConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Take a fine-tuned encoder and its head from files in the place of training, and measure both."""
    backbone, task = artifacts.open_backbone(inputs, config), replace(artifacts.open_task(inputs), name=config.task)
    path, start = Path(config.finetuned), artifacts.open_head(inputs["head"]) if inputs["head"] else None
    checkpoint = external.read_finetuned(path, backbone, config.allow_pickle)
    if config.head:
        head = external.read_head(Path(config.head), config.classes, task, backbone.width)
    else:
        head = external.head_of(checkpoint, config.classes, task, backbone.width, start)
    save(checkpoint.encoder, out / ENCODER)
    artifacts.save_head(head, out)
    right = per_image_scores(backbone, checkpoint.encoder, task.validation, head)
    tell_unlearned(right)
    facts: dict[str, Any] = {"validation": float(right.mean()), **metric_of(head)}
    if config.head and checkpoint.classifier:
        note(f"'{path}': left out {parts(sorted(checkpoint.classifier))}, since a head is given")
    facts |= {"left_out": sorted(checkpoint.classifier)} if config.head else {}
    write_json(out / METRICS, facts)


class RatesConfig(Config):
    """Which learning rates were tried."""

    rates: list[float]


@step_type(2, reads=["finetuned"], writes=[RATE], heading="training")
def choose_learning_rate(config: RatesConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose the fine-tuning rate with the highest validation accuracy on one task; ties go to the smaller.

    It writes no more: what reads it depends on the choice alone.
    """
    write_json(out / RATE, {"rate": best_candidate(config.rates, artifacts.validations(inputs["finetuned"]))})
