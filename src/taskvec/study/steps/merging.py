"""Steps that merge task vectors and try the scales of a merge on validation."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taskvec.core.files import read_json, write_json
from taskvec.core.notes import note
from taskvec.core.settings import Probe, Surgery
from taskvec.core.task_types import KINDS
from taskvec.core.training import Progress
from taskvec.encoders import batch_norm
from taskvec.engine.pipeline import always, on_cpu, step_type
from taskvec.evaluation import accuracy as evaluation
from taskvec.evaluation import scale_search as search
from taskvec.evaluation.alignment import agreement_curve
from taskvec.learning.heads import accuracy, features_of, save_heads
from taskvec.learning.surgery import fit_surgery
from taskvec.merging import in_memory as buffers
from taskvec.merging import plugins
from taskvec.merging.entries import Data
from taskvec.merging.registry import Recipe, find_recipe
from taskvec.study.artifacts import (
    Config,
    Inputs,
    merged_weights,
    open_backbone,
    open_encoder,
    open_head,
    open_heads,
    open_task,
    open_task_vectors,
    open_tasks,
    open_vector,
    scale_key,
    validations,
)
from taskvec.weights import vectors
from taskvec.weights.flat import save, save_tensors


@step_type(2, ("torch", "numpy"), threaded=on_cpu)
def merge(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Make a method's merged task vector out of the fine-tuned encoders, or one for each task."""
    backbone = open_backbone(inputs, config)
    tuned, seed = open_task_vectors(inputs, backbone), config.get("seed", 0)
    recipe = open_recipe(config)
    statistics: dict[str, torch.Tensor] = {}
    if recipe.measures:
        heads = [head.on(backbone.device) for head in open_heads(inputs, "finetuned")]
        statistics = buffers.measure(recipe, Data(backbone, tuned, open_tasks(inputs), heads, seed, progress))
    entries = buffers.Buffers(backbone.pretrained, tuned, seed, statistics)
    if recipe.per_task:
        found = buffers.task_directions(recipe, entries)
        buffers.save_directions(found, out / buffers.DIRECTIONS)
        write_json(out / "merge.json", {"bytes_per_task": found.bytes_per_task})
    else:
        save(buffers.direction(recipe, entries), out / "direction.safetensors")


def open_recipe(config: Config) -> Recipe:
    """Return the recipe of a merge; methods of plugins must be what they were when it was planned."""
    used = plugins.use(map(Path, config["plugins"])) if "sources" in config else []
    recipe = find_recipe(config["method"], config.get("config"))
    plugins.check_same(recipe, used, config.get("sources", {}))
    return recipe


@step_type(2)
def choose_option(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose the hyperparameters whose best scale so far is best on validation."""
    choices = [read_json(folder / "choice.json") for folder in inputs["choices"]]
    best = max(range(len(choices)), key=lambda index: (choices[index]["value"], -index))
    write_json(out / "option.json", {"index": best, "settings": config["options"][best]})


@step_type(1)
def pick_merge(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Keep the merge of the chosen hyperparameters, and nothing else: what was measured of it holds for the copy."""
    index = read_json(inputs["option"][0] / "option.json")["index"]
    for name in ("direction.safetensors", buffers.DIRECTIONS, "merge.json"):
        if (inputs["merged"][index] / name).exists():
            shutil.copyfile(inputs["merged"][index] / name, out / name)


@step_type(1, ("torch", "numpy"), threaded=on_cpu)
def reestimate(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Estimate the statistics of batch norm anew at every scale along a merged vector, from training images."""
    backbone = open_backbone(inputs, config)
    vector = open_vector(inputs["merged"][0], backbone, config)
    images = batch_norm.mixed(open_tasks(inputs), config["images"])
    found = {}
    for index, scale in enumerate(config["scales"]):
        weights = vectors.add(backbone.pretrained, vector, scale)
        found[scale_key(scale)] = batch_norm.statistics(batch_norm.reestimate(backbone, weights, images))
        progress((index + 1) / len(config["scales"]))
    save_tensors(found, out / "statistics.safetensors")


@step_type(1, ("torch",), threaded=on_cpu)
def reestimated_curve(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Measure a task at every scale with its head kept and the statistics of batch norm estimated anew."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs)
    vector, curve = open_vector(inputs["merged"][0], backbone, config), {}
    for scale in config["scales"]:
        weights = merged_weights(backbone, vector, scale, inputs["statistics"])
        curve[scale] = float(evaluation.correct(backbone, weights, task.validation, head).mean())
        progress(len(curve) / len(config["scales"]))
    write_curve(out, config["scales"], curve)


@step_type(3, ("torch", "numpy"), threaded=on_cpu)
def per_task_scales(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Search one scale a task from the common one, and write the sum as a merged vector whose scale is 1.

    The search looks at a sample of every validation split; on the whole of it what was found must beat the common one.
    """
    backbone, every, heads = open_backbone(inputs, config), open_tasks(inputs), open_heads(inputs, "finetuned")
    tuned, normal = open_task_vectors(inputs, backbone), validations(inputs["finetuned"])
    start = read_json(inputs["choice"][0] / "choice.json")["scale"]
    few = [replace(task, validation=task.validation.sample(config["samples"])) for task in every]
    found = search.coordinate_search(
        backbone, tuned, few, heads, search.own_accuracies(backbone, tuned, few, heads), config["grid"], start, progress
    )
    measured = {}
    with backbone.at():
        for scales in ((start,) * len(every), found.scales):
            vectors.move(backbone.bound, backbone.pretrained, tuned, scales)
            measured[scales] = search.accuracies(backbone, every, heads)
    best = max(measured, key=lambda scales: search.value_of(measured[scales], normal))  # ties keep the common one
    total = torch.stack([vector.flat * scale for vector, scale in zip(tuned, best, strict=True)]).sum(0)
    save(backbone.pretrained.with_flat(total), out / "direction.safetensors")
    chosen: dict[str, Any] = {"scale": 1.0, "scales": best, "value": search.value_of(measured[best], normal)}
    chosen |= {"accuracy": float(np.mean(measured[best])), "measured": list(measured.items())}
    write_json(out / "choice.json", chosen | {"tried": [one for one in found.tried if one[0] not in measured]})


@step_type(2, ("torch",), threaded=on_cpu)
def kept_curve(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Measure a task at every scale with its head kept; where that head did not learn, its scale 0 is known already."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs)
    vector = open_vector(inputs["merged"][0], backbone, config)
    known = {0.0: validations(inputs["start"])[0]} if "start" in inputs else {}
    scales = [scale for scale in config["scales"] if scale not in known]
    curve = dict(zip(scales, search.kept_curve(backbone, vector, task, head, scales, progress), strict=True))
    write_curve(out, config["scales"], curve | known)


@step_type(3, ("torch",), threaded=always)
def reprobed_curve(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Fit a task's head again at the scales of this round; scale 0 gives the probed head itself."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs)
    vector = open_vector(inputs["merged"][0], backbone, config)
    rate = read_json(inputs["rate"][0] / "rate.json")["rate"]
    wanted = read_json(inputs["plan"][0] / "choice.json")["next"] if "plan" in inputs else config["scales"]
    scales = [scale for scale in wanted if scale != 0]
    settings = Probe(**config["probe"])
    values, heads = search.reprobed_curve(backbone, vector, task, rate, settings, scales, config["seed"], progress)
    curve = dict(zip(scales, values, strict=True)) | {0.0: validations(inputs["head"])[0]}
    fitted = dict(zip(scales, heads, strict=True)) | ({0.0: head} if 0 in wanted else {})
    save_heads({scale_key(scale): fit for scale, fit in fitted.items()}, out / "heads.safetensors")
    write_curve(out, wanted, curve)


def write_curve(out: Path, scales: list[float], values: dict[float, float]) -> None:
    """Write what a curve step found: scales, and a task's validation accuracy at each."""
    write_json(out / "curve.json", {"scales": scales, "validation": [values[scale] for scale in scales]})


@step_type(2, ("torch",), threaded=always)
def surgery_curve(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Learn a correction of features at the scales of this round, from unlabelled training images; heads are kept."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs, "finetuned")
    vector = open_vector(inputs["merged"][0], backbone, config)
    scales = read_json(inputs["plan"][0] / "choice.json")["next"] if "plan" in inputs else config["scales"]
    settings, per_patch = Surgery(**config["surgery"]), head.rules.per_patch
    heads, curve = {}, {}
    with backbone.at(open_encoder(inputs["finetuned"][0], backbone)):
        wanted = backbone.features(task.train.images, per_patch=per_patch)
        for scale in scales:
            vectors.move(backbone.bound, backbone.pretrained, [vector], [scale])
            seen = backbone.features(task.train.images, per_patch=per_patch)
            heads[scale] = fit_surgery(seen, wanted, head, settings, config["seed"])
            curve[scale] = accuracy(heads[scale], *features_of(backbone, task.validation, task.kind))
            progress(len(curve) / len(scales))
    save_heads({scale_key(scale): fit for scale, fit in heads.items()}, out / "heads.safetensors")
    write_curve(out, scales, curve)


@step_type(1, ("torch", "numpy"), threaded=always)
def agreement(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Compare a merged encoder's features with the fine-tuned one's at every scale, on unlabelled training images."""
    backbone, task = open_backbone(inputs, config), open_task(inputs)
    vector, tuned = open_vector(inputs["merged"][0], backbone, config), open_encoder(inputs["finetuned"][0], backbone)
    images, per_patch = task.train.sample(config["images"]).images, KINDS[task.kind].per_patch
    values = agreement_curve(backbone, vector, tuned, images, config["scales"], per_patch, progress)
    write_json(out / "agreement.json", {"scales": config["scales"], "values": values})


@step_type(1)
def choose_scale(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose the scale by mean normalised validation accuracy, and name the scales that a next round should try."""
    tuned = validations(inputs["finetuned"])
    scales: list[float] = []
    rows: list[tuple[float, ...]] = []
    for role in sorted(role for role in inputs if role.startswith("round")):
        curves = [read_json(folder / "curve.json") for folder in inputs[role]]
        scales += curves[0]["scales"]
        rows += zip(*(curve["validation"] for curve in curves), strict=True)
    values = [search.value_of(row, tuned) for row in rows]
    best = search.choose(scales, values)
    if not config["refine"] and best == max(config["grid"]) > min(config["grid"]):
        note(f"the largest scale that was tried, {best:g}, is the best: a wider grid (scales) may give more")
    after = search.refine(config["grid"], scales, best, config["refine"]) if config["refine"] else []
    chosen = {"scale": best, "value": values[scales.index(best)], "accuracy": float(np.mean(rows[scales.index(best)]))}
    write_json(out / "choice.json", chosen | {"next": after})
