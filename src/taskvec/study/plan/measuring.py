"""What comes after choices: tests, gains, disentanglement, sets of tasks, forgetting, the model that is kept."""

from __future__ import annotations

from typing import Any

from taskvec.core.settings import parse_scales
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
