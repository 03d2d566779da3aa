"""Steps that come after choices: tests, gains, forgetting, the model that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from taskvec.core.files import read_json, write_json
from taskvec.core.progress import Progress
from taskvec.deploy import model
from taskvec.engine.pipeline import Config, Inputs, Step, step_type
from taskvec.engine.work import Work
from taskvec.evaluation import negation
from taskvec.evaluation.accuracy import accuracy, paired_bootstrap, per_image_scores
from taskvec.evaluation.scale_search import objective
from taskvec.merging.in_memory import DIRECTIONS, read_directions
from taskvec.study import artifacts
from taskvec.study.artifacts import CHOICE, OPTION, OnDevice
from taskvec.study.forecast.sizes import Sizes, along
from taskvec.weights import vectors

CORRECT = "correct.npz"


class NegationConfig(OnDevice):
    """At which scales a task is forgotten, and which share of the control's accuracy is kept."""

    scales: list[float]
    keep: float


def negation_work(step: Step, sizes: Sizes) -> Work:
    """The validation images of both tasks pass at every scale and 0, their test images before and after."""
    scales = along(step, len({0.0, *step.config.scales}))
    return sizes.passes(step, sum(scales * size.validation + 2 * size.test for size in sizes.tasks(step)))


@step_type(
    2,
    ("torch",),
    reads=["backbone", "precision", "tasks", "heads", "finetuned"],
    writes=["negation.json"],
    work=negation_work,
)
def negate(config: NegationConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose the scale that forgets a task on validation, then test that task and the control before and after."""
    backbone, (forget, control) = artifacts.open_backbone(inputs, config), artifacts.open_tasks(inputs)
    first, second = artifacts.open_heads(inputs["heads"])
    vector = artifacts.open_task_vector(inputs["finetuned"], backbone)
    how = ((forget, control), (first, second), config.scales, config.keep, progress)
    result = negation.negate(backbone, vector, *how)
    test = {}
    for name, scale in (("before", 0.0), ("after", result.scale)):
        weights = vectors.add(backbone.pretrained, vector, -scale)
        pairs = ((forget, first), (control, second))
        test[name] = [accuracy(backbone, weights, task.test, head) for task, head in pairs]
    write_json(out / "negation.json", {**vars(result), "test": test})


class TestConfig(OnDevice):
    """How the heads of every candidate come about; ``task`` is its place, where each task has a direction."""

    candidates: list[str]
    task: int | None = None


def test_work(step: Step, sizes: Sizes) -> Work:
    """The test images pass for probing, fine-tuned, other baselines and each candidate."""
    passes = 2 + len(step.config.candidates) + sum(bool(step.inputs.get(role)) for role in ("zero_shot", "joint"))
    return sizes.passes(step, passes * sizes.task(step).test)


@step_type(
    2,
    ("torch",),
    reads=(
        *("backbone", "precision", "task", "probe", "finetuned", "zero_shot", "joint"),
        *("choices", "merged", "statistics", "rounds"),
    ),
    writes=[CORRECT, "test.json"],
    work=test_work,
)
def test_task(config: TestConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Touch a task's test split, once: the baselines, fine-tuned, and what validation chose for every candidate."""
    backbone, task = artifacts.open_backbone(inputs, config), artifacts.open_task(inputs)
    kept = artifacts.open_head(inputs["finetuned"])
    probed = artifacts.open_head(inputs["probe"])
    right = {"probing": per_image_scores(backbone, backbone.pretrained, task.test, probed)}
    if inputs["zero_shot"]:
        zero = artifacts.open_head(inputs["zero_shot"])
        right["zero_shot"] = per_image_scores(backbone, backbone.pretrained, task.test, zero)
    if inputs["joint"]:
        joint = artifacts.open_encoder(inputs["joint"], backbone)
        right["joint"] = per_image_scores(backbone, joint, task.test, probed)
    tuned = artifacts.open_encoder(inputs["finetuned"], backbone)
    right["fine_tuned"] = per_image_scores(backbone, tuned, task.test, kept)
    progress(2 / (2 + len(config.candidates)))
    for index, kind in enumerate(config.candidates):
        scale = read_json(inputs["choices"][index] / CHOICE)["scale"]
        vector = artifacts.open_vector(inputs["merged"][index], backbone, config.task)
        weights = artifacts.merged_weights(backbone, vector, scale, inputs["statistics"][index])
        head = kept if kind == "kept" else artifacts.find_head(inputs["rounds"][index], scale)
        right[str(index)] = per_image_scores(backbone, weights, task.test, head)
        progress((3 + index) / (2 + len(config.candidates)))
    np.savez(out / CORRECT, **right)  # type: ignore[arg-type]
    write_json(out / "test.json", {name: float(values.mean()) for name, values in right.items()})


class GainsConfig(Config):
    """How many candidates there are, and whether tasks of several kinds make changes relative."""

    candidates: int
    normalised: bool


@step_type(3, ("numpy",), reads=["tests"], writes=["gains.json"])
def gains(config: GainsConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Bootstrap what every merge gained over probing and over fine-tuned encoders (paired over test images).

    Tasks go by their place in the study, and all of them together by the empty name.
    """
    right = {str(place): np.load(folder / CORRECT) for place, folder in enumerate(inputs["tests"])}
    table: dict[str, dict[str, Any]] = {}
    units, candidates = units_of(config, right), [str(index) for index in range(config.candidates)]
    for baseline in ("probing", "fine_tuned"):
        base = {name: arrays[baseline] for name, arrays in right.items()}
        ours = {index: {name: arrays[index] for name, arrays in right.items()} for index in candidates}
        table[baseline] = {index: gains_over(base, ours[index], units) for index in candidates}
    write_json(out / "gains.json", table)


def units_of(config: GainsConfig, right: Mapping[str, Any]) -> dict[str, float]:
    """Return what each task's change is divided by: 1, or its fine-tuned value where tasks are of several kinds."""
    relative = config.normalised
    return {name: float(arrays["fine_tuned"].mean()) if relative else 1.0 for name, arrays in right.items()}


def gains_over(base: Mapping[str, Any], ours: Mapping[str, Any], units: Mapping[str, float]) -> dict[str, Any]:
    """Return the gain of each task, and of all together unless a unit is zero."""
    each = {name: vars(paired_bootstrap({name: ours[name]}, {name: base[name]})) for name in base}
    return each | ({"": vars(paired_bootstrap(ours, base, of=units))} if all(units.values()) else {})


class ModelConfig(OnDevice):
    """What may be kept: the names of backbone and tasks, and each candidate's method, heads and settings."""

    backbone: str
    tasks: list[str]
    candidates: list[dict[str, Any]]

    def threaded(self) -> bool:
        """Return that threads do not count: nothing is computed but what the merge was moved by."""
        return False


def model_work(step: Step, sizes: Sizes) -> Work:
    """The best encoder is written, and copied into the run folder once a backbone; a linearised one has two at most."""
    return Work(disk=sizes.weights(step) * (2 if step.config.linearised else 1))


@step_type(
    5,
    ("torch",),
    reads=(
        *("backbone", "precision", "probe", "finetuned", "tasks"),
        *("choices", "merged", "statistics", "options", "rounds"),
    ),
    writes=[model.ENCODER, model.HEADS, model.ABOUT],
    work=model_work,
)
def build_model(config: ModelConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Write the model that was best on validation: the merged encoder, one head a task, and how to use them."""
    backbone = artifacts.open_backbone(inputs, config)
    best = best_candidate(config.candidates, inputs)
    index, scale = best.pop("index"), best["scale"]
    directions, weights = None, backbone.pretrained
    if index is None:
        heads = artifacts.open_heads(inputs["probe"])
        backbone = replace(backbone, base=None)  # probing needs no expansion
    else:
        kept, folder = best["heads"] == "kept" and "correction" not in best, inputs["merged"][index]
        fitted = (artifacts.find_head(rounds, scale) for rounds in inputs["rounds"][index])
        heads = artifacts.open_heads(inputs["finetuned"]) if kept else list(fitted)
        if (folder / DIRECTIONS).exists():
            directions = read_directions(folder / DIRECTIONS, weights)
        else:
            vector = artifacts.open_vector(folder, backbone)
            weights = artifacts.merged_weights(backbone, vector, scale, inputs["statistics"][index])
    classes = [read_json(folder / "classes.json") for folder in inputs["tasks"]]
    by_name = dict(zip(config.tasks, heads, strict=True))
    model.save_model(out, backbone, weights, by_name, classes, best, directions)


def best_candidate(candidates: Sequence[Mapping[str, Any]], inputs: Inputs) -> dict[str, Any]:
    """Return what has the highest value on validation: probing, or a merge where one is better than it.

    ``validation`` is its mean accuracy there (a fraction), by which models of several backbones compare.
    """
    tuned, probed = artifacts.validations(inputs["finetuned"]), artifacts.validations(inputs["probe"])
    best = {"method": "probing", "heads": "kept", "scale": 0.0, "validation": float(np.mean(probed)), "index": None}
    highest = objective(probed, tuned)
    for index, candidate in enumerate(candidates):
        choice = read_json(inputs["choices"][index] / CHOICE)
        if choice["value"] > highest:
            highest = choice["value"]
            best = {**candidate, "scale": choice["scale"], "validation": choice["accuracy"], "index": index}
            best |= {"scales": choice["scales"]} if "scales" in choice else {}
            if folder := inputs["options"][index]:
                best |= {"config": read_json(folder / OPTION)["settings"]}
    return best
