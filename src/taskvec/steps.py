"""What a study's steps do: each reads folders, writes one folder, and keeps nothing in memory.

Every function has the signature ``(config, inputs, out, progress)``: ``inputs`` are the folders of other steps by role.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from taskvec import backbones, evaluation, model, search, tasks
from taskvec.backbones import Backbone
from taskvec.compute import choose_device, choose_precision
from taskvec.disentangling import disentanglement, sample, single_predictions
from taskvec.finetuning import finetune as finetune_encoder
from taskvec.finetuning import task_vector
from taskvec.heads import Head, Probed, probe, read_heads, save_heads
from taskvec.images import Preprocessing
from taskvec.settings import Finetune, Probe
from taskvec.store import read_json, write_json
from taskvec.tasks import Task, read_task
from taskvec.training import Progress
from taskvec.vectors import add
from taskvec.weights import Weights, save

Config = dict[str, Any]
Inputs = dict[str, list[Path]]


def open_backbone(inputs: Inputs, config: Config) -> Backbone:
    """Open the backbone that a step reads, on the study's device."""
    return backbones.read_backbone(inputs["backbone"][0], choose_device(config.get("device", "cpu")))


def open_task(inputs: Inputs) -> Task:
    """Open the decoded task that a step reads."""
    return read_task(inputs["task"][0], inputs["task"][0].name)


def open_head(inputs: Inputs) -> Head:
    """Open the probed head that a step reads."""
    return read_heads(inputs["head"][0] / "head.safetensors")["head"]


def open_vector(folder: Path, backbone: Backbone) -> Weights:
    """Open a merged task vector."""
    return backbones.read_weights(folder / "direction.safetensors", backbone.pretrained)


def open_encoder(folder: Path, backbone: Backbone) -> Weights:
    """Open a fine-tuned encoder's weights."""
    return backbones.read_weights(folder / "encoder.safetensors", backbone.pretrained)


def load_backbone(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Load a pre-trained encoder by address and keep its weights as safetensors."""
    backbone = backbones.load_backbone(
        config["address"], config["size"], config["name"], "cpu", allow_pickle=config["allow_pickle"]
    )
    backbones.write_backbone(backbone, out)


def preprocessing(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Keep the part of the preprocessing that decides decoded pixels, so that backbones share decoded tasks."""
    record = read_json(inputs["backbone"][0] / "backbone.json")
    write_json(out / "preprocessing.json", Preprocessing.from_json(record["preprocessing"]).decoding())


def decode_task(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Decode a task's images once."""
    to = Preprocessing(**read_json(inputs["preprocessing"][0] / "preprocessing.json"))
    tasks.write_task(config["address"], to, config["limit"], out, progress)


def features(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Cache the frozen encoder's features of training and validation images."""
    backbone, task = open_backbone(inputs, config), open_task(inputs)
    total = len(task.train) + len(task.validation)
    share = len(task.train) / total
    train = backbone.features(task.train.images, progress=lambda x: progress(x * share))
    validation = backbone.features(task.validation.images, progress=lambda x: progress(share + x * (1 - share)))
    np.save(out / "train.npy", train.numpy())
    np.save(out / "validation.npy", validation.numpy())


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
    )
    save_heads({str(index): head for index, head in enumerate(probed.heads)}, out / "heads.safetensors")
    write_json(out / "probe.json", {"rates": probed.rates, "validation": probed.validation})


def choose_rate(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose one learning rate by the mean validation accuracy over the probes read; ties go to the smaller."""
    curves = [read_json(folder / "probe.json") for folder in inputs["probes"]]
    means = np.mean([curve["validation"] for curve in curves], axis=0)
    best = Probed(tuple(curves[0]["rates"]), (), tuple(means)).best()
    write_json(out / "rate.json", {"index": best, "rate": curves[0]["rates"][best]})


def pick_head(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Keep the head of the chosen learning rate, with its validation accuracy."""
    index = read_json(inputs["rate"][0] / "rate.json")["index"]
    folder = inputs["probe"][0]
    save_heads({"head": read_heads(folder / "heads.safetensors")[str(index)]}, out / "head.safetensors")
    write_json(out / "metrics.json", {"validation": read_json(folder / "probe.json")["validation"][index]})


def finetune(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Fine-tune the encoder with the task's head frozen, and measure it on validation."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs)
    weights = finetune_encoder(
        backbone, task, head, Finetune(**config["finetune"]), config["seed"], config["precision"], progress
    )
    save(weights, out / "encoder.safetensors")
    right = evaluation.correct(backbone, weights, task.validation, head)
    precision = choose_precision(config["precision"], "training", backbone.width, backbone.device)
    write_json(out / "metrics.json", {"validation": float(right.mean()), "precision": precision})


def merge(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Make a method's merged task vector out of the fine-tuned encoders."""
    backbone = open_backbone(inputs, config)
    tuned = [task_vector(backbone, open_encoder(folder, backbone)) for folder in inputs["finetuned"]]
    save(search.direction(backbone.pretrained, tuned, config["method"]), out / "direction.safetensors")


def kept_curve(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Measure a task at every scale with its head kept; scale 0 is the probe, known already."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs)
    vector = open_vector(inputs["merged"][0], backbone)
    scales = [scale for scale in config["scales"] if scale != 0]
    curve = dict(zip(scales, search.kept_curve(backbone, vector, task, head, scales, progress), strict=True))
    _write_curve(out, config["scales"], curve | {0: read_json(inputs["head"][0] / "metrics.json")["validation"]})


def reprobed_curve(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Fit a task's head again at the scales of this round; scale 0 gives the probed head itself."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs)
    vector = open_vector(inputs["merged"][0], backbone)
    rate = read_json(inputs["rate"][0] / "rate.json")["rate"]
    wanted = read_json(inputs["plan"][0] / "choice.json")["next"] if "plan" in inputs else config["scales"]
    scales = [scale for scale in wanted if scale != 0]
    settings = Probe(**config["probe"])
    values, heads = search.reprobed_curve(backbone, vector, task, rate, settings, scales, config["seed"], progress)
    curve = dict(zip(scales, values, strict=True)) | {0: read_json(inputs["head"][0] / "metrics.json")["validation"]}
    fitted = dict(zip(scales, heads, strict=True)) | ({0.0: head} if 0 in wanted else {})
    save_heads({scale_key(scale): fit for scale, fit in fitted.items()}, out / "heads.safetensors")
    _write_curve(out, wanted, curve)


def _write_curve(out: Path, scales: list[float], values: dict[float, float]) -> None:
    write_json(out / "curve.json", {"scales": scales, "validation": [values[scale] for scale in scales]})


def choose_scale(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose the scale by mean normalised validation accuracy, and name the scales that a next round should try."""
    tuned = [read_json(folder / "metrics.json")["validation"] for folder in inputs["finetuned"]]
    scales: list[float] = []
    rows: list[tuple[float, ...]] = []
    for role in sorted(role for role in inputs if role.startswith("round")):
        curves = [read_json(folder / "curve.json") for folder in inputs[role]]
        scales += curves[0]["scales"]
        rows += zip(*(curve["validation"] for curve in curves), strict=True)
    values = [search.value_of(row, tuned) for row in rows]
    best = search.choose(scales, values)
    after = search.refine(config["grid"], scales, best, config["refine"]) if config["refine"] else []
    chosen = {"scale": best, "value": values[scales.index(best)], "accuracy": float(np.mean(rows[scales.index(best)]))}
    write_json(out / "choice.json", chosen | {"next": after})


def test_task(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Touch a task's test split, once: probing, fine-tuned, and what validation chose for every candidate."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs)
    right = {"probing": evaluation.correct(backbone, backbone.pretrained, task.test, head)}
    tuned = open_encoder(inputs["finetuned"][0], backbone)
    right["fine_tuned"] = evaluation.correct(backbone, tuned, task.test, head)
    progress(2 / (2 + len(config["candidates"])))
    for index, kind in enumerate(config["candidates"]):
        scale = read_json(inputs["choices"][index] / "choice.json")["scale"]
        weights = add(backbone.pretrained, open_vector(inputs["merged"][index], backbone), scale)
        own = head if kind == "kept" else find_head(inputs[f"rounds{index}"], scale)
        right[str(index)] = evaluation.correct(backbone, weights, task.test, own)
        progress((3 + index) / (2 + len(config["candidates"])))
    np.savez(out / "correct.npz", **right)  # type: ignore[arg-type]
    write_json(out / "test.json", {name: float(values.mean()) for name, values in right.items()})


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


def gains(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Bootstrap what every merge gained over probing, for all tasks together and for each (paired over test images)."""
    right = {
        name: np.load(folder / "correct.npz") for name, folder in zip(config["tasks"], inputs["tests"], strict=True)
    }
    found = {}
    for index in range(len(config["candidates"])):
        ours = {name: arrays[str(index)] for name, arrays in right.items()}
        base = {name: arrays["probing"] for name, arrays in right.items()}
        groups = {"": list(right)} | {name: [name] for name in right}
        found[str(index)] = {
            group: vars(evaluation.paired_gain({n: ours[n] for n in names}, {n: base[n] for n in names}))
            for group, names in groups.items()
        }
    write_json(out / "gains.json", found)


def single_task_predictions(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Predict a sample of a task's images under its own vector at every coefficient; all pairs share it."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs)
    vector = task_vector(backbone, open_encoder(inputs["finetuned"][0], backbone))
    images = sample(task.test.images, config["samples"])
    np.save(out / "images.npy", images)
    np.save(out / "predictions.npy", single_predictions(backbone, vector, head, images, config["scales"], progress))


def heatmap(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Measure the disentanglement error of a pair of tasks over a grid of coefficients."""
    backbone = open_backbone(inputs, config)
    first, second = (task_vector(backbone, open_encoder(folder, backbone)) for folder in inputs["finetuned"])
    heads = [read_heads(folder / "head.safetensors")["head"] for folder in inputs["heads"]]
    images = [np.load(folder / "images.npy") for folder in inputs["singles"]]
    singles = [np.load(folder / "predictions.npy") for folder in inputs["singles"]]
    errors = disentanglement(
        backbone,
        (first, second),
        (heads[0], heads[1]),
        (images[0], images[1]),
        config["scales"],
        (singles[0], singles[1]),
        progress,
    )
    shares = {"first": errors.first.tolist(), "second": errors.second.tolist()}
    write_json(out / "errors.json", shares | {"scales": config["scales"], "n": [len(images[0]), len(images[1])]})


def build_model(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Write the model that was best on validation: the merged encoder, one head a task, and how to use them."""
    backbone = open_backbone(inputs, config)
    best = best_candidate(config, inputs)
    scale, weights, own = best["scale"], backbone.pretrained, inputs["heads"]
    heads = [read_heads(folder / "head.safetensors")["head"] for folder in own]
    if best["index"] is not None:
        index = best["index"]
        weights = add(backbone.pretrained, open_vector(inputs["merged"][index], backbone), scale)
        if best["heads"] == "reprobed":
            heads = [find_head(inputs[f"rounds{index}-{t}"], scale) for t in range(len(heads))]
    classes = [read_json(folder / "classes.json") for folder in inputs["tasks"]]
    del best["index"]
    model.save_model(out, backbone, weights, dict(zip(config["tasks"], heads, strict=True)), classes, best)


def best_candidate(config: Config, inputs: Inputs) -> dict[str, Any]:
    """Return what has the highest value on validation: probing, or a merge where one is better than it.

    ``validation`` is its mean accuracy there (a fraction), by which models of several backbones compare.
    """
    tuned = [read_json(folder / "metrics.json")["validation"] for folder in inputs["finetuned"]]
    probed = [read_json(folder / "metrics.json")["validation"] for folder in inputs["heads"]]
    best = {"method": "probing", "heads": "kept", "scale": 0.0, "validation": float(np.mean(probed)), "index": None}
    highest = search.value_of(probed, tuned)
    for index, candidate in enumerate(config["candidates"]):
        choice = read_json(inputs["choices"][index] / "choice.json")
        if choice["value"] > highest:
            highest = choice["value"]
            best = {**candidate, "scale": choice["scale"], "validation": choice["accuracy"], "index": index}
    return best
