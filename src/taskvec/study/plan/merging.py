"""Merges, and the search for their scales and hyperparameters on validation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from taskvec.core.settings import coarse
from taskvec.encoders import batch_norm
from taskvec.engine.pipeline import Step
from taskvec.learning.head_modes import HEAD_MODES
from taskvec.merging import plugins
from taskvec.merging.registry import ADDITION, Recipe
from taskvec.study.experiment import Candidate, Cell, Ground
from taskvec.study.plan.planner import Planner
from taskvec.study.schema import MethodChoice
from taskvec.study.steps import merging as steps

SEARCHED = 100
"""Validation images of each task by which one lambda a task is searched."""
ROUNDS = (2, 1)
"""Re-probing refines its coarse search by neighbours two places away, then one."""


def try_method(planner: Planner, cell: Cell, method: MethodChoice, ground: Ground, rates: dict[str, Step]) -> None:
    """Merge, and try the scales with each kind of head: kept heads all at once, re-probed ones coarse to fine.

    Of several hyperparameters each is tried at coarse scales first, and the best of them goes on.
    """
    recipes = method.recipes()
    recipes[0].check_tasks(len(cell.tasks))
    merged = [merge(planner, cell, recipe, ground) for recipe in recipes]
    for kind in planner.study.heads:
        options = [
            Candidate(method.name, method.grid(), kind, step, [], step, recipe.settings(), recipe.per_task)
            for step, recipe in zip(merged, recipes, strict=True)
        ]
        candidate = options[0] if len(options) == 1 else best_option(planner, cell, options, ground, rates)
        for number, stride in enumerate((*ROUNDS, 0) if HEAD_MODES[kind].fitted else (0,)):
            candidate.rounds.append({t: curve(planner, t, cell, candidate, number, ground, rates) for t in cell.tasks})
            candidate.choice = choose_scale(planner, cell, candidate, stride)
        cell.candidates.append(candidate)
        if planner.study.agreement and kind == "reprobed" and len(candidate.grid) > 1:
            compared = {t: agreement_curve(planner, t, cell, candidate, ground) for t in cell.tasks}
            candidate.measures["agreement"] = compared
        if ground.choice.batch_norm == "reestimated" and kind == "kept" and not candidate.per_task:
            cell.candidates.append(reestimate(planner, cell, candidate, ground))


def merge(planner: Planner, cell: Cell, recipe: Recipe, ground: Ground) -> Step:
    """Merge by one method; those that look at data or draw at random are told more than others."""
    inputs = {"backbone": [ground.encoder], "finetuned": list(cell.finetuned.values())}
    config: dict[str, Any] = {"method": recipe.name}
    config |= {"config": recipe.settings()} if recipe.settings() else {}
    config |= {"seed": cell.seed} if recipe.needs else {}
    cost = 10.0
    if recipe.measures:
        inputs |= {"task": [ground.data[t] for t in cell.tasks]}
        config |= planner.device
        cost = 2000.0 * len(cell.tasks)
    own = plugins.sources(recipe, planner.plugins)
    config |= {"sources": own} if own else {}
    untracked = {"plugins": [str(one.path) for one in planner.plugins]} if own else {}
    told = "".join(f" {key}={value}" for key, value in recipe.settings().items())
    return planner.step(steps.merge, f"merge by {recipe.name}{told} {cell.where}", config, inputs, cost, untracked)


def best_option(
    planner: Planner, cell: Cell, options: list[Candidate], ground: Ground, rates: dict[str, Step]
) -> Candidate:
    """Try every option, kept heads at all scales and others at coarse ones; the one whose best scale is best goes on.

    With kept heads the best scale is often a small one between coarse scales, where all options seem equal.
    """
    for one in options:
        one.rounds.append({t: curve(planner, t, cell, one, 0, ground, rates) for t in cell.tasks})
        one.choice = choose_scale(planner, cell, one, 0)
    first = options[0]
    about = {"options": [dict(one.settings) for one in options]}
    what = f"{first.name}, {first.heads} heads {cell.where}"
    choices = {"choices": [one.choice for one in options]}
    option = planner.step(steps.choose_option, f"choose hyperparameters: {what}", about, choices)
    inputs = {"merged": [one.merged for one in options], "option": [option]}
    merged = planner.step(steps.pick_merge, f"merge with chosen hyperparameters: {what}", {}, inputs)
    return Candidate(first.name, first.grid, first.heads, merged, [], merged, {}, first.per_task, options, option)


def curve(
    planner: Planner, task: str, cell: Cell, candidate: Candidate, number: int, ground: Ground, rates: dict[str, Step]
) -> Step:
    """Try the scales of one round on one task; rounds after the first read which."""
    if candidate.heads == "surgery":
        return surgery_curve(planner, task, cell, candidate, number, ground)
    kept = candidate.heads == "kept"
    inputs = {"backbone": [ground.encoder], "task": [ground.data[task]], "merged": [candidate.merged]}
    scales = [] if number else candidate.grid if kept else coarse(candidate.grid)
    config: dict[str, Any] = {"scales": scales, **planner.on(cell)}
    config |= {"task": cell.tasks.index(task)} if candidate.per_task else {}
    if kept:
        own = cell.how.head_learns or task in planner.brought  # a head that need not be the one it started from
        known = {} if own else {"start": [(cell.zero_shot or cell.head)[task]]}
        inputs |= {"head": [cell.finetuned[task]], **known}
    else:
        inputs |= {"head": [cell.head[task]], "rate": [rates[task]]}
        inputs |= {"plan": [candidate.choice]} if number else {}
        unused = {"learning_rates", "rate_per_task"}
        config |= {"probe": planner.study.probe.model_dump(mode="json", exclude=unused), "seed": cell.seed}
    cost = (2 if number else len(scales)) * planner.images[task] * (0.1 if kept else 1.4)
    label = f"scales of {task}, round {number + 1}: {candidate.title} {cell.where}"
    return planner.step(steps.kept_curve if kept else steps.reprobed_curve, label, config, inputs, cost)


def surgery_curve(planner: Planner, task: str, cell: Cell, candidate: Candidate, number: int, ground: Ground) -> Step:
    """Learn a correction of features at the scales of one round; rounds after the first read which."""
    inputs = {"backbone": [ground.encoder], "task": [ground.data[task]], "merged": [candidate.merged]}
    inputs |= {"finetuned": [cell.finetuned[task]]} | ({"plan": [candidate.choice]} if number else {})
    scales = [] if number else coarse(candidate.grid)
    config: dict[str, Any] = {"scales": scales, "surgery": planner.study.surgery.model_dump(mode="json")}
    config |= {"seed": cell.seed, **planner.on(cell)}
    config |= {"task": cell.tasks.index(task)} if candidate.per_task else {}
    cost = (2 if number else len(scales)) * planner.images[task] * 1.4
    label = f"scales of {task}, round {number + 1}: {candidate.title} {cell.where}"
    return planner.step(steps.surgery_curve, label, config, inputs, cost)


def agreement_curve(planner: Planner, task: str, cell: Cell, candidate: Candidate, ground: Ground) -> Step:
    """Compare features with the task's fine-tuned encoder at every scale of the grid."""
    inputs = {"backbone": [ground.encoder], "task": [ground.data[task]], "merged": [candidate.merged]}
    inputs |= {"finetuned": [cell.finetuned[task]]}
    config: dict[str, Any] = {"scales": candidate.grid, "images": planner.study.agreement, **planner.on(cell)}
    config |= {"task": cell.tasks.index(task)} if candidate.per_task else {}
    cost = float((1 + len(candidate.grid)) * planner.study.agreement)
    return planner.step(steps.agreement, f"agreement on {task}: {candidate.title} {cell.where}", config, inputs, cost)


def choose_scale(planner: Planner, cell: Cell, candidate: Candidate, stride: int) -> Step:
    """Plan the choice of a scale after a round; with a stride it names the scales of the next one."""
    inputs = {f"round{i}": list(curves.values()) for i, curves in enumerate(candidate.rounds)}
    inputs["finetuned"] = list(cell.finetuned.values())
    label = f"choose lambda: {candidate.title} {cell.where}"
    return planner.step(steps.choose_scale, label, {"grid": candidate.grid, "refine": stride}, inputs)


def reestimate(planner: Planner, cell: Cell, kept: Candidate, ground: Ground) -> Candidate:
    """Try the scales with kept heads again, with the statistics of batch norm estimated anew at each."""
    where, grid, merged = f"{kept.name} {cell.where}", kept.grid, kept.merged
    inputs = {"backbone": [ground.encoder], "merged": [merged], "task": [ground.data[t] for t in cell.tasks]}
    config = {"scales": grid, "images": batch_norm.IMAGES, **planner.device}
    cost = len(grid) * batch_norm.IMAGES
    found = planner.step(steps.reestimate, f"batch norm at the scales of {where}", config, inputs, cost)
    candidate = replace(kept, rounds=[{}], options=[], statistics=found)
    for t in cell.tasks:
        inputs = {"backbone": [ground.encoder], "task": [ground.data[t]], "merged": [merged]}
        inputs |= {"head": [cell.finetuned[t]], "statistics": [found]}
        label = f"scales of {t}: {where}, batch norm re-estimated"
        config = {"scales": grid, **planner.device}
        images = 0.1 * len(grid) * planner.images[t]
        candidate.rounds[0][t] = planner.step(steps.reestimated_curve, label, config, inputs, images)
    candidate.choice = choose_scale(planner, cell, candidate, 0)
    return candidate


def scale_per_task(planner: Planner, cell: Cell, ground: Ground) -> None:
    """Search one lambda a task for addition with kept heads, from the common one."""
    common = [c for c in cell.candidates if (c.name, c.heads) == (ADDITION, "kept")]
    for one in common:
        inputs = {"backbone": [ground.encoder], "task": [ground.data[t] for t in cell.tasks]}
        inputs |= {"finetuned": list(cell.finetuned.values()), "choice": [one.choice]}
        cost = sum(8 * len(cell.tasks) * SEARCHED + 0.2 * planner.images[t] for t in cell.tasks)
        config = {"grid": one.grid, "samples": SEARCHED, **planner.on(cell)}
        found = planner.step(steps.per_task_scales, f"lambda of each task {cell.where}", config, inputs, cost)
        cell.candidates.append(Candidate(one.name, one.grid, "kept", found, [], found, scaling="per-task"))
