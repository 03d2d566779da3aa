"""Merges, and the search for their scales and hyperparameters on validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from taskvec.core.settings import coarse
from taskvec.encoders import batch_norm
from taskvec.engine.pipeline import Step
from taskvec.evaluation import racing
from taskvec.evaluation.alignment import COMPARISONS
from taskvec.learning.head_modes import HEAD_MODES
from taskvec.learning.regimes import REGIMES
from taskvec.merging import plugins
from taskvec.merging.registry import Recipe
from taskvec.merging.variants import ADDED
from taskvec.study.experiment import Experiment, SharedSteps, Trial
from taskvec.study.plan.planner import Planner
from taskvec.study.schema import MethodChoice
from taskvec.study.steps import merging as steps
from taskvec.study.steps import searching

SEARCHED = 100
"""Validation images of each task by which one lambda a task is searched."""
ROUNDS = (2, 1)
"""Re-probing refines its coarse search by neighbours two places away, then one."""


def try_method(
    planner: Planner, exp: Experiment, method: MethodChoice, shared: SharedSteps, rates: dict[str, Step]
) -> None:
    """Merge, and try the scales with each kind of head: kept heads all at once or in a race, others coarse to fine.

    Of several hyperparameters each is tried at coarse scales first, and the best of them goes on.
    """
    recipes = method.recipes()
    recipes[0].check_tasks(len(exp.tasks))
    merged = [merge(planner, exp, recipe, shared) for recipe in recipes]
    for kind in planner.study.heads:
        options = [
            Trial(method.name, method.grid(), kind, step, [], step, recipe.settings(), recipe.per_task)
            for step, recipe in zip(merged, recipes, strict=True)
        ]
        trial = options[0] if len(options) == 1 else best_option(planner, exp, options, shared, rates)
        search(planner, exp, trial, (*ROUNDS, 0) if HEAD_MODES[kind].fitted else (0,), shared, rates)
        exp.trials.append(trial)
        if planner.study.agreement and kind == "reprobed" and len(trial.grid) > 1:
            compared = {t: comparison_curve(planner, t, exp, trial, shared) for t in exp.tasks}
            trial.measures |= dict.fromkeys(COMPARISONS, compared)
        if shared.choice.batch_norm == "reestimated" and kind == "kept" and not trial.per_task:
            exp.trials.append(reestimate(planner, exp, trial, shared))


def search(
    planner: Planner,
    exp: Experiment,
    trial: Trial,
    strides: Sequence[int],
    shared: SharedSteps,
    rates: dict[str, Step],
) -> None:
    """Search the scale of a trial: by a race where it may, else in a round for each stride."""
    if planner.study.search == "racing" and trial.heads == "kept" and trial.grid[1:] and not exp.how.linearised:
        race(planner, exp, trial, shared)
        return
    for number, stride in enumerate(strides):
        trial.rounds.append({t: curve(planner, t, exp, trial, number, shared, rates) for t in exp.tasks})
        trial.selection = choose_scale(planner, exp, trial, trial.rounds, stride)


def race(planner: Planner, exp: Experiment, trial: Trial, shared: SharedSteps) -> None:
    """Try the scales of a trial on ever more images of each task; the last look chooses on whole splits."""
    tuned = list(exp.finetuned.values())
    for look in range(len(racing.LOOKS) + 1):
        curves = {t: raced_curve(planner, t, exp, trial, look, shared) for t in exp.tasks}
        trial.rounds.append(curves)
        inputs = {"curves": list(curves.values()), "finetuned": tuned}
        config = searching.SurvivorsConfig(started=len(trial.grid))
        label = f"scales left in the race, look {look + 1}: {trial.title} {exp.where}"
        if look < len(racing.LOOKS):
            trial.selection = planner.step(searching.survivors, label, config, inputs)
    trial.selection = choose_scale(planner, exp, trial, trial.rounds[-1:], 0)


def raced_curve(planner: Planner, task: str, exp: Experiment, trial: Trial, look: int, shared: SharedSteps) -> Step:
    """Score what one look of a race adds on one task; looks after the first read which scales are left."""
    inputs = kept_inputs(planner, task, exp, trial, shared) | {"features": shared.features[task]}
    inputs |= {"plan": trial.selection, "before": trial.rounds[-1][task]} if look else {}
    config = searching.RaceConfig(scales=trial.grid, look=look, seed=exp.seed, **tried(planner, task, exp, trial))
    label = f"scales of {task}, look {look + 1}: {trial.title} {exp.where}"
    cost = racing.LEFT[look] * len(trial.grid) * racing.images_added(look, round(0.1 * planner.images[task]))
    return planner.step(searching.raced_curve, label, config, inputs, cost)


def unraced(planner: Planner) -> Iterator[str]:
    """Yield which line searches of kept heads stay exact in a study that asks for races."""
    if planner.study.search != "racing":
        return
    if any(REGIMES[name].linearised for name in planner.regimes):
        yield "search: racing leaves linearised encoders out: two passes serve all their scales"
    if any(choice.batch_norm == "reestimated" for choice in planner.backbones.values()):
        yield "search: racing leaves re-estimated batch norm out: it is measured at all scales, on whole splits"


def merge(planner: Planner, exp: Experiment, recipe: Recipe, shared: SharedSteps) -> Step:
    """Merge by one method; those that look at data or draw at random are told more than others."""
    sources = plugins.sources(recipe, planner.plugins)
    config = steps.MergeConfig(
        method=recipe.name,
        config=recipe.settings() or None,
        seed=exp.seed if recipe.needs else None,
        sources=sources or None,
        plugins=tuple(str(plugin.path) for plugin in planner.plugins if sources),
        backbone_name=exp.backbone,
        device=planner.device if recipe.measures or (recipe.heavy and planner.device != "cpu") else "",
    )
    inputs = {"backbone": shared.encoder, "finetuned": list(exp.finetuned.values())}
    inputs |= {"tasks": [shared.data[t] for t in exp.tasks]} if recipe.measures else {}
    settings = "".join(f" {key}={value}" for key, value in recipe.settings().items())
    label, cost = f"merge by {recipe.name}{settings} {exp.where}", 2000.0 * len(exp.tasks) if recipe.measures else 10.0
    return planner.step(steps.merge, label, config, inputs, cost)


def best_option(
    planner: Planner, exp: Experiment, options: list[Trial], shared: SharedSteps, rates: dict[str, Step]
) -> Trial:
    """Try every option, kept heads at all scales and others at coarse ones; the one whose best scale is best goes on.

    With kept heads the best scale is often a small one between coarse scales, where all options seem equal.
    """
    for trial in options:
        search(planner, exp, trial, (0,), shared, rates)
    first = options[0]
    what = f"{first.name}, {first.heads} heads {exp.where}"
    choosing = searching.OptionConfig(options=[dict(trial.settings) for trial in options])
    choices = {"choices": [trial.selection for trial in options]}
    option = planner.step(searching.choose_option, f"choose hyperparameters: {what}", choosing, choices)
    inputs = {"merged": [trial.merged for trial in options], "option": option}
    picking, label = steps.PickConfig(per_task=first.per_task), f"merge with chosen hyperparameters: {what}"
    merged = planner.step(steps.pick_merge, label, picking, inputs)
    return Trial(first.name, first.grid, first.heads, merged, [], merged, {}, first.per_task, options, option)


def tried(planner: Planner, task: str, exp: Experiment, trial: Trial) -> dict[str, Any]:
    """Return what all steps are told that look along a trial's vector, of which each task may have its own."""
    place = {"task": exp.tasks.index(task)} if trial.per_task else {}
    return planner.on(exp.backbone, exp.regime) | place


def curve(
    planner: Planner, task: str, exp: Experiment, trial: Trial, number: int, shared: SharedSteps, rates: dict[str, Step]
) -> Step:
    """Try the scales of one round on one task; rounds after the first read which."""
    kept = trial.heads == "kept"
    scales = [] if number else trial.grid if kept else coarse(trial.grid)
    how = {"scales": scales, **tried(planner, task, exp, trial)}
    label = f"scales of {task}, round {number + 1}: {trial.title} {exp.where}"
    cost = (2 if number else len(scales)) * planner.images[task] * (0.1 if kept else 1.4)
    if kept:
        inputs = kept_inputs(planner, task, exp, trial, shared)
        return planner.step(searching.kept_curve, label, searching.CurveConfig(**how), inputs, cost)
    inputs = {**shared.looks, "task": shared.data[task], "merged": trial.merged}
    inputs |= {"plan": trial.selection} if number else {}
    how["seed"] = exp.seed
    if trial.heads == "surgery":
        correction = searching.SurgeryConfig(surgery=planner.study.surgery, **how)
        inputs |= {"finetuned": exp.finetuned[task]}
        return planner.step(searching.surgery_curve, label, correction, inputs, cost)
    inputs |= {"head": exp.head[task], "rate": rates[task]}
    probing = searching.ReprobeConfig(probe=planner.study.probe, **how)
    return planner.step(searching.reprobed_curve, label, probing, inputs, cost)


def kept_inputs(planner: Planner, task: str, exp: Experiment, trial: Trial, shared: SharedSteps) -> dict[str, Any]:
    """Return what steps read that try scales with a kept head: ``start`` knows scale 0 of a head that did not learn."""
    learned = exp.how.head_learns or task in planner.brought  # a head that need not be the one it started from
    inputs = {**shared.looks, "task": shared.data[task], "merged": trial.merged}
    return inputs | {"head": exp.finetuned[task], "start": None if learned else exp.start[task]}


def comparison_curve(planner: Planner, task: str, exp: Experiment, trial: Trial, shared: SharedSteps) -> Step:
    """Compare features with the task's fine-tuned encoder at every scale of the grid."""
    inputs = {**shared.looks, "task": shared.data[task], "merged": trial.merged}
    inputs |= {"finetuned": exp.finetuned[task]}
    images, how = planner.study.agreement, tried(planner, task, exp, trial)
    config = searching.AgreementConfig(scales=trial.grid, images=images, metrics=list(COMPARISONS), **how)
    label, cost = f"agreement on {task}: {trial.title} {exp.where}", float((1 + len(trial.grid)) * images)
    return planner.step(searching.agreement, label, config, inputs, cost)


def choose_scale(
    planner: Planner, exp: Experiment, trial: Trial, rounds: Sequence[Mapping[str, Step]], stride: int
) -> Step:
    """Plan the choice of a scale after some rounds; with a stride it names the scales of the next one."""
    inputs = {"rounds": [list(curves.values()) for curves in rounds], "finetuned": list(exp.finetuned.values())}
    config, number = (
        searching.ChoiceConfig(grid=trial.grid, refine=stride),
        f", round {len(trial.rounds)}" * bool(stride),
    )
    label = f"choose lambda{number}: {trial.title} {exp.where}"
    return planner.step(searching.choose_scale, label, config, inputs)


def reestimate(planner: Planner, exp: Experiment, kept: Trial, shared: SharedSteps) -> Trial:
    """Try the scales with kept heads again, with the statistics of batch norm estimated anew at each."""
    where, on = f"{kept.name} {exp.where}", planner.on(exp.backbone)
    common: dict[str, Any] = {**shared.looks, "merged": kept.merged}
    inputs: dict[str, Any] = common | {"tasks": [shared.data[t] for t in exp.tasks]}
    config = steps.ReestimateConfig(scales=kept.grid, images=batch_norm.IMAGES, **on)
    cost, label = float(len(kept.grid) * batch_norm.IMAGES), f"batch norm at the scales of {where}"
    statistics = planner.step(steps.reestimate, label, config, inputs, cost)
    trial = replace(kept, rounds=[{}], options=[], statistics=statistics)
    for t in exp.tasks:
        inputs = common | {"task": shared.data[t], "head": exp.finetuned[t], "statistics": statistics}
        label, cost = f"scales of {t}: {where}, batch norm re-estimated", 0.1 * len(kept.grid) * planner.images[t]
        curve_config = searching.CurveConfig(scales=kept.grid, **on)
        trial.rounds[0][t] = planner.step(searching.reestimated_curve, label, curve_config, inputs, cost)
    trial.selection = choose_scale(planner, exp, trial, trial.rounds, 0)
    return trial


def scale_per_task(planner: Planner, exp: Experiment, shared: SharedSteps) -> None:
    """Search one lambda a task for addition with kept heads, from the common one."""
    for common in [trial for trial in exp.trials if trial.heads == "kept" and trial.variant == ADDED]:
        inputs = {**shared.looks, "tasks": [shared.data[t] for t in exp.tasks]}
        inputs |= {"finetuned": list(exp.finetuned.values()), "choice": common.selection}
        cost = sum(8 * len(exp.tasks) * SEARCHED + 0.2 * planner.images[t] for t in exp.tasks)
        on = planner.on(exp.backbone, exp.regime)
        config = steps.PerTaskConfig(grid=common.grid, samples=SEARCHED, **on)
        step = planner.step(steps.per_task_scales, f"lambda of each task {exp.where}", config, inputs, cost)
        exp.trials.append(Trial(common.name, common.grid, "kept", step, [], step, scaling="per-task"))
