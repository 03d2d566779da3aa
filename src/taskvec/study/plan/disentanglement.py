"""Disentanglement: heatmaps of pairs, round by round, and sets of tasks; both read predictions along single vectors."""

from __future__ import annotations

import zlib

from taskvec.core.settings import parse_scales
from taskvec.engine.pipeline import Step
from taskvec.evaluation.disentanglement import BOX_AXIS, choose_pairs, spread_sets
from taskvec.evaluation.sampling import planned_looks
from taskvec.merging.registry import ADDITION, find_recipe
from taskvec.study.experiment import Experiment, SharedSteps
from taskvec.study.plan.planner import Planner
from taskvec.study.steps import disentanglement as steps


def disentanglement(planner: Planner, exp: Experiment, shared: SharedSteps) -> None:
    """Plan the heatmaps of pairs, and the sets of tasks; both read each task's predictions along its own axis."""
    pairs = choose_pairs(exp.tasks, planner.study.heatmap.pairs)
    subsets = planner.study.subsets
    sets = spread_sets(exp.tasks, subsets.of(len(exp.tasks)), subsets.limit)
    compared = merged_by_open(planner, exp)
    sets += [names for names in compared if names not in sets]
    drawn = {t for pair in pairs for t in pair}
    axis = planner.study.heatmap.scales()
    singles = {t: single_axis(planner, t, "heatmap", axis, exp, shared) for t in exp.tasks if t in drawn}
    if pairs:
        exp.pairs, exp.heatmaps = pairs, heatmaps(planner, pairs, exp, shared, singles)
    among = {t for names in sets for t in names if subsets.points}
    singles = {t: single_axis(planner, t, "box", list(BOX_AXIS), exp, shared) for t in exp.tasks if t in among}
    merged = {t for names in sets for t in names if len(names) < len(exp.tasks)}
    normal = {t: own_accuracy(planner, t, exp, shared) for t in exp.tasks if t in merged}
    for names in sets:
        whole = len(names) == len(exp.tasks)
        if subsets.points or not whole:  # the merge of all tasks is measured elsewhere
            tolerance = 0.0 if names in compared else planner.study.heatmap.tolerance
            exp.subsets[names] = subset(planner, names, exp, shared, singles, {} if whole else normal, tolerance)


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


def heatmaps(
    planner: Planner, pairs: list[tuple[str, str]], exp: Experiment, shared: SharedSteps, singles: dict[str, Step]
) -> Step:
    """Plan the heatmaps of all pairs in rounds: each looks at more images, at the points that the errors leave open.

    The errors of the last round are those of all.
    """
    settings, start = planner.study.heatmap, 0
    looks = planned_looks(settings.samples, settings.tolerance)
    config = steps.ErrorsConfig(scales=settings.scales(), looks=looks, tolerance=settings.tolerance)
    rounds, errors = [], None
    for number, stop in enumerate(looks, 1):
        rounds.append([heatmap(planner, pair, (start, stop), exp, shared, singles, errors) for pair in pairs])
        label = f"errors of all pairs, round {number} {exp.where}"
        errors, start = planner.step(steps.heatmap_errors, label, config, {"rounds": list(rounds)}), stop
    assert errors is not None
    return errors


def heatmap(
    planner: Planner,
    pair: tuple[str, str],
    places: tuple[int, int],
    exp: Experiment,
    shared: SharedSteps,
    singles: dict[str, Step],
    errors: Step | None,
) -> Step:
    """Plan to count the changes of a pair on one part of its images; after the first at the points left open."""
    settings, (start, stop) = planner.study.heatmap, places
    inputs = {**shared.looks, "tasks": [shared.data[t] for t in pair], "plan": errors}
    inputs |= {"finetuned": [exp.finetuned[t] for t in pair], "singles": [singles[t] for t in pair]}
    on = planner.on(exp.backbone, exp.regime)
    config = steps.HeatmapConfig(scales=settings.scales(), start=start, stop=stop, seed=seed_of(pair), **on)
    label = f"heatmap of {' and '.join(pair)}, images {start + 1} to {stop} {exp.where}"
    return planner.step(steps.heatmap, label, config, inputs, 2.0 * settings.points**2 * (stop - start))


def seed_of(names: tuple[str, ...]) -> int:
    """Return the seed of what is drawn for some tasks together."""
    return zlib.crc32("+".join(names).encode())


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
    test_tolerance: float,
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
        seed=seed_of(names),
        tolerance=axis.tolerance,
        test_tolerance=test_tolerance,
        **planner.on(exp.backbone, exp.regime),
    )
    inputs = {**shared.looks, "tasks": [shared.data[t] for t in names]}
    inputs |= {"finetuned": [exp.finetuned[t] for t in names], "own": [normal[t] for t in names] if normal else None}
    inputs |= {"singles": [singles[t] for t in names] if settings.points else None}
    images = sum(0.1 * planner.images[t] + 8 * min(settings.samples, 0.1 * planner.images[t]) for t in names)
    cost = bool(normal) * images + settings.points * len(names) * axis.samples
    return planner.step(steps.subset, f"add {', '.join(names)} {exp.where}", config, inputs, cost)
