"""Heads and fine-tuned encoders: probes, zero-shot heads, learning rates, training, checkpoints that tasks bring."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from taskvec.core.errors import TaskvecError
from taskvec.core.files import file_digest
from taskvec.core.settings import Finetune
from taskvec.encoders import identity
from taskvec.encoders.addresses import split_key
from taskvec.engine.pipeline import Config, Step
from taskvec.learning import external
from taskvec.study.experiment import Experiment, SharedSteps
from taskvec.study.plan.planner import Planner
from taskvec.study.schema import BackboneChoice, RegimeChoice
from taskvec.study.steps import learning as steps


def make_heads(planner: Planner, exp: Experiment, shared: SharedSteps) -> dict[str, Step]:
    """Probe all tasks, so that all regimes share a rate, keep this experiment's heads, and return every task's rate."""
    where = f"({exp.backbone}, seed {exp.seed})"
    probes = {t: probe_task(planner, t, where, exp.seed, shared) for t in shared.data}
    rates = choose_rates(planner, probes, where)
    for t in exp.tasks:
        exp.probe[t] = probes[t]
        inputs = {"probe": probes[t], "rate": rates[t]}
        exp.head[t] = planner.step(steps.pick_head, f"head of {t} {where}", Config(), inputs)
        if exp.how.opens:
            exp.zero_shot[t] = zero_shot_head(planner, t, shared)
    return rates


def probe_task(planner: Planner, task: str, where: str, seed: int, shared: SharedSteps) -> Step:
    """Plan the probes of a task, one a learning rate."""
    device = "" if planner.device == "cpu" else planner.device
    config = steps.ProbeConfig(probe=planner.study.probe, seed=seed, device=device)
    inputs = {"task": shared.data[task], "features": shared.features[task]}
    return planner.step(steps.probe_task, f"probe {task} {where}", config, inputs, config.probe.steps * 8.0)


def choose_rates(planner: Planner, probes: dict[str, Step], where: str) -> dict[str, Step]:
    """Choose one learning rate for all tasks, or one for each."""
    if planner.study.probe.rate_per_task:
        labels = {t: f"rate of {t} {where}" for t in probes}
        return {t: planner.step(steps.choose_rate, labels[t], Config(), {"probes": [p]}) for t, p in probes.items()}
    rate = planner.step(steps.choose_rate, f"rate {where}", Config(), {"probes": list(probes.values())})
    return dict.fromkeys(probes, rate)


def zero_shot_head(planner: Planner, task: str, shared: SharedSteps) -> Step:
    """Plan a task's head from the captions of its classes."""
    address, pickle = planner.sources.address_of(shared.choice), planner.study.allow_pickle
    config = steps.ZeroShotConfig(
        captions=planner.sources.captions_for(shared.choice)[task] or [],
        text="" if planner.sources.is_absent(shared.choice) else identity.describe_text(address, pickle),
        address=str(address),
        allow_pickle=pickle,
        **planner.on(shared.backbone),
    )
    inputs = {**shared.looks, "task": shared.data[task]}
    label = f"zero-shot head of {task} ({shared.backbone})"
    return planner.step(steps.zero_shot, label, config, inputs, 0.1 * planner.images[task])


def finetune_all(planner: Planner, exp: Experiment, shared: SharedSteps, regime: RegimeChoice) -> None:
    """Fine-tune on every task, and on all at once where the study asks for it; search the learning rate first."""
    settings, rate = settings_of(planner, shared.choice, regime), None
    if settings.learning_rates and any(t not in planner.brought for t in exp.tasks):
        rate = search_rate(planner, exp, shared, regime, settings)
    for t in exp.tasks:
        if t in planner.brought:
            exp.finetuned[t] = import_finetuned(planner, t, exp, shared)
        else:
            exp.finetuned[t] = finetune_task(planner, t, exp, shared, settings, rate)
    joint = planner.joint
    if exp.regime != "aligned" or not joint or not planner.sources.takes_part(shared.choice, "joint"):
        return
    if exp.seed in (joint.seeds or planner.study.seeds):
        joint_settings = settings_of(planner, shared.choice, joint)
        if "joint" in shared.choice.learning_rates:
            rate = None
        elif settings.learning_rates and not rate:
            raise TaskvecError(
                f"no learning rate for joint on '{shared.backbone}': all tasks bring checkpoints, none is searched",
                "give the backbone one: learning_rates: {joint: 1.0e-5}",
            )
        else:
            joint_settings = joint_settings.model_copy(update={"learning_rate": settings.learning_rate})
        exp.joint = finetune_joint(planner, exp, shared, joint_settings, rate)


def settings_of(planner: Planner, choice: BackboneChoice, regime: RegimeChoice) -> Finetune:
    """Return the settings of fine-tuning in a regime; a backbone's own learning rate needs no search."""
    update: dict[str, Any] = {"steps": regime.steps} if regime.steps else {}
    if regime.name in choice.learning_rates:
        update |= {"learning_rate": choice.learning_rates[regime.name], "learning_rates": ()}
    return planner.study.finetune.model_copy(update=update)


def search_rate(
    planner: Planner, exp: Experiment, shared: SharedSteps, regime: RegimeChoice, settings: Finetune
) -> Step:
    """Search the learning rate on the first task that is trained, with the first seed (paper, appendix C)."""
    searched = next(t for t in exp.tasks if t not in planner.brought)
    seed = (regime.seeds or planner.study.seeds)[0]
    first = exp if exp.first else Experiment(exp.backbone, exp.regime, seed, exp.tasks, exp.encoder)
    if not exp.first:
        make_heads(planner, first, shared)
    trials = {}
    for rate in sorted(set(settings.learning_rates)):
        at = settings.model_copy(update={"learning_rate": rate})
        trials[rate] = finetune_task(planner, searched, first, shared, at, None, trial=True)
    exp.rate = (searched, trials) if exp.first else None
    config, label = steps.RatesConfig(rates=list(trials)), f"learning rate ({exp.backbone}, {exp.regime})"
    return planner.step(steps.choose_learning_rate, label, config, {"finetuned": list(trials.values())})


def finetune_task(
    planner: Planner,
    task: str,
    exp: Experiment,
    shared: SharedSteps,
    settings: Finetune,
    rate: Step | None,
    trial: bool = False,
) -> Step:
    """Fine-tune on one task; a trial of a learning rate may diverge."""
    inputs = {**shared.looks, "task": shared.data[task], "whole": shared.whole.get(task), "rate": rate}
    inputs |= {} if exp.how.start == "random" else {"head": exp.start[task]}
    config = steps.FinetuneConfig(
        head_learns=exp.how.head_learns,
        trial=trial,
        **training_config(planner, exp, settings, rate),
        **(lora_config(planner) if exp.how.lora else {}),
    )
    at = "" if rate else f" at {settings.learning_rate:g}"
    cost = settings.steps * settings.batch_size * 3.0
    return planner.step(steps.finetune, f"fine-tune {task}{at} {exp.where}", config, inputs, cost)


def training_config(planner: Planner, exp: Experiment, settings: Finetune, rate: Step | None) -> dict[str, Any]:
    """Return what all fine-tuning is told."""
    how = {"finetune": settings, "searched": rate is not None, "seed": exp.seed}
    return how | {"precision": planner.precision(exp.regime)} | planner.on(exp.backbone, exp.regime)


def lora_config(planner: Planner) -> dict[str, Any]:
    """Return the settings of LoRA and the version of the library that has it; an estimate does without."""
    try:
        version = metadata.version("peft")
    except metadata.PackageNotFoundError:
        if not planner.sources.estimate:
            raise TaskvecError("the regime lora needs peft", "pip install 'taskvec[lora]'") from None
        version = ""
    return {"lora": planner.study.lora, "peft": version}


def import_finetuned(planner: Planner, task: str, exp: Experiment, shared: SharedSteps) -> Step:
    """Take the encoder that a task brings in the place of training; its head may be that of the regime's start."""
    choice, pickle = planner.brought[task], planner.study.allow_pickle
    given = {"finetuned": choice.finetuned} | ({"head": choice.head} if choice.head else {})
    files = {key: external.given_file(planner.sources.path(file), key, task, pickle) for key, file in given.items()}
    read = files | external.naming(files)
    paths = {key: str(planner.sources.path(file)) for key, file in given.items()}
    parts = {key: split_key(path)[1] for key, path in paths.items()}
    config = steps.ExternalConfig(
        source={key: file_digest(path) for key, path in read.items()},
        classes=list(choice.classes),
        parts=parts if any(parts.values()) else None,
        task=task,
        allow_pickle=pickle,
        finetuned=paths["finetuned"],
        head=paths.get("head", ""),
        **planner.on(exp.backbone),
    )
    starts = not choice.head and not exp.how.head_learns
    inputs = {**shared.looks, "task": shared.data[task], "head": exp.start[task] if starts else None}
    label = f"checkpoint of {task} {exp.where}"
    return planner.step(steps.import_finetuned, label, config, inputs, 0.1 * planner.images[task])


def finetune_joint(
    planner: Planner, exp: Experiment, shared: SharedSteps, settings: Finetune, rate: Step | None
) -> Step:
    """Plan one encoder for all tasks at once."""
    inputs = {**shared.looks, "tasks": list(shared.data.values()), "heads": list(exp.head.values())}
    inputs |= {"whole": [shared.whole.get(t) for t in shared.data], "rate": rate}
    config = steps.TrainingConfig(**training_config(planner, exp, settings, rate))
    cost = settings.steps * settings.batch_size * 3.0
    return planner.step(steps.finetune_joint, f"fine-tune jointly {exp.where}", config, inputs, cost)
