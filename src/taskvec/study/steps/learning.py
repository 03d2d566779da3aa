"""Steps that make heads and fine-tuned encoders: probes, zero-shot heads, training, checkpoints that tasks bring."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taskvec.core.files import read_json, write_json
from taskvec.core.notes import note
from taskvec.core.settings import Finetune, Lora, Probe
from taskvec.core.task_types import CLASSIFICATION
from taskvec.core.training import Progress
from taskvec.encoders import backbone as backbones
from taskvec.encoders.backbone import Backbone
from taskvec.encoders.loaders.checkpoints import parts
from taskvec.engine.pipeline import always, on_cpu, step_type
from taskvec.evaluation import accuracy as evaluation
from taskvec.evaluation import scale_search as search
from taskvec.learning import external as brought
from taskvec.learning import finetuning
from taskvec.learning.heads import class_texts, probe, read_heads, save_heads, zero_shot_head
from taskvec.study.artifacts import (
    Config,
    Inputs,
    open_backbone,
    open_head,
    open_heads,
    open_task,
    open_tasks,
    save_head,
    validations,
)
from taskvec.weights.flat import save


@step_type(1, ("torch",), threaded=always)
def probe_task(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Probe a task at all learning rates on cached features."""
    task, cached = open_task(inputs), inputs["features"][0]
    probed = probe(
        torch.from_numpy(np.load(cached / "train.npy")),
        torch.from_numpy(task.train.labels),
        torch.from_numpy(np.load(cached / "validation.npy")),
        torch.from_numpy(task.validation.labels),
        len(task.classes),
        Probe(**config["probe"]),
        config["seed"],
        progress,
        task.kind,
    )
    save_heads({str(index): head for index, head in enumerate(probed.heads)}, out / "heads.safetensors")
    write_json(out / "probe.json", {"rates": probed.rates, "validation": probed.validation})


@step_type(1)
def choose_rate(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose one learning rate by the mean validation accuracy over the probes read; ties go to the smaller."""
    curves = [read_json(folder / "probe.json") for folder in inputs["probes"]]
    means = np.mean([curve["validation"] for curve in curves], axis=0)
    rates = curves[0]["rates"]
    best = search.choose(rates, means.tolist())
    write_json(out / "rate.json", {"index": rates.index(best), "rate": best})


@step_type(1)
def pick_head(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Keep the head of the chosen learning rate, with its validation accuracy."""
    index = read_json(inputs["rate"][0] / "rate.json")["index"]
    folder = inputs["probe"][0]
    save_head(read_heads(folder / "heads.safetensors")[str(index)], out)
    write_json(out / "metrics.json", {"validation": read_json(folder / "probe.json")["validation"][index]})


@step_type(1, ("torch",), threaded=always)
def zero_shot(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Build a task's head from the captions of its classes, and measure it on validation."""
    backbone, task = open_backbone(inputs, config), open_task(inputs)
    groups = config["captions"]  # one caption a class, or several
    several = isinstance(groups[0], list)
    every = [caption for group in groups for caption in group] if several else groups
    texts, scale = backbones.text_features(config["address"], every, config["allow_pickle"])
    head = zero_shot_head(class_texts(texts, list(map(len, groups))) if several else texts, scale)
    save_head(head, out)
    right = evaluation.correct(backbone, backbone.pretrained, task.validation, head)
    write_json(out / "metrics.json", {"validation": float(right.mean())})


@step_type(2, ("torch", "numpy"), threaded=on_cpu)
def finetune(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Fine-tune the encoder with its head frozen or learning (from a random head if none), and measure both.

    Trials of learning rates keep the measure only: encoders are large, and the winner is trained again with its seed.
    """
    backbone, task = open_backbone(inputs, config), open_task(inputs)
    head = open_head(inputs) if "head" in inputs else None
    settings = finetune_settings(config, inputs)
    how = (settings, config["seed"], config["precision"], progress)
    facts = training_facts(config, settings, backbone)
    try:
        lora = Lora(**config["lora"]) if "lora" in config else None
        tuned = finetuning.finetune_tasks(backbone, [task], [head], *how, head_learns=config["head_learns"], lora=lora)
        weights, head = tuned.encoder, tuned.heads[0]
    except finetuning.DivergedError:
        if "trial" not in config:
            raise
        note(f"fine-tuning diverged at learning rate {settings.learning_rate:g}, which counts as accuracy 0")
        write_json(out / "metrics.json", {"validation": 0.0, "diverged": True, **facts})
        return
    if "trial" not in config:
        save(weights, out / "encoder.safetensors")
        save_head(head, out)
    right = evaluation.correct(backbone, weights, task.validation, head)
    tell_unlearned(right)
    facts |= {} if head.kind == CLASSIFICATION else {"metric": head.rules.metric}
    write_json(out / "metrics.json", {"validation": float(right.mean()), **facts})


def tell_unlearned(right: evaluation.Scores) -> None:
    """Tell where a fine-tuned encoder has nothing right, so that no merge can be measured by it."""
    if not right.any():
        note(
            "the fine-tuned encoder gets no validation image right: nothing can be normalised by it, and scales are "
            "chosen by the mean of plain accuracies"
        )


def finetune_settings(config: Config, inputs: Inputs) -> Finetune:
    """Return the settings of fine-tuning, with the learning rate that a search has chosen where there was one."""
    settings = Finetune(**config["finetune"])
    if "rate" not in inputs:
        return settings
    return settings.model_copy(update={"learning_rate": read_json(inputs["rate"][0] / "rate.json")["rate"]})


def training_facts(config: Config, settings: Finetune, backbone: Backbone) -> dict[str, Any]:
    """Return what a fine-tuned encoder's record says of its training."""
    precision = finetuning.training_precision(backbone, config["precision"])
    if config["precision"] not in ("wide", precision):
        note(f"trained in {precision}, not in {config['precision']} as asked: a linearised encoder needs it")
    return {"precision": precision, "learning_rate": settings.learning_rate}


@step_type(1, ("torch", "numpy"), threaded=on_cpu)
def finetune_joint(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Fine-tune one encoder on all tasks at once with their heads frozen, and measure it on every validation split."""
    backbone, every, heads = open_backbone(inputs, config), open_tasks(inputs), open_heads(inputs)
    settings = finetune_settings(config, inputs)
    how = (settings, config["seed"], config["precision"], progress)
    weights = finetuning.finetune_tasks(backbone, every, heads, *how).encoder
    save(weights, out / "encoder.safetensors")
    measured = [
        float(evaluation.correct(backbone, weights, task.validation, head).mean())
        for task, head in zip(every, heads, strict=True)
    ]
    write_json(out / "metrics.json", {"validation": measured, **training_facts(config, settings, backbone)})


@step_type(2, ("torch",), threaded=on_cpu)
def import_finetuned(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Take a fine-tuned encoder and its head from files in the place of training, and measure both."""
    backbone, task = open_backbone(inputs, config), replace(open_task(inputs), name=config["task"])
    path, start = Path(config["finetuned"]), open_head(inputs) if "head" in inputs else None
    found = brought.read_finetuned(path, backbone, config["allow_pickle"])
    if "head" in config:
        head = brought.read_head(Path(config["head"]), config["classes"], task, backbone.width)
    else:
        head = brought.head_of(found, config["classes"], task, backbone.width, start)
    save(found.encoder, out / "encoder.safetensors")
    save_head(head, out)
    right = evaluation.correct(backbone, found.encoder, task.validation, head)
    tell_unlearned(right)
    facts: Config = {"metric": head.rules.metric} if head.kind != CLASSIFICATION else {}
    if "head" in config and found.classifier:
        note(f"'{path}': left out {parts(sorted(found.classifier))}, since a head is given")
    facts |= {"left_out": sorted(found.classifier)} if "head" in config else {}
    write_json(out / "metrics.json", {"validation": float(right.mean()), **facts})


@step_type(2)
def choose_learning_rate(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose the fine-tuning rate with the highest validation accuracy on one task; ties go to the smaller."""
    rates, values = config["rates"], validations(inputs["finetuned"])
    write_json(
        out / "rate.json", {"rate": search.choose(rates, values)}
    )  # no more: what reads it depends on the choice alone
