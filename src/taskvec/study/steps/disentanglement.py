"""Steps that measure pairs and sets of tasks: predictions along single vectors, heatmaps, sets that are added."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from taskvec.core.files import read_json, write_json
from taskvec.core.progress import Progress
from taskvec.data.splits import seeded_choice
from taskvec.engine.pipeline import Config, Inputs, Step, step_type
from taskvec.engine.work import Work
from taskvec.evaluation import sampling
from taskvec.evaluation.accuracy import fine_tuned_accuracies, sampled_accuracies
from taskvec.evaluation.disentanglement import changes, compared, set_error, single_predictions
from taskvec.evaluation.scale_search import coarse_search
from taskvec.merging.in_memory import merge_vectors
from taskvec.merging.registry import ADDITION
from taskvec.study import artifacts
from taskvec.study.artifacts import METRICS, OnDevice
from taskvec.study.forecast.sizes import Sizes
from taskvec.weights import vectors

INDICES, PREDICTIONS, COUNTS, ERRORS = "indices.npy", "predictions.npy", "counts.json", "errors.json"
PERCENT = 100
"""Points of a fraction: tolerances are given in points."""

# ---------------------------------------------------------------- along single vectors


class AxisConfig(OnDevice):
    """At which scales of a task's own vector, and for how many images, predictions are kept."""

    scales: list[float]
    samples: int


def axis_work(step: Step, sizes: Sizes) -> Work:
    """A sample of test images passes at every coefficient; its indices and predictions are kept."""
    samples, scales = min(step.config.samples, sizes.task(step).test), len(step.config.scales)
    return sizes.passes(step, samples * scales, disk=samples * (8 + scales))


@step_type(
    3,
    ("torch", "numpy"),
    reads=["backbone", "precision", "task", "finetuned"],
    writes=[INDICES, PREDICTIONS],
    work=axis_work,
)
def single_task_predictions(config: AxisConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Predict a sample of a task's images under its own vector at every coefficient; all pairs share it.

    The sample is kept as places in the test split, which whoever reads it opens as well.
    """
    backbone, task = artifacts.open_backbone(inputs, config), artifacts.open_task(inputs)
    head = artifacts.open_head(inputs["finetuned"])
    vector = artifacts.open_task_vector(inputs["finetuned"], backbone)
    indices = seeded_choice(len(task.test), config.samples)
    np.save(out / INDICES, indices)
    rows = single_predictions(backbone, vector, head, task.test.images[indices], config.scales, progress)
    np.save(out / PREDICTIONS, rows)


def open_singles(inputs: Inputs) -> tuple[list[Any], list[Any]]:
    """Open the places of every task's sample in its test split, and its predictions along its own vector."""
    names = (INDICES, PREDICTIONS)
    indices, predictions = ([np.load(folder / name) for folder in inputs["singles"]] for name in names)
    return indices, predictions


def sampled(step: Step, sizes: Sizes) -> list[int]:
    """Return how many images there are in each sample that a step reads the predictions of."""
    singles = step.inputs.get("singles") or ()
    return [min(single.config.samples, sizes.task(single).test) for single in singles]


# ---------------------------------------------------------------- heatmaps of pairs


class HeatmapConfig(OnDevice):
    """The coefficients of both vectors, and which places of each task's seeded order are looked at in this round."""

    scales: list[float]
    start: int
    stop: int
    seed: int


def heatmap_work(step: Step, sizes: Sizes) -> Work:
    """A part of both samples passes at every open point where the other coefficient is not 0."""
    config, errors = step.config, step.inputs.get("plan")
    points = len(config.scales) * len([scale for scale in config.scales if scale])
    images = sum(min(config.stop, count) - min(config.start, count) for count in sampled(step, sizes))
    share = 1.0
    if errors is not None:
        strata, looks = 2 * len(errors.inputs["rounds"][0]), errors.config.looks
        how = (looks[-1], strata, len(looks) - 1, errors.config.tolerance / 2 / PERCENT)
        share = sampling.expected_open(config.start, *how)
    return sizes.passes(step, share * points * images)


@step_type(
    3,
    ("torch", "numpy"),
    reads=["backbone", "precision", "tasks", "finetuned", "singles", "plan"],
    writes=[COUNTS],
    work=heatmap_work,
)
def heatmap(config: HeatmapConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Count which predictions of a pair of tasks change at the open points of a grid, on this round's images."""
    indices, singles = open_singles(inputs)
    cells, counts = open_cells(config, inputs), np.zeros((0, 2), np.int64)
    draws = [sampling.drawn(len(order), config.start, config.stop, config.seed, t) for t, order in enumerate(indices)]
    if cells:
        backbone, tasks = artifacts.open_backbone(inputs, config), artifacts.open_tasks(inputs)
        looked = [task.test.images[order[draw]] for task, order, draw in zip(tasks, indices, draws, strict=True)]
        expected = [rows[:, draw] for rows, draw in zip(singles, draws, strict=True)]
        task_vectors, heads = artifacts.open_task_vectors(inputs, backbone), artifacts.open_heads(inputs["finetuned"])
        pair = compared(backbone, task_vectors, heads, looked, expected)
        counts = changes(backbone, pair, cells, config.scales, progress=progress)
    about = {"n": [len(order) for order in indices], "labels": [rows[0, 0].size for rows in singles]}
    write_json(out / COUNTS, {"cells": cells, "counts": counts.tolist(), **about})


def open_cells(config: HeatmapConfig, inputs: Inputs) -> list[tuple[int, int]]:
    """Return the points of a round, as places on both axes: those that the errors so far leave open, or all."""
    if inputs["plan"] is None:
        return [(i, j) for i in range(len(config.scales)) for j in range(len(config.scales))]
    return [(i, j) for i, j in read_json(inputs["plan"] / ERRORS)["next"]]


class ErrorsConfig(Config):
    """The coefficients of both vectors, after how many images errors are looked at, and which half-width is enough.

    ``tolerance`` is in points: 1.5 is 0.015 of xi, which is 0 to 2.
    """

    scales: list[float]
    looks: list[int]
    tolerance: float


@step_type(1, ("numpy",), reads=["rounds"], writes=[ERRORS])
def heatmap_errors(config: ErrorsConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Return the errors of all pairs so far, the half-width of their mean at each point, and which points stay open."""
    rounds = [[read_json(folder / COUNTS) for folder in folders] for folders in inputs["rounds"]]
    sizes = np.array([counts["n"] for counts in rounds[0]])
    looked, shares = changed_shares(config, rounds, sizes)
    exact = np.equal.outer(np.zeros(1), config.scales)[0]  # where nothing is added to the other task
    known = np.stack([np.broadcast_to(exact, looked.shape), np.broadcast_to(exact[:, None], looked.shape)])
    whole = np.broadcast_to(sizes[..., None, None], shares.shape)
    seen = np.where(known, whole, np.minimum(looked, whole))
    strata = [values.reshape(-1, *looked.shape) for values in (shares, seen, whole)]
    width = 2 * sampling.half_width(strata[0], strata[1], strata[2], len(config.looks) - 1)
    still = np.argwhere(width > config.tolerance / PERCENT) if len(rounds) < len(config.looks) else width[:0]
    pairs = [
        {"first": first.tolist(), "second": second.tolist(), "n": n.tolist()}
        for (first, second), n in zip(shares, sizes, strict=True)
    ]
    facts = {"scales": config.scales, "pairs": pairs, "images": looked.tolist(), "half_width": width.tolist()}
    write_json(out / ERRORS, facts | {"next": still.tolist()})


def changed_shares(
    config: ErrorsConfig, rounds: list[list[dict[str, Any]]], sizes: Int64[np.ndarray, "pairs 2"]
) -> tuple[Int64[np.ndarray, "points points"], Float64[np.ndarray, "pairs 2 points points"]]:
    """Return how many images were looked at of every sample at each point, and each task's share of changes."""
    points = len(config.scales)
    looked, counts = np.zeros((points, points), np.int64), np.zeros((*sizes.shape, points, points), np.int64)
    for stop, pairs in zip(config.looks, rounds, strict=False):
        for pair, measured in enumerate(pairs):
            for (i, j), changed in zip(measured["cells"], measured["counts"], strict=True):
                counts[pair, :, i, j] += changed
                looked[i, j] = stop
    labels = np.array([measured["labels"] for measured in rounds[0]])
    seen = np.minimum(looked, sizes[..., None, None]) * labels[..., None, None]
    return looked, counts / seen


# ---------------------------------------------------------------- sets of tasks


class SampleConfig(OnDevice):
    """How many validation images are looked at."""

    samples: int


def own_work(step: Step, sizes: Sizes) -> Work:
    """A sample of the validation images passes by the task's own encoder."""
    return sizes.passes(step, min(step.config.samples, sizes.task(step).validation))


@step_type(1, ("torch", "numpy"), reads=["backbone", "precision", "task", "finetuned"], writes=[METRICS], work=own_work)
def own_accuracy(config: SampleConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Measure a task with its own fine-tuned encoder on a sample of validation images, for all sets that hold it."""
    backbone, task = artifacts.open_backbone(inputs, config), artifacts.open_task(inputs)
    head = artifacts.open_head(inputs["finetuned"])
    few = replace(task, validation=task.validation.sample(config.samples))
    [value] = fine_tuned_accuracies(
        backbone, [artifacts.open_task_vector(inputs["finetuned"], backbone)], [few], [head]
    )
    write_json(out / METRICS, {"validation": value})


class SetConfig(OnDevice):
    """How a set of tasks is merged, on which grid and samples, and at which points of the box its error is taken.

    Test images are looked at until the half-width of the mean accuracy is at most ``test_tolerance``, those of the
    error until it is at most ``tolerance``; both are in points, and 0 looks at all.
    """

    merge: bool
    grid: list[float]
    samples: int
    points: int
    axis: list[float]
    seed: int
    tolerance: float = 0.0
    test_tolerance: float = 0.0


def set_work(step: Step, sizes: Sizes) -> Work:
    """About nine scales on few validation images, test images and points of the box until both are sure enough."""
    config, read = step.config, sizes.tasks(step)
    few = sum(min(config.samples, size.validation) for size in read)
    tested = looked([size.test for size in read], 1, config.test_tolerance)
    merged = config.merge * (few * min(9, len(config.grid)) + tested)
    erring = config.points * looked(sampled(step, sizes), config.points, config.tolerance / 2)
    return sizes.passes(step, merged + erring)


def looked(counts: list[int], points: int, tolerance: float) -> float:
    """Return about how many images of all tasks a mean over so many points takes."""
    images = sampling.expected_images(max(counts, default=0), points * len(counts), tolerance / PERCENT)
    return sum(min(images, count) for count in counts)


@step_type(
    4,
    ("torch", "numpy"),
    reads=["backbone", "precision", "tasks", "finetuned", "singles", "own"],
    writes=["subset.json"],
    work=set_work,
)
def subset(config: SetConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Merge a set of tasks: choose lambda on a sample of validation images, then test; measure the error in the box."""
    backbone, every = artifacts.open_backbone(inputs, config), artifacts.open_tasks(inputs)
    heads = artifacts.open_heads(inputs["finetuned"])
    tuned = artifacts.open_task_vectors(inputs, backbone)
    facts: dict[str, Any] = {}
    if config.merge:
        few = [replace(task, validation=task.validation.sample(config.samples)) for task in every]
        normal = artifacts.validations(inputs["own"])
        merged = merge_vectors(backbone.pretrained, tuned, ADDITION)
        chosen = coarse_search(backbone, merged, few, heads, normal, config.grid)
        progress(0.5)
        weights = vectors.add(backbone.pretrained, merged, chosen.scale)
        splits = [task.test for task in every]
        test = sampled_accuracies(backbone, weights, splits, heads, config.test_tolerance / PERCENT, config.seed)
        facts = {"scale": chosen.scale, "scales": chosen.scales, "validation": chosen.accuracies}
        facts |= {"test": test.shares.tolist(), "test_half_width": test.half_width, "test_images": test.images}
        facts["fine_tuned"] = normal
        progress(0.8)
    if config.points:
        indices, singles = open_singles(inputs)
        images = [task.test.images[order] for task, order in zip(every, indices, strict=True)]
        how = (config.axis, config.points, config.seed, config.tolerance / PERCENT)
        error = set_error(backbone, tuned, heads, images, singles, *how)
        facts |= {"error": error.value, "error_half_width": error.half_width, "error_images": error.images}
    write_json(out / "subset.json", facts)
