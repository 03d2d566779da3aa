"""What comes after choices: tests, gains, disentanglement, sets of tasks, forgetting, the model that is kept."""

from __future__ import annotations

import zlib
from typing import Any

from taskvec.core.settings import parse_scales
from taskvec.engine.pipeline import Step
from taskvec.evaluation.disentanglement import BOX_AXIS, choose_pairs, spread_sets
from taskvec.merging.registry import ADDITION, find_recipe
from taskvec.study.experiment import Experiment, SharedSteps
from taskvec.study.plan.planner import Planner
from taskvec.study.steps import measuring as steps


def negate(planner: Planner, exp: Experiment, shared: SharedSteps) -> None:
    """Forget one task by its negated vector; heads are those that the pre-trained encoder was probed with."""
    asked = planner.study.negation
    if asked is None or not {asked.forget, asked.control} <= set(exp.tasks):
        return
    names = asked.forget, asked.control
    inputs = {**shared.looks, "tasks": [shared.data[t] for t in names]}
    inputs |= {"heads": [exp.start[t] for t in names], "finetuned": exp.finetuned[asked.forget]}
    on = planner.on(exp.backbone, exp.regime)
    config = steps.NegationConfig(scales=parse_scales(asked.scales), keep=asked.keep, **on)
    cost = sum((0.1 * len(config.scales) + 0.4) * planner.images[t] for t in names)
    label = f"forget {asked.forget}, keep {asked.control} {exp.where}"
    exp.negation[names] = planner.step(steps.negate, label, config, inputs, cost)


def test_all(planner: Planner, exp: Experiment, shared: SharedSteps) -> None:
    """Plan the only steps that look at test labels: they read every choice, so they come after all of them."""
    kinds, per_task = [trial.heads for trial in exp.trials], any(trial.per_task for trial in exp.trials)
    for place, t in enumerate(exp.tasks):
        inputs = {**shared.looks, "task": shared.data[t], "probe": exp.head[t], **selections(exp)}
        inputs |= {"finetuned": exp.finetuned[t], "zero_shot": exp.zero_shot.get(t), "joint": exp.joint}
        inputs |= {"rounds": [[curves[t] for curves in trial.rounds] for trial in exp.trials]}
        task = place if per_task else None
        config = steps.TestConfig(candidates=kinds, task=task, **planner.on(exp.backbone, exp.regime))
        exp.test[t] = planner.step(steps.test_task, f"test {t} {exp.where}", config, inputs, planner.images[t])
    gains = steps.GainsConfig(candidates=len(kinds), normalised=planner.sources.mixed(exp.tasks))
    exp.gains = planner.step(steps.gains, f"gains {exp.where}", gains, {"tests": list(exp.test.values())})


def selections(exp: Experiment) -> dict[str, Any]:
    """Return what was chosen of every trial: its scale, its merge, and the statistics of batch norm along it."""
    return {
        "choices": [trial.selection for trial in exp.trials],
        "merged": [trial.merged for trial in exp.trials],
        "statistics": [trial.statistics for trial in exp.trials],
    }


def keep_model(planner: Planner, exp: Experiment, shared: SharedSteps) -> None:
    """Plan the model of an experiment: what was best on validation, ready to use."""
    inputs = {**shared.looks, "probe": list(exp.head.values()), **selections(exp)}
    inputs |= {"finetuned": list(exp.finetuned.values()), "tasks": [shared.data[t] for t in exp.tasks]}
    inputs |= {"options": [trial.option for trial in exp.trials]}
    inputs |= {"rounds": [[[curves[t] for curves in trial.rounds] for t in exp.tasks] for trial in exp.trials]}
    candidates: list[dict[str, Any]] = [
        {"method": trial.name, "heads": trial.read_by, **trial.variant.differences} for trial in exp.trials
    ]
    for trial, candidate in zip(exp.trials, candidates, strict=True):
        candidate |= {"config": dict(trial.settings)} if trial.settings else {}
    on = planner.on(exp.backbone, exp.regime) | {"device": ""}
    config = steps.ModelConfig(backbone=exp.backbone, tasks=list(exp.tasks), candidates=candidates, **on)
    exp.model = planner.step(steps.build_model, f"model {exp.where}", config, inputs)


def disentanglement(planner: Planner, exp: Experiment, shared: SharedSteps) -> None:
    """Plan the heatmaps of pairs, and the sets of tasks; both read each task's predictions along its own axis."""
    pairs = choose_pairs(exp.tasks, planner.study.heatmap.pairs)
    subsets = planner.study.subsets
    sets = spread_sets(exp.tasks, subsets.of(len(exp.tasks)), subsets.limit)
    sets += [names for names in merged_by_open(planner, exp) if names not in sets]
    drawn = {t for pair in pairs for t in pair}
    axis = planner.study.heatmap.scales()
    singles = {t: single_axis(planner, t, "heatmap", axis, exp, shared) for t in exp.tasks if t in drawn}
    for pair in pairs:
        exp.heatmaps[pair] = heatmap(planner, pair, exp, shared, singles)
    among = {t for names in sets for t in names if subsets.points}
    singles = {t: single_axis(planner, t, "box", list(BOX_AXIS), exp, shared) for t in exp.tasks if t in among}
    merged = {t for names in sets for t in names if len(names) < len(exp.tasks)}
    normal = {t: own_accuracy(planner, t, exp, shared) for t in exp.tasks if t in merged}
    for names in sets:
        whole = len(names) == len(exp.tasks)
        if subsets.points or not whole:  # the merge of all tasks is measured elsewhere
            exp.subsets[names] = subset(planner, names, exp, shared, singles, {} if whole else normal)


def merged_by_open(planner: Planner, exp: Experiment) -> list[tuple[str, ...]]:
    """Return the sets of tasks with captions that the open regimes of any backbone merge, to be compared with."""
    if exp.how.opens:
        return []
    choices = (choice for choice in planner.study.backbones if planner.sources.has_open(choice))
    every = [planner.sources.captions_for(choice) for choice in choices]
    sets = dict.fromkeys(tuple(t for t in exp.tasks if captions.get(t)) for captions in every)
    return [names for names in sets if 1 < len(names) < len(exp.tasks)]


def single_axis(
    planner: Planner, task: str, axis: str, scales: list[float], exp: Experiment, shared: SharedSteps
) -> Step:
    """Plan a task's predictions along its own vector, which all pairs or sets share."""
    inputs = {**shared.looks, "task": shared.data[task], "finetuned": exp.finetuned[task]}
    samples = planner.study.heatmap.samples
    config = steps.AxisConfig(scales=scales, samples=samples, **planner.on(exp.backbone, exp.regime))
    label, cost = f"{axis} axis of {task} {exp.where}", len(scales) * float(samples)
    return planner.step(steps.single_task_predictions, label, config, inputs, cost)


def heatmap(
    planner: Planner, pair: tuple[str, str], exp: Experiment, shared: SharedSteps, singles: dict[str, Step]
) -> Step:
    """Plan the disentanglement error of a pair over the grid."""
    settings = planner.study.heatmap
    inputs = {**shared.looks, "finetuned": [exp.finetuned[t] for t in pair]}
    inputs |= {"singles": [singles[t] for t in pair]}
    config = steps.HeatmapConfig(scales=settings.scales(), **planner.on(exp.backbone, exp.regime))
    cost = 2.0 * settings.points**2 * settings.samples
    return planner.step(steps.heatmap, f"heatmap of {' and '.join(pair)} {exp.where}", config, inputs, cost)


def own_accuracy(planner: Planner, task: str, exp: Experiment, shared: SharedSteps) -> Step:
    """Plan what a task's own fine-tuned encoder reaches on the sample on which all sets are tried."""
    inputs = {**shared.looks, "task": shared.data[task], "finetuned": exp.finetuned[task]}
    samples = planner.study.subsets.samples
    config = steps.SampleConfig(samples=samples, **planner.on(exp.backbone, exp.regime))
    return planner.step(
        steps.own_accuracy, f"own accuracy of {task} on a sample {exp.where}", config, inputs, float(samples)
    )


def subset(
    planner: Planner,
    names: tuple[str, ...],
    exp: Experiment,
    shared: SharedSteps,
    singles: dict[str, Step],
    normal: dict[str, Step],
) -> Step:
    """Plan to add a set of tasks where ``normal`` normalises it, and to measure their error in the box."""
    settings, axis = planner.study.subsets, planner.study.heatmap
    grids = [method.grid() for method in planner.study.methods if method.name == ADDITION]
    config = steps.SetConfig(
        merge=bool(normal),
        grid=grids[0] if grids else parse_scales(find_recipe(ADDITION).scales),
        samples=settings.samples,
        points=settings.points,
        axis=list(BOX_AXIS),
        seed=zlib.crc32("+".join(names).encode()),
        **planner.on(exp.backbone, exp.regime),
    )
    inputs = {**shared.looks, "tasks": [shared.data[t] for t in names]}
    inputs |= {"finetuned": [exp.finetuned[t] for t in names], "own": [normal[t] for t in names] if normal else None}
    inputs |= {"singles": [singles[t] for t in names] if settings.points else None}
    images = sum(0.1 * planner.images[t] + 8 * min(settings.samples, 0.1 * planner.images[t]) for t in names)
    cost = bool(normal) * images + settings.points * len(names) * axis.samples
    return planner.step(steps.subset, f"add {', '.join(names)} {exp.where}", config, inputs, cost)
