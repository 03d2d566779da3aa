"""What comes after choices: tests, gains, disentanglement, sets of tasks, forgetting, the model that is kept."""

from __future__ import annotations

import zlib
from typing import Any

from taskvec.core.settings import parse_scales
from taskvec.engine.pipeline import Step
from taskvec.evaluation.disentanglement import BOX_AXIS, choose_pairs, spread_sets
from taskvec.merging.registry import ADDITION, find_recipe
from taskvec.study.experiment import Cell, Ground
from taskvec.study.plan.planner import Planner
from taskvec.study.steps import measuring as steps


def negate(planner: Planner, cell: Cell, ground: Ground) -> None:
    """Forget one task by its negated vector; heads are those that the pre-trained encoder was probed with."""
    asked = planner.study.negation
    if asked is None or not {asked.forget, asked.control} <= set(cell.tasks):
        return
    names, heads = (asked.forget, asked.control), cell.zero_shot or cell.head
    inputs = {"backbone": [ground.encoder], "task": [ground.data[t] for t in names]}
    inputs |= {"head": [heads[t] for t in names], "finetuned": [cell.finetuned[asked.forget]]}
    config = {"scales": parse_scales(asked.scales), "keep": asked.keep, **planner.on(cell)}
    cost = sum((0.1 * len(config["scales"]) + 0.4) * planner.images[t] for t in names)
    label = f"forget {asked.forget}, keep {asked.control} {cell.where}"
    cell.negation[names] = planner.step(steps.negate, label, config, inputs, cost)


def test_all(planner: Planner, cell: Cell, ground: Ground) -> None:
    """Plan the only steps that look at test labels: they read every choice, so they come after all of them."""
    common = {"choices": [c.choice for c in cell.candidates], "merged": [c.merged for c in cell.candidates]}
    common |= cell.statistics()
    kinds = [c.heads for c in cell.candidates]
    baselines = {"joint": [cell.joint]} if cell.joint else {}
    for t in cell.tasks:
        inputs = {"backbone": [ground.encoder], "task": [ground.data[t]], "probe": [cell.head[t]]}
        inputs |= {"finetuned": [cell.finetuned[t]], **baselines}
        inputs |= {"zero_shot": [cell.zero_shot[t]]} if cell.zero_shot else {}
        inputs |= common | {f"rounds{i}": [one[t] for one in c.rounds] for i, c in enumerate(cell.candidates)}
        config: dict[str, Any] = {"candidates": kinds, **planner.on(cell)}
        if any(c.per_task for c in cell.candidates):
            config |= {"task": cell.tasks.index(t)}
        cell.test[t] = planner.step(steps.test_task, f"test {t} {cell.where}", config, inputs, planner.images[t])
    config = {"candidates": len(kinds), "normalised": planner.sources.mixed(cell.tasks)}
    cell.gains = planner.step(steps.gains, f"gains {cell.where}", config, {"tests": list(cell.test.values())})


def keep_model(planner: Planner, cell: Cell, ground: Ground) -> None:
    """Plan the model of a cell: what was best on validation, ready to use."""
    inputs = {"backbone": [ground.encoder], "probe": list(cell.head.values())}
    inputs |= {"finetuned": list(cell.finetuned.values()), "tasks": [ground.data[t] for t in cell.tasks]}
    inputs |= {"choices": [c.choice for c in cell.candidates], "merged": [c.merged for c in cell.candidates]}
    inputs |= {
        f"rounds{i}-{k}": [one[t] for one in c.rounds]
        for i, c in enumerate(cell.candidates)
        for k, t in enumerate(cell.tasks)
    }
    inputs |= cell.statistics() | cell.chosen_options()
    candidates: list[dict[str, Any]] = [
        {"method": c.name, "heads": c.read_by, **c.variant.differences} for c in cell.candidates
    ]
    for candidate, about in zip(cell.candidates, candidates, strict=True):
        about |= {"config": dict(candidate.settings)} if candidate.settings else {}
    config: dict[str, Any] = {"backbone": cell.backbone, "tasks": list(cell.tasks), "candidates": candidates}
    config |= cell.how.expansion
    cell.model = planner.step(steps.build_model, f"model {cell.where}", config, inputs)


def disentanglement(planner: Planner, cell: Cell, ground: Ground) -> None:
    """Plan the heatmaps of pairs, and the sets of tasks; both read each task's predictions along its own axis."""
    pairs = choose_pairs(cell.tasks, planner.study.heatmap.pairs)
    subsets = planner.study.subsets
    sets = spread_sets(cell.tasks, subsets.of(len(cell.tasks)), subsets.limit)
    sets += [one for one in merged_by_open(planner, cell) if one not in sets]
    drawn = {t for pair in pairs for t in pair}
    axis = planner.study.heatmap.scales()
    singles = {t: single_axis(planner, t, "heatmap", axis, cell, ground) for t in cell.tasks if t in drawn}
    for pair in pairs:
        cell.heatmaps[pair] = heatmap(planner, pair, cell, ground, singles)
    among = {t for one in sets for t in one if subsets.points}
    singles = {t: single_axis(planner, t, "box", list(BOX_AXIS), cell, ground) for t in cell.tasks if t in among}
    merged = {t for one in sets for t in one if len(one) < len(cell.tasks)}
    own = {t: own_accuracy(planner, t, cell, ground) for t in cell.tasks if t in merged}
    for one in sets:
        whole = len(one) == len(cell.tasks)
        if subsets.points or not whole:  # the merge of all tasks is measured elsewhere
            cell.subsets[one] = subset(planner, one, cell, ground, singles, {} if whole else own)


def merged_by_open(planner: Planner, cell: Cell) -> list[tuple[str, ...]]:
    """Return the sets of tasks with captions that the open regimes of any backbone merge, to be compared with."""
    if cell.how.opens:
        return []
    every = [planner.sources.captions_for(one) for one in planner.study.backbones if planner.sources.has_open(one)]
    sets = dict.fromkeys(tuple(t for t in cell.tasks if captions.get(t)) for captions in every)
    return [one for one in sets if 1 < len(one) < len(cell.tasks)]


def single_axis(planner: Planner, task: str, axis: str, scales: list[float], cell: Cell, ground: Ground) -> Step:
    """Plan a task's predictions along its own vector, which all pairs or sets share."""
    inputs = {"backbone": [ground.encoder], "task": [ground.data[task]], "finetuned": [cell.finetuned[task]]}
    samples = planner.study.heatmap.samples
    config = {"scales": scales, "samples": samples, **planner.on(cell)}
    label = f"{axis} axis of {task} {cell.where}"
    return planner.step(steps.single_task_predictions, label, config, inputs, len(scales) * float(samples))


def heatmap(planner: Planner, pair: tuple[str, str], cell: Cell, ground: Ground, singles: dict[str, Step]) -> Step:
    """Plan the disentanglement error of a pair over the grid."""
    settings = planner.study.heatmap
    inputs = {"backbone": [ground.encoder], "finetuned": [cell.finetuned[t] for t in pair]}
    inputs |= {"singles": [singles[t] for t in pair]}
    config = {"scales": settings.scales(), **planner.on(cell)}
    cost = 2.0 * settings.points**2 * settings.samples
    return planner.step(steps.heatmap, f"heatmap of {' and '.join(pair)} {cell.where}", config, inputs, cost)


def own_accuracy(planner: Planner, task: str, cell: Cell, ground: Ground) -> Step:
    """Plan what a task's own fine-tuned encoder reaches on the sample on which all sets are tried."""
    inputs = {"backbone": [ground.encoder], "task": [ground.data[task]], "finetuned": [cell.finetuned[task]]}
    config = {"samples": planner.study.subsets.samples, **planner.on(cell)}
    label = f"own accuracy of {task} on a sample {cell.where}"
    return planner.step(steps.own_accuracy, label, config, inputs, float(config["samples"]))


def subset(
    planner: Planner,
    names: tuple[str, ...],
    cell: Cell,
    ground: Ground,
    singles: dict[str, Step],
    own: dict[str, Step],
) -> Step:
    """Plan to add a set of tasks where ``own`` normalises it, and to measure their error in the box."""
    settings, axis = planner.study.subsets, planner.study.heatmap
    grids = [method.grid() for method in planner.study.methods if method.name == ADDITION]
    grid = grids[0] if grids else parse_scales(find_recipe(ADDITION).scales)
    config = {"merge": bool(own), "grid": grid, "samples": settings.samples, **planner.on(cell)}
    config |= {"points": settings.points, "axis": list(BOX_AXIS), "seed": zlib.crc32("+".join(names).encode())}
    inputs = {"backbone": [ground.encoder], "task": [ground.data[t] for t in names]}
    inputs |= {"finetuned": [cell.finetuned[t] for t in names]}
    inputs |= {"singles": [singles[t] for t in names]} if settings.points else {}
    inputs |= {"own": [own[t] for t in names]} if own else {}
    images = sum(0.1 * planner.images[t] + 8 * min(settings.samples, 0.1 * planner.images[t]) for t in names)
    cost = bool(own) * images + settings.points * len(names) * axis.samples
    return planner.step(steps.subset, f"add {', '.join(names)} {cell.where}", config, inputs, cost)
