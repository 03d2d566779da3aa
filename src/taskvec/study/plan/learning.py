"""Heads and fine-tuned encoders: probes, zero-shot heads, learning rates, training, checkpoints that tasks bring."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from taskvec.core.errors import TaskvecError
from taskvec.core.files import file_digest
from taskvec.core.settings import Finetune
from taskvec.encoders import backbone as backbones
from taskvec.encoders.addresses import split_key
from taskvec.engine.pipeline import Step
from taskvec.learning import external as brought
from taskvec.study.experiment import Cell, Ground, Inputs
from taskvec.study.plan.planner import Planner
from taskvec.study.schema import BackboneChoice, RegimeChoice
from taskvec.study.steps import learning as steps


def make_heads(planner: Planner, cell: Cell, ground: Ground) -> dict[str, Step]:
    """Probe all tasks, so that all regimes share a rate, keep this cell's heads, and return every task's rate."""
    where = f"({cell.backbone}, seed {cell.seed})"
    probes = {t: probe_task(planner, t, where, cell.seed, ground) for t in ground.data}
    rates = choose_rates(planner, probes, where)
    for t in cell.tasks:
        cell.probe[t] = probes[t]
        inputs = {"probe": [probes[t]], "rate": [rates[t]]}
        cell.head[t] = planner.step(steps.pick_head, f"head of {t} {where}", {}, inputs)
        if cell.how.opens:
            cell.zero_shot[t] = zero_shot_head(planner, t, ground)
    return rates


def probe_task(planner: Planner, task: str, where: str, seed: int, ground: Ground) -> Step:
    """Plan the probes of a task, one a learning rate."""
    probe = planner.study.probe
    config = {"probe": probe.model_dump(mode="json", exclude={"rate_per_task"}), "seed": seed}
    inputs = {"task": [ground.data[task]], "features": [ground.features[task]]}
    return planner.step(steps.probe_task, f"probe {task} {where}", config, inputs, probe.steps * 8.0)


def choose_rates(planner: Planner, probes: dict[str, Step], where: str) -> dict[str, Step]:
    """Choose one learning rate for all tasks, or one for each."""
    if planner.study.probe.rate_per_task:
        return {
            t: planner.step(steps.choose_rate, f"rate of {t} {where}", {}, {"probes": [p]}) for t, p in probes.items()
        }
    rate = planner.step(steps.choose_rate, f"rate {where}", {}, {"probes": list(probes.values())})
    return dict.fromkeys(probes, rate)


def zero_shot_head(planner: Planner, task: str, ground: Ground) -> Step:
    """Plan a task's head from the captions of its classes."""
    address, allow_pickle = planner.sources.address_of(ground.choice), planner.study.allow_pickle
    text = "" if planner.sources.is_absent(ground.choice) else backbones.describe_text(address, allow_pickle)
    config = {"captions": planner.sources.captions_for(ground.choice)[task], "text": text, **planner.device}
    untracked = {"address": address, "allow_pickle": allow_pickle}
    inputs = {"backbone": [ground.encoder], "task": [ground.data[task]]}
    label = f"zero-shot head of {task} ({ground.backbone})"
    return planner.step(steps.zero_shot, label, config, inputs, 0.1 * planner.images[task], untracked)


def finetune_all(planner: Planner, cell: Cell, ground: Ground, regime: RegimeChoice) -> None:
    """Fine-tune on every task, and on all at once where the study asks for it; search the learning rate first."""
    settings = settings_of(planner, ground.choice, regime)
    rate: Inputs = {}
    if settings.learning_rates and any(t not in planner.brought for t in cell.tasks):
        rate = {"rate": [search_rate(planner, cell, ground, regime, settings)]}
    for t in cell.tasks:
        if t in planner.brought:
            cell.finetuned[t] = import_finetuned(planner, t, cell, ground)
        else:
            cell.finetuned[t] = finetune_task(planner, t, cell, ground, settings, rate)
    joint = planner.joint
    if cell.regime != "aligned" or not joint or not planner.sources.takes_part(ground.choice, "joint"):
        return
    if cell.seed in (joint.seeds or planner.study.seeds):
        own = settings_of(planner, ground.choice, joint)
        if "joint" in ground.choice.learning_rates:
            rate = {}
        elif settings.learning_rates and not rate:
            raise TaskvecError(
                f"no learning rate for joint on '{ground.backbone}': all tasks bring checkpoints, none is searched",
                "give the backbone one: learning_rates: {joint: 1.0e-5}",
            )
        else:
            own = own.model_copy(update={"learning_rate": settings.learning_rate})
        cell.joint = finetune_joint(planner, cell, ground, own, rate)


def settings_of(planner: Planner, choice: BackboneChoice, regime: RegimeChoice) -> Finetune:
    """Return the settings of fine-tuning in a regime; a backbone's own learning rate needs no search."""
    update: dict[str, Any] = {"steps": regime.steps} if regime.steps else {}
    if regime.name in choice.learning_rates:
        update |= {"learning_rate": choice.learning_rates[regime.name], "learning_rates": ()}
    return planner.study.finetune.model_copy(update=update)


def search_rate(planner: Planner, cell: Cell, ground: Ground, regime: RegimeChoice, settings: Finetune) -> Step:
    """Search the learning rate on the first task that is trained, with the first seed (paper, appendix C)."""
    searched = next(t for t in cell.tasks if t not in planner.brought)
    seed = (regime.seeds or planner.study.seeds)[0]
    first = cell if cell.first else Cell(cell.backbone, cell.regime, seed, cell.tasks, cell.encoder)
    if not cell.first:
        make_heads(planner, first, ground)
    tried = {}
    for rate in sorted(set(settings.learning_rates)):
        one = settings.model_copy(update={"learning_rate": rate})
        tried[rate] = finetune_task(planner, searched, first, ground, one, {}, trial=True)
    config = {"rates": list(tried)}
    label = f"learning rate ({cell.backbone}, {cell.regime})"
    chosen = planner.step(steps.choose_learning_rate, label, config, {"finetuned": list(tried.values())})
    cell.rate = (searched, tried) if cell.first else None
    return chosen


def finetune_task(
    planner: Planner, task: str, cell: Cell, ground: Ground, settings: Finetune, rate: Inputs, trial: bool = False
) -> Step:
    """Fine-tune on one task; a trial of a learning rate may diverge."""
    regime, trained = cell.how, {"finetune": training_config(settings, rate), "seed": cell.seed}
    start: Inputs = {} if regime.start == "random" else {"head": [(cell.zero_shot or cell.head)[task]]}
    inputs = {"backbone": [ground.encoder], **ground.training([task])} | start | rate
    config = trained | {"head_learns": regime.head_learns} | regime.expansion
    config |= {"trial": True} if trial else {}
    config |= lora_config(planner) if regime.lora else {}
    at = "" if rate else f" at {settings.learning_rate:g}"
    cost = settings.steps * settings.batch_size * 3.0
    config |= planner.training(cell.regime)
    return planner.step(steps.finetune, f"fine-tune {task}{at} {cell.where}", config, inputs, cost)


def lora_config(planner: Planner) -> dict[str, Any]:
    """Return the settings of LoRA and the version of the library that has it; an estimate does without."""
    try:
        version = metadata.version("peft")
    except metadata.PackageNotFoundError:
        if not planner.sources.estimate:
            raise TaskvecError("the regime lora needs peft", "pip install 'taskvec[lora]'") from None
        version = ""
    return {"lora": planner.study.lora.model_dump(mode="json"), "peft": version}


def import_finetuned(planner: Planner, task: str, cell: Cell, ground: Ground) -> Step:
    """Take the encoder that a task brings in the place of training; its head may be that of the regime's start."""
    choice, pickle = planner.brought[task], planner.study.allow_pickle
    given = {"finetuned": choice.finetuned} | ({"head": choice.head} if choice.head else {})
    files = {key: brought.given_file(planner.sources.path(file), key, task, pickle) for key, file in given.items()}
    read = files | brought.naming(files)
    digests = {key: file_digest(path) for key, path in read.items()}
    config: dict[str, Any] = {"source": digests, "classes": list(choice.classes)}
    paths = {key: str(planner.sources.path(file)) for key, file in given.items()}
    config |= (
        {"parts": parts} if any(parts := {key: split_key(path)[1] for key, path in paths.items()}.values()) else {}
    )
    untracked = {"allow_pickle": pickle, "task": task} | paths
    inputs = {"backbone": [ground.encoder], "task": [ground.data[task]]}
    if not choice.head and not cell.how.head_learns:
        inputs["head"] = [(cell.zero_shot or cell.head)[task]]
    label = f"checkpoint of {task} {cell.where}"
    return planner.step(
        steps.import_finetuned, label, config | planner.device, inputs, 0.1 * planner.images[task], untracked
    )


def finetune_joint(planner: Planner, cell: Cell, ground: Ground, settings: Finetune, rate: Inputs) -> Step:
    """Plan one encoder for all tasks at once."""
    inputs = {"backbone": [ground.encoder], **ground.training(ground.data), "head": list(cell.head.values())}
    config = {"finetune": training_config(settings, rate), "seed": cell.seed, **planner.training(cell.regime)}
    cost = settings.steps * settings.batch_size * 3.0
    return planner.step(steps.finetune_joint, f"fine-tune jointly {cell.where}", config, inputs | rate, cost)


def training_config(settings: Finetune, rate: Inputs) -> dict[str, Any]:
    """Return the settings that a fine-tuning step depends on: no rate where it reads one, and not those of a search."""
    left_out = {"learning_rates"} | ({"learning_rate"} if rate else set())
    return settings.model_dump(mode="json", exclude=left_out)
