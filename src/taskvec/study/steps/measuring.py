"""Steps that come after choices: tests, gains, sets of tasks, disentanglement, forgetting, the model that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from taskvec.core.files import read_json, write_json
from taskvec.core.training import Progress
from taskvec.deploy import model
from taskvec.engine.pipeline import on_cpu, step_type
from taskvec.evaluation import accuracy as evaluation
from taskvec.evaluation import disentanglement as disentangling
from taskvec.evaluation import negation as arithmetic
from taskvec.evaluation import scale_search as search
from taskvec.merging import in_memory as buffers
from taskvec.merging.registry import ADDITION
from taskvec.study.artifacts import (
    Config,
    Inputs,
    find_head,
    merged_weights,
    open_backbone,
    open_encoder,
    open_head,
    open_heads,
    open_task,
    open_task_vectors,
    open_tasks,
    open_vector,
    validations,
)
from taskvec.weights import vectors


@step_type(2, ("torch",), threaded=on_cpu)
def negate(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose the scale that forgets a task on validation, then test that task and the control before and after."""
    backbone, (forget, control) = open_backbone(inputs, config), open_tasks(inputs)
    first, second = open_heads(inputs)
    vector = open_task_vectors(inputs, backbone)[0]
    found = arithmetic.negate(
        backbone, vector, (forget, control), (first, second), config["scales"], config["keep"], progress
    )
    test = {}
    for name, scale in (("before", 0.0), ("after", found.scale)):
        weights = vectors.add(backbone.pretrained, vector, -scale)
        pairs = ((forget, first), (control, second))
        test[name] = [float(evaluation.correct(backbone, weights, task.test, head).mean()) for task, head in pairs]
    write_json(out / "negation.json", {**vars(found), "test": test})


@step_type(2, ("torch",), threaded=on_cpu)
def test_task(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Touch a task's test split, once: the baselines, fine-tuned, and what validation chose for every candidate."""
    backbone, task, own = open_backbone(inputs, config), open_task(inputs), open_head(inputs, "finetuned")
    probed = open_head(inputs, "probe")
    right = {"probing": evaluation.correct(backbone, backbone.pretrained, task.test, probed)}
    if "zero_shot" in inputs:
        zero = open_head(inputs, "zero_shot")
        right["zero_shot"] = evaluation.correct(backbone, backbone.pretrained, task.test, zero)
    if "joint" in inputs:
        joint = open_encoder(inputs["joint"][0], backbone)
        right["joint"] = evaluation.correct(backbone, joint, task.test, probed)
    tuned = open_encoder(inputs["finetuned"][0], backbone)
    right["fine_tuned"] = evaluation.correct(backbone, tuned, task.test, own)
    progress(2 / (2 + len(config["candidates"])))
    for index, kind in enumerate(config["candidates"]):
        scale = read_json(inputs["choices"][index] / "choice.json")["scale"]
        vector, estimated = open_vector(inputs["merged"][index], backbone, config), inputs.get(f"statistics{index}", [])
        weights = merged_weights(backbone, vector, scale, estimated)
        head = own if kind == "kept" else find_head(inputs[f"rounds{index}"], scale)
        right[str(index)] = evaluation.correct(backbone, weights, task.test, head)
        progress((3 + index) / (2 + len(config["candidates"])))
    np.savez(out / "correct.npz", **right)  # type: ignore[arg-type]
    write_json(out / "test.json", {name: float(values.mean()) for name, values in right.items()})


@step_type(1, ("torch", "numpy"), threaded=on_cpu)
def own_accuracy(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Measure a task with its own fine-tuned encoder on a sample of validation images, for all sets that hold it."""
    backbone, task, heads = open_backbone(inputs, config), open_task(inputs), open_heads(inputs, "finetuned")
    few = replace(task, validation=task.validation.sample(config["samples"]))
    [found] = search.own_accuracies(backbone, open_task_vectors(inputs, backbone), [few], heads)
    write_json(out / "metrics.json", {"validation": found})


@step_type(3, ("torch", "numpy"), threaded=on_cpu)
def subset(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Merge a set of tasks: choose lambda on a sample of validation images, then test; measure the error in the box."""
    backbone, every, heads = open_backbone(inputs, config), open_tasks(inputs), open_heads(inputs, "finetuned")
    tuned = open_task_vectors(inputs, backbone)
    found: dict[str, Any] = {}
    if config["merge"]:
        few = [replace(task, validation=task.validation.sample(config["samples"])) for task in every]
        normal = validations(inputs["own"])
        merged = search.direction(backbone.pretrained, tuned, ADDITION)
        chosen = search.coarse_search(backbone, merged, few, heads, normal, config["grid"])
        progress(0.5)
        weights = vectors.add(backbone.pretrained, merged, chosen.scale)
        pairs = zip(every, heads, strict=True)
        test = [float(evaluation.correct(backbone, weights, task.test, head).mean()) for task, head in pairs]
        found = {"scale": chosen.scale, "scales": chosen.scales, "validation": chosen.accuracies, "test": test}
        found["fine_tuned"] = normal
        progress(0.8)
    if config["points"]:
        images = [np.load(folder / "images.npy") for folder in inputs["singles"]]
        singles = [np.load(folder / "predictions.npy") for folder in inputs["singles"]]
        how = (config["axis"], config["points"], config["seed"])
        found["error"] = disentangling.set_error(backbone, tuned, heads, images, singles, *how)
    write_json(out / "subset.json", found)


@step_type(3, ("numpy",))
def gains(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Bootstrap what every merge gained over probing and over fine-tuned encoders (paired over test images).

    Tasks go by their place in the study, and all of them together by the empty name.
    """
    right = {str(place): np.load(folder / "correct.npz") for place, folder in enumerate(inputs["tests"])}
    found: dict[str, dict[str, Any]] = {}
    units, candidates = units_of(config, right), [str(index) for index in range(config["candidates"])]
    for baseline in ("probing", "fine_tuned"):
        base = {name: arrays[baseline] for name, arrays in right.items()}
        ours = {index: {name: arrays[index] for name, arrays in right.items()} for index in candidates}
        found[baseline] = {index: gains_over(base, ours[index], units) for index in candidates}
    write_json(out / "gains.json", found)


def units_of(config: Config, right: Mapping[str, Any]) -> dict[str, float]:
    """Return what each task's change is divided by: 1, or its fine-tuned value where tasks are of several kinds."""
    normalised = config["normalised"]
    return {name: float(arrays["fine_tuned"].mean()) if normalised else 1.0 for name, arrays in right.items()}


def gains_over(base: Mapping[str, Any], ours: Mapping[str, Any], units: Mapping[str, float]) -> dict[str, Any]:
    """Return the gain of each task, and of all together unless a unit is zero."""
    found = {name: vars(evaluation.paired_gain({name: ours[name]}, {name: base[name]})) for name in base}
    return found | ({"": vars(evaluation.paired_gain(ours, base, of=units))} if all(units.values()) else {})


@step_type(2, ("torch", "numpy"), threaded=on_cpu)
def single_task_predictions(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Predict a sample of a task's images under its own vector at every coefficient; all pairs share it."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs, "finetuned")
    vector = open_task_vectors(inputs, backbone)[0]
    images = disentangling.sample(task.test.images, config["samples"])
    np.save(out / "images.npy", images)
    rows = disentangling.single_predictions(backbone, vector, head, images, config["scales"], progress)
    np.save(out / "predictions.npy", rows)


@step_type(2, ("torch",), threaded=on_cpu)
def heatmap(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Measure the disentanglement error of a pair of tasks over a grid of coefficients."""
    backbone = open_backbone(inputs, config)
    first, second = open_task_vectors(inputs, backbone)
    heads = open_heads(inputs, "finetuned")
    images = [np.load(folder / "images.npy") for folder in inputs["singles"]]
    singles = [np.load(folder / "predictions.npy") for folder in inputs["singles"]]
    errors = disentangling.disentanglement(
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


@step_type(4, ("torch",))
def build_model(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Write the model that was best on validation: the merged encoder, one head a task, and how to use them."""
    backbone = open_backbone(inputs, config)
    best = best_candidate(config, inputs)
    index, scale = best.pop("index"), best["scale"]
    directions = None
    if index is None:
        weights, heads = backbone.pretrained, open_heads(inputs, "probe")
        backbone = replace(backbone, around=None)  # probing needs no expansion
    else:
        heads = open_heads(inputs, "finetuned")
        if best["heads"] != "kept" or "correction" in best:
            heads = [find_head(inputs[f"rounds{index}-{t}"], scale) for t in range(len(heads))]
        folder = inputs["merged"][index]
        if (folder / buffers.DIRECTIONS).exists():
            weights = backbone.pretrained
            directions = buffers.read_directions(folder / buffers.DIRECTIONS, weights)
        else:
            vector, estimated = open_vector(folder, backbone, config), inputs.get(f"statistics{index}", [])
            weights = merged_weights(backbone, vector, scale, estimated)
    classes = [read_json(folder / "classes.json") for folder in inputs["tasks"]]
    by_name = dict(zip(config["tasks"], heads, strict=True))
    model.save_model(out, backbone, weights, by_name, classes, best, directions)


def best_candidate(config: Config, inputs: Inputs) -> dict[str, Any]:
    """Return what has the highest value on validation: probing, or a merge where one is better than it.

    ``validation`` is its mean accuracy there (a fraction), by which models of several backbones compare.
    """
    tuned, probed = validations(inputs["finetuned"]), validations(inputs["probe"])
    best = {"method": "probing", "heads": "kept", "scale": 0.0, "validation": float(np.mean(probed)), "index": None}
    highest = search.value_of(probed, tuned)
    for index, candidate in enumerate(config["candidates"]):
        choice = read_json(inputs["choices"][index] / "choice.json")
        if choice["value"] > highest:
            highest = choice["value"]
            best = {**candidate, "scale": choice["scale"], "validation": choice["accuracy"], "index": index}
            best |= {"scales": choice["scales"]} if "scales" in choice else {}
            for folder in inputs.get(f"option{index}", []):
                best |= {"config": read_json(folder / "option.json")["settings"]}
    return best
