"""Steps that try the scales and hyperparameters of a merge on validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from taskvec.core.files import read_json, write_json
from taskvec.core.notes import note
from taskvec.core.progress import Progress
from taskvec.core.settings import Probe, Surgery
from taskvec.core.task_types import TASK_TYPES
from taskvec.data.tasks import Task
from taskvec.engine.pipeline import Config, Inputs, Step, step_type
from taskvec.engine.work import Work
from taskvec.evaluation import racing, scale_search
from taskvec.evaluation.accuracy import accuracy
from taskvec.evaluation.alignment import alignment_curves
from taskvec.learning.heads import save_heads
from taskvec.study import artifacts
from taskvec.study.artifacts import CHOICE, CURVE, HEADS, OPTION, RATE, SCORES, OnDevice
from taskvec.study.forecast.sizes import BACKWARD, NUMBER, Sizes, along


class CurveConfig(OnDevice):
    """At which scales a task is measured; ``task`` is its place in the study, where each task has a direction."""

    scales: list[float]
    task: int | None = None


def kept_work(step: Step, sizes: Sizes) -> Work:
    """The validation images pass at every scale, but at 0 where that is known."""
    scales = [scale for scale in step.config.scales if scale or not step.inputs.get("start")]
    return sizes.passes(step, along(step, len(scales)) * sizes.task(step).validation)


@step_type(
    2,
    ("torch",),
    reads=["backbone", "precision", "task", "merged", "head", "start"],
    writes=[CURVE],
    work=kept_work,
    heading="search",
)
def kept_curve(config: CurveConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Measure a task at every scale with its head kept; where that head did not learn, its scale 0 is known already."""
    backbone, task = artifacts.open_backbone(inputs, config), artifacts.open_task(inputs)
    head = artifacts.open_head(inputs["head"])
    vector = artifacts.open_vector(inputs["merged"], backbone, config.task)
    known = {0.0: artifacts.validation(inputs["start"])} if inputs["start"] else {}
    scales = [scale for scale in config.scales if scale not in known]
    curve = dict(zip(scales, scale_search.kept_curve(backbone, vector, task, head, scales, progress), strict=True))
    write_curve(out, config.scales, curve | known)


class RaceConfig(CurveConfig):
    """Which look of a race at which scales; after the first look those count that are left.

    ``seed`` draws the order of the images.
    """

    look: int
    seed: int


def race_work(step: Step, sizes: Sizes) -> Work:
    """The images that a look adds pass at the scales that are left, by the shares that were measured."""
    look, scales = step.config.look, len([scale for scale in step.config.scales if scale])
    images = racing.images_added(look, sizes.task(step).validation)
    return sizes.passes(step, racing.LEFT[look] * scales * images)


@step_type(
    1,
    ("torch", "numpy"),
    reads=["backbone", "precision", "task", "merged", "head", "start", "features", "plan", "before"],
    writes=[SCORES, CURVE],
    work=race_work,
    heading="search",
)
def raced_curve(config: RaceConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Score the images that a look of a race adds, at the scales that are left, and keep all scores so far.

    The curve says which of its scales were ``sampled``; scale 0 of a head that did not learn is known on whole splits.
    """
    task, scales = artifacts.open_task(inputs), scales_of(config, inputs)
    scores, size = earlier_scores(inputs["before"], scales), len(task.validation)
    order = racing.image_order(size, config.seed)[: racing.images_of(config.look, len(scales), size)]
    if len(added := order[scores.shape[1] :]):
        scores = np.concatenate([scores, scores_at(config, inputs, task, scales, added, progress)], axis=1)
    np.savez(out / SCORES, scales=np.array(scales), scores=scores, size=np.array(size))
    known = {0.0: artifacts.validation(inputs["start"])} if inputs["start"] else {}
    means = dict(zip(scales, scores.mean(axis=1).tolist(), strict=True)) | known
    write_curve(out, scales, means, [scale for scale in scales if scale not in known and len(order) < size])


def scores_at(
    config: RaceConfig,
    inputs: Inputs,
    task: Task,
    scales: list[float],
    places: Int64[np.ndarray, " images"],
    progress: Progress,
) -> racing.TaskScores:
    """Return the scores of a task's kept head on some validation images; those of scale 0 by cached features."""
    head, scores = artifacts.open_head(inputs["head"]), {}
    if 0 in scales:
        cached = torch.from_numpy(np.load(inputs["features"] / "validation.npy", mmap_mode="r")[places])
        scores[0.0] = head.score(cached, torch.from_numpy(task.validation.labels[places])).numpy()
    if moved := [scale for scale in scales if scale]:
        backbone = artifacts.open_backbone(inputs, config)
        vector = artifacts.open_vector(inputs["merged"], backbone, config.task)
        along = racing.scores_along(backbone, vector, task, head, moved, places, progress)
        scores |= dict(zip(moved, along, strict=True))
    return np.stack([scores[scale] for scale in scales])


def earlier_scores(folder: Path | None, scales: list[float]) -> racing.TaskScores:
    """Return the scores that the looks before this one kept of some scales, in the order of the race."""
    if folder is None:
        return np.empty((len(scales), 0), dtype=bool)
    kept = read_scores(folder)
    scores: racing.TaskScores = kept["scores"][[kept["scales"].tolist().index(scale) for scale in scales]]
    return scores


def read_scores(folder: Path) -> dict[str, Any]:
    """Return what a look of a race kept of one task: ``scales``, ``scores`` and the ``size`` of the split."""
    with np.load(folder / SCORES) as arrays:
        return dict(arrays)


class SurvivorsConfig(Config):
    """How many scales a race began with."""

    started: int


@step_type(1, ("numpy",), reads=["curves", "finetuned"], writes=[CHOICE], heading="search")
def survivors(config: SurvivorsConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Name the scales that stay in a race, by the scores of all tasks so far."""
    tuned = artifacts.validations(inputs["finetuned"])
    tasks = [read_scores(folder) for folder in inputs["curves"]]
    scales, sizes = tasks[0]["scales"].tolist(), [int(task["size"]) for task in tasks]
    left = racing.survivors(scales, [task["scores"] for task in tasks], sizes, tuned, config.started)
    write_json(out / CHOICE, {"next": left})


@step_type(
    1,
    ("torch",),
    reads=["backbone", "precision", "task", "merged", "head", "statistics"],
    writes=[CURVE],
    work=kept_work,
    heading="search",
)
def reestimated_curve(config: CurveConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Measure a task at every scale with its head kept and the statistics of batch norm estimated anew."""
    backbone, task = artifacts.open_backbone(inputs, config), artifacts.open_task(inputs)
    head = artifacts.open_head(inputs["head"])
    vector, curve = artifacts.open_vector(inputs["merged"], backbone), {}
    for scale in config.scales:
        weights = artifacts.merged_weights(backbone, vector, scale, inputs["statistics"])
        curve[scale] = accuracy(backbone, weights, task.validation, head)
        progress(len(curve) / len(config.scales))
    write_curve(out, config.scales, curve)


class ReprobeConfig(CurveConfig):
    """How a head is fitted again; rounds after the first read their scales."""

    probe: Probe
    seed: int

    def unused(self) -> dict[str, set[str]]:
        """Return the settings that only choose a learning rate, which the step reads."""
        return {"probe": {"learning_rates", "rate_per_task"}}


def reprobe_work(step: Step, sizes: Sizes) -> Work:
    """Training and validation images pass at every scale but 0; later rounds try at most two."""
    size, config = sizes.task(step), step.config
    scales = 2 if step.inputs.get("plan") else len([scale for scale in config.scales if scale])
    fitting = sizes.heads(step, config.probe, size, scales)
    return sizes.passes(step, along(step, scales) * (size.train + size.validation)) + fitting


@step_type(
    3,
    ("torch",),
    reads=["backbone", "precision", "task", "merged", "head", "rate", "plan"],
    writes=[HEADS, CURVE],
    work=reprobe_work,
    heading="search",
)
def reprobed_curve(config: ReprobeConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Fit a task's head again at the scales of this round; scale 0 gives the probed head itself."""
    backbone, task = artifacts.open_backbone(inputs, config), artifacts.open_task(inputs)
    head = artifacts.open_head(inputs["head"])
    vector = artifacts.open_vector(inputs["merged"], backbone, config.task)
    rate, wanted = read_json(inputs["rate"] / RATE)["rate"], scales_of(config, inputs)
    scales = [scale for scale in wanted if scale != 0]
    how = (rate, config.probe, scales, config.seed, progress)
    values, heads = scale_search.reprobed_curve(backbone, vector, task, *how)
    curve = dict(zip(scales, values, strict=True)) | {0.0: artifacts.validation(inputs["head"])}
    fitted = dict(zip(scales, heads, strict=True)) | ({0.0: head} if 0 in wanted else {})
    save_heads({artifacts.scale_key(scale): fit for scale, fit in fitted.items()}, out / HEADS)
    write_curve(out, wanted, curve)


def scales_of(config: CurveConfig, inputs: Inputs) -> list[float]:
    """Return the scales of a round: those that the choice of the round before names, or the first ones."""
    if inputs["plan"] is None:
        return config.scales
    scales: list[float] = read_json(inputs["plan"] / CHOICE)["next"]
    return scales


def write_curve(out: Path, scales: list[float], values: dict[float, float], sampled: Sequence[float] = ()) -> None:
    """Write what a curve step has measured: scales, and a task's validation accuracy at each, some on samples only."""
    curve: dict[str, Any] = {"scales": scales, "validation": [values[scale] for scale in scales]}
    write_json(out / CURVE, curve | ({"sampled": sampled} if sampled else {}))


class SurgeryConfig(CurveConfig):
    """How a correction of features is learned; rounds after the first read their scales."""

    surgery: Surgery
    seed: int


def surgery_work(step: Step, sizes: Sizes) -> Work:
    """Training images pass once by the fine-tuned encoder, then at every scale with validation images."""
    size, settings = sizes.task(step), step.config.surgery
    scales = 2 if step.inputs.get("plan") else len(step.config.scales)
    numbers = 2 * settings.rank * sizes.backbone(step).width
    steps = scales * settings.steps
    flops = steps * min(settings.batch_size, size.train) * 2 * BACKWARD * numbers
    learned = Work(head_steps=2 * steps, head_flops=flops, disk=NUMBER * scales * numbers)
    return sizes.passes(step, size.train + scales * (size.train + size.validation)) + learned


@step_type(
    2,
    ("torch",),
    reads=["backbone", "precision", "task", "merged", "finetuned", "plan"],
    writes=[HEADS, CURVE],
    work=surgery_work,
    heading="search",
)
def surgery_curve(config: SurgeryConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Learn a correction of features at the scales of this round, from unlabelled training images; heads are kept."""
    backbone, task = artifacts.open_backbone(inputs, config), artifacts.open_task(inputs)
    head = artifacts.open_head(inputs["finetuned"])
    vector = artifacts.open_vector(inputs["merged"], backbone, config.task)
    tuned, scales = artifacts.open_encoder(inputs["finetuned"], backbone), scales_of(config, inputs)
    how = (config.surgery, scales, config.seed, progress)
    values, heads = scale_search.corrected_curve(backbone, vector, tuned, task, head, *how)
    fitted = {artifacts.scale_key(scale): fit for scale, fit in zip(scales, heads, strict=True)}
    save_heads(fitted, out / HEADS)
    write_curve(out, scales, dict(zip(scales, values, strict=True)))


class AgreementConfig(CurveConfig):
    """At which scales, and on how many images, features are compared."""

    images: int
    metrics: list[str]


def agreement_work(step: Step, sizes: Sizes) -> Work:
    """A sample of training images passes by the fine-tuned encoder and at every scale."""
    config = step.config
    return sizes.passes(step, (1 + len(config.scales)) * min(config.images, sizes.task(step).train))


@step_type(
    1,
    ("torch", "numpy"),
    reads=["backbone", "precision", "task", "merged", "finetuned"],
    writes=lambda config: [f"{metric}.json" for metric in config.metrics],
    work=agreement_work,
    heading="search",
)
def agreement(config: AgreementConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Compare a merged encoder's features with the fine-tuned one's at every scale, on unlabelled training images."""
    backbone, task = artifacts.open_backbone(inputs, config), artifacts.open_task(inputs)
    vector, tuned = (
        artifacts.open_vector(inputs["merged"], backbone, config.task),
        artifacts.open_encoder(inputs["finetuned"], backbone),
    )
    images, per_patch = task.train.sample(config.images).images, TASK_TYPES[task.kind].per_patch
    curves = alignment_curves(backbone, vector, tuned, images, config.scales, per_patch, progress)
    for metric in config.metrics:
        write_json(out / f"{metric}.json", {"scales": config.scales, "values": curves[metric]})


class OptionConfig(Config):
    """The hyperparameters among which one is chosen."""

    options: list[dict[str, Any]]


@step_type(2, reads=["choices"], writes=[OPTION], heading="search")
def choose_option(config: OptionConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose the hyperparameters whose best scale so far is best on validation."""
    choices = [read_json(folder / CHOICE) for folder in inputs["choices"]]
    best = max(range(len(choices)), key=lambda index: (choices[index]["value"], -index))
    write_json(out / OPTION, {"index": best, "settings": config.options[best]})


class ChoiceConfig(Config):
    """All scales that may be tried, and how far from the best one the next round looks: 0 for no next round."""

    grid: list[float]
    refine: int


@step_type(1, reads=["rounds", "finetuned"], writes=[CHOICE], heading="search")
def choose_scale(config: ChoiceConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose the scale by mean normalised validation accuracy, and name the scales that a next round should try."""
    tuned = artifacts.validations(inputs["finetuned"])
    scales: list[float] = []
    rows: list[tuple[float, ...]] = []
    for folders in inputs["rounds"]:
        curves = [read_json(folder / CURVE) for folder in folders]
        scales += curves[0]["scales"]
        rows += zip(*(curve["validation"] for curve in curves), strict=True)
    values, grid = [scale_search.objective(row, tuned) for row in rows], config.grid
    best = scale_search.best_candidate(scales, values)
    if not config.refine and best == max(grid) > min(grid):
        note(f"the largest scale that was tried, {best:g}, is the best: a wider grid (scales) may give more")
    after = scale_search.untried_neighbours(grid, scales, best, config.refine) if config.refine else []
    place = scales.index(best)
    choice = {"scale": best, "value": values[place], "accuracy": float(np.mean(rows[place])), "next": after}
    write_json(out / CHOICE, choice)
