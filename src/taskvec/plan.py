"""A study as a list of steps: who reads what. Nothing is loaded here but the addresses' identities."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import replace
from importlib import metadata
from typing import Any

from taskvec import backbones, batch_norm, brought, tasks
from taskvec.absent import absent_weights
from taskvec.cells import LEARNING, LINEARISED, LORA, OPEN, Candidate, Cell, Ground, Inputs
from taskvec.compute import choose_device, has_fast_bfloat16
from taskvec.decoded import view_bytes
from taskvec.disentangling import BOX_AXIS, choose_pairs, spread_sets
from taskvec.errors import TaskvecError
from taskvec.merging import ADDITION, PER_TASK, REESTIMATED, SURGERY, Recipe, find_recipe
from taskvec.pipeline import Step
from taskvec.settings import Finetune, coarse, parse_scales
from taskvec.sources import Sources
from taskvec.store import Store, canonical, file_digest
from taskvec.study import BackboneChoice, MethodChoice, RegimeChoice, StudyFile

VERSIONS = {
    "load_backbone": 1,
    "preprocessing": 1,
    "decode_task": 1,
    "decode_training": 1,
    "features": 1,
    "probe_task": 1,
    "choose_rate": 1,
    "pick_head": 1,
    "zero_shot": 1,
    "finetune": 2,
    "finetune_joint": 1,
    "import_finetuned": 1,
    "choose_learning_rate": 2,
    "merge": 2,
    "choose_option": 1,
    "reestimate": 1,
    "reestimated_curve": 1,
    "per_task_scales": 3,
    "kept_curve": 2,
    "reprobed_curve": 2,
    "surgery_curve": 1,
    "agreement": 1,
    "choose_scale": 1,
    "test_task": 2,
    "gains": 1,
    "subset": 3,
    "single_task_predictions": 2,
    "heatmap": 2,
    "build_model": 2,
    "negate": 1,
}
"""The version of each step's meaning: raise it when the same configuration would give another result."""
SEARCHED = 100
"""Validation images of each task by which one lambda a task is searched."""
USUAL_SIZE = 224
"""Pixels that an encoder is taken to see where a study does not say."""
ROUNDS = (2, 1)
"""Re-probing refines its coarse search by neighbours two places away, then one."""


class Planner:
    """Builds the steps of a study, one small method a kind of step."""

    def __init__(self, file: StudyFile, store: Store, estimate: bool = False) -> None:
        self.study, self.sources = file.study, Sources(file, store, estimate)
        device = file.study.device if estimate and file.study.device != "auto" else choose_device(file.study.device)
        self.device = {"device": device}
        self.training = {"device": device, "precision": file.study.precision, "fast_bfloat16": has_fast_bfloat16()}
        self.addresses, self.brought = self.sources.addresses, self.sources.brought
        self.regimes = self.sources.regimes
        self.joint = self.regimes.get("joint")

    def cells(self) -> list[Cell]:
        """Return the steps of every backbone, regime and seed."""
        study = self.study
        chosen = self.sources.backbones()
        self.sources.check_negation()
        about = {name: {"source": self.sources.describe(address)} for name, address in self.addresses.items()}
        self.images = {name: self._count(found["source"]) for name, found in about.items()}
        grounds = [self._ground(name, choice, about) for name, choice in chosen.items()]
        self.sources.check_open()
        return [
            self.cell(ground, regime, seed)
            for ground in grounds
            for regime in study.regimes
            if regime.name != "joint" and self.sources.takes_part(ground.choice, regime.name)
            for seed in regime.seeds or study.seeds
        ]

    def _ground(self, name: str, choice: BackboneChoice, about: dict[str, dict[str, Any]]) -> Ground:
        encoder = self._backbone(name, choice)
        view = self.step("preprocessing", f"preprocessing of {name}", {}, {"backbone": [encoder]})
        data = {t: self._decode(t, name, a, about[t], view) for t, a in self.addresses.items()}
        whole = {t: self._whole(t, name, a, about[t], view) for t, a in self.addresses.items() if tasks.has_whole(a)}
        features = {t: self._features(t, name, encoder, data[t]) for t in data}
        return Ground(name, choice, encoder, data, features, whole)

    def cell(self, ground: Ground, regime: RegimeChoice, seed: int) -> Cell:
        """Return the steps of one backbone, regime and seed."""
        captions = self.sources.captions_for(ground.choice) if regime.name in OPEN else {}
        chosen = tuple(t for t in self.addresses if regime.name not in OPEN or captions[t])
        first = seed == (regime.seeds or self.study.seeds)[0]
        cell = Cell(ground.backbone, regime.name, seed, chosen, ground.encoder, first)
        rates = self._heads(cell, ground)
        self._finetune_all(cell, ground, regime)
        for method in self.study.methods:
            self._merge(cell, method, ground, rates)
        if first and self.study.scales == "per-task":
            self._per_task(cell, ground)
        self._negate(cell, ground)
        self._test(cell, ground)
        self._model(cell, ground)
        if first and regime.disentanglement:
            self._disentanglement(cell, ground)
        return cell

    def step(
        self,
        function: str,
        label: str,
        config: dict[str, Any],
        inputs: Inputs | None = None,
        cost: float = 10,
        aside: dict[str, Any] | None = None,
    ) -> Step:
        """Return a step with the study's threads; costs are in forward passes of one image."""
        version, threads = VERSIONS[function], self.study.threads
        return Step(label, f"taskvec.steps:{function}", version, config, inputs or {}, threads, cost, aside or {})

    def _on(self, cell: Cell) -> dict[str, Any]:
        """Return what steps that evaluate a cell's encoders are told: the device, and that they are linearised."""
        return self.device | ({"linearised": True} if cell.regime == LINEARISED else {})

    def _count(self, source: dict[str, Any]) -> float:
        """Return about how many images a task has, for estimates of time."""
        return float(min(source["images"], 3 * (self.study.limit or source["images"])))

    def _backbone(self, name: str, choice: BackboneChoice) -> Step:
        address = self.sources.address_of(choice)
        about: dict[str, Any] = {"absent": absent_weights(address)}
        if not self.sources.is_absent(choice):
            about = backbones.describe(address, choice.size, self.study.allow_pickle, choice.projection)
        config = {"address": address, "size": choice.size, "name": name, "allow_pickle": self.study.allow_pickle}
        config |= {} if choice.projection is None else {"projection": choice.projection}
        config |= {"batch_norm": choice.batch_norm} if choice.batch_norm != "merged" else {}
        return self.step("load_backbone", f"load {name}", config | {"source": about}, cost=backbones.load_cost(address))

    def _decode(self, task: str, backbone: str, address: str, about: dict[str, Any], view: Step) -> Step:
        label, cost = f"decode {task} ({backbone})", 0.8 * self.images[task]
        config, aside = self.sources.source(address, about)
        return self.step("decode_task", label, config, {"preprocessing": [view]}, cost, aside)

    def _whole(self, task: str, backbone: str, address: str, about: dict[str, Any], view: Step) -> Step:
        label, cost = f"decode whole training images of {task} ({backbone})", 0.8 * self.images[task]
        config, aside = self.sources.source(address, about)
        return self.step("decode_training", label, config, {"preprocessing": [view]}, cost, aside)

    def _features(self, task: str, backbone: str, encoder: Step, data: Step) -> Step:
        inputs = {"backbone": [encoder], "task": [data]}
        return self.step("features", f"features of {task} ({backbone})", self.device, inputs, self.images[task])

    def _heads(self, cell: Cell, ground: Ground) -> dict[str, Step]:
        """Probe all tasks, so that all regimes share a rate, keep this cell's heads, and return every task's rate."""
        where = f"({cell.backbone}, seed {cell.seed})"
        probes = {t: self._probe(t, where, cell.seed, ground) for t in ground.data}
        rates = self._rates(probes, where)
        for t in cell.tasks:
            cell.probe[t] = probes[t]
            inputs = {"probe": [probes[t]], "rate": [rates[t]]}
            cell.head[t] = self.step("pick_head", f"head of {t} {where}", {}, inputs)
            if cell.regime in OPEN:
                cell.zero_shot[t] = self._zero_shot(t, ground)
        return rates

    def _probe(self, task: str, where: str, seed: int, ground: Ground) -> Step:
        probe = self.study.probe
        config = {"probe": probe.model_dump(mode="json"), "seed": seed}
        inputs = {"task": [ground.data[task]], "features": [ground.features[task]]}
        return self.step("probe_task", f"probe {task} {where}", config, inputs, probe.steps * 8.0)

    def _rates(self, probes: dict[str, Step], where: str) -> dict[str, Step]:
        """Choose one learning rate for all tasks, or one for each."""
        if self.study.probe.rate_per_task:
            return {t: self.step("choose_rate", f"rate of {t} {where}", {}, {"probes": [p]}) for t, p in probes.items()}
        rate = self.step("choose_rate", f"rate {where}", {}, {"probes": list(probes.values())})
        return dict.fromkeys(probes, rate)

    def _zero_shot(self, task: str, ground: Ground) -> Step:
        address, allow_pickle = self.sources.address_of(ground.choice), self.study.allow_pickle
        text = "" if self.sources.is_absent(ground.choice) else backbones.describe_text(address, allow_pickle)
        config: dict[str, Any] = {
            "address": address,
            "captions": self.sources.captions_for(ground.choice)[task],
            "text": text,
        }
        config |= {} if address.startswith("lab:") else {"allow_pickle": allow_pickle}
        inputs = {"backbone": [ground.encoder], "task": [ground.data[task]]}
        label = f"zero-shot head of {task} ({ground.backbone})"
        return self.step("zero_shot", label, config | self.device, inputs, 0.1 * self.images[task])

    def _finetune_all(self, cell: Cell, ground: Ground, regime: RegimeChoice) -> None:
        """Fine-tune on every task, and on all at once where the study asks for it; search the learning rate first."""
        settings = self._settings(ground.choice, regime)
        rate: Inputs = {}
        if settings.learning_rates and any(t not in self.brought for t in cell.tasks):
            rate = {"rate": [self._learning_rate(cell, ground, regime, settings)]}
        for t in cell.tasks:
            if t in self.brought:
                cell.finetuned[t] = self._import(t, cell, ground)
            else:
                cell.finetuned[t] = self._finetune(t, cell, ground, settings, rate)
        joint = self.joint
        if cell.regime != "aligned" or not joint or not self.sources.takes_part(ground.choice, "joint"):
            return
        if cell.seed in (joint.seeds or self.study.seeds):
            own = self._settings(ground.choice, joint)
            if "joint" in ground.choice.learning_rates:
                rate = {}
            elif settings.learning_rates and not rate:
                raise TaskvecError(
                    f"no learning rate for joint on '{ground.backbone}': all tasks bring checkpoints, none is searched",
                    "give the backbone one: learning_rates: {joint: 1.0e-5}",
                )
            else:
                own = own.model_copy(update={"learning_rate": settings.learning_rate})
            cell.joint = self._finetune_joint(cell, ground, own, rate)

    def _settings(self, choice: BackboneChoice, regime: RegimeChoice) -> Finetune:
        """Return the settings of fine-tuning in a regime; a backbone's own learning rate needs no search."""
        update: dict[str, Any] = {"steps": regime.steps} if regime.steps else {}
        if regime.name in choice.learning_rates:
            update |= {"learning_rate": choice.learning_rates[regime.name], "learning_rates": ()}
        return self.study.finetune.model_copy(update=update)

    def _learning_rate(self, cell: Cell, ground: Ground, regime: RegimeChoice, settings: Finetune) -> Step:
        """Search the learning rate on the first task that is trained, with the first seed (paper, appendix C)."""
        searched = next(t for t in cell.tasks if t not in self.brought)
        seed = (regime.seeds or self.study.seeds)[0]
        first = cell if cell.first else Cell(cell.backbone, cell.regime, seed, cell.tasks, cell.encoder)
        if not cell.first:
            self._heads(first, ground)
        tried = {}
        for rate in sorted(set(settings.learning_rates)):
            one = settings.model_copy(update={"learning_rate": rate})
            tried[rate] = self._finetune(searched, first, ground, one, {}, trial=True)
        config = {"rates": list(tried)}
        label = f"learning rate ({cell.backbone}, {cell.regime})"
        chosen = self.step("choose_learning_rate", label, config, {"finetuned": list(tried.values())})
        cell.rate = (searched, tried) if cell.first else None
        return chosen

    def _finetune(
        self, task: str, cell: Cell, ground: Ground, settings: Finetune, rate: Inputs, trial: bool = False
    ) -> Step:
        """Fine-tune on one task; a trial of a learning rate may diverge."""
        learns = cell.regime in LEARNING
        start: Inputs = {"head": [(cell.zero_shot or cell.head)[task]]} if cell.regime != "full" else {}
        inputs = {"backbone": [ground.encoder], **ground.training([task])} | start | rate
        config = {"finetune": training_config(settings, rate), "seed": cell.seed, "head_learns": learns}
        config |= {"trial": True} if trial else {}
        config |= {"linearised": True} if cell.regime == LINEARISED else {}
        config |= self._adapters() if cell.regime == LORA else {}
        at = "" if rate else f" at {settings.learning_rate:g}"
        cost = settings.steps * settings.batch_size * 3.0
        return self.step("finetune", f"fine-tune {task}{at} {cell.where}", config | self.training, inputs, cost)

    def _adapters(self) -> dict[str, Any]:
        """Return the settings of LoRA and the version of the library that has it; an estimate does without."""
        try:
            version = metadata.version("peft")
        except metadata.PackageNotFoundError:
            if not self.sources.estimate:
                raise TaskvecError("the regime lora needs peft", "pip install 'taskvec[lora]'") from None
            version = ""
        return {"lora": self.study.lora.model_dump(mode="json"), "peft": version}

    def _import(self, task: str, cell: Cell, ground: Ground) -> Step:
        """Take the encoder that a task brings in the place of training; its head may be that of the regime's start."""
        choice, pickle = self.brought[task], self.study.allow_pickle
        given = {"finetuned": choice.finetuned} | ({"head": choice.head} if choice.head else {})
        files = {key: brought.given_file(self.sources.path(file), key, task, pickle) for key, file in given.items()}
        read = files if choice.classes else files | brought.naming(files)
        digests = {key: file_digest(path) for key, path in read.items()}
        config: dict[str, Any] = {"source": digests, "name": task, "classes": list(choice.classes)}
        aside = {"allow_pickle": pickle} | {key: str(path) for key, path in files.items()}
        inputs = {"backbone": [ground.encoder], "task": [ground.data[task]]}
        if not choice.head and cell.regime not in LEARNING:
            inputs["head"] = [(cell.zero_shot or cell.head)[task]]
        label = f"checkpoint of {task} {cell.where}"
        return self.step("import_finetuned", label, config | self.device, inputs, 0.1 * self.images[task], aside)

    def _finetune_joint(self, cell: Cell, ground: Ground, settings: Finetune, rate: Inputs) -> Step:
        inputs = {"backbone": [ground.encoder], **ground.training(ground.data), "head": list(cell.head.values())}
        config = {"finetune": training_config(settings, rate), "seed": cell.seed, **self.training}
        cost = settings.steps * settings.batch_size * 3.0
        return self.step("finetune_joint", f"fine-tune jointly {cell.where}", config, inputs | rate, cost)

    def _merge(self, cell: Cell, method: MethodChoice, ground: Ground, rates: dict[str, Step]) -> None:
        """Merge, and try the scales with each kind of head: kept heads all at once, re-probed ones coarse to fine.

        Of several hyperparameters each is tried at coarse scales first, and the best of them goes on.
        """
        recipes = method.recipes()
        recipes[0].check_tasks(len(cell.tasks))
        merged = [self._merged(cell, recipe, ground) for recipe in recipes]
        for kind in self.study.heads:
            name = method.name + (SURGERY if kind == "surgery" else "")
            options = [
                Candidate(name, method.grid(), kind, step, [], step, recipe.settings(), recipe.per_task)
                for step, recipe in zip(merged, recipes, strict=True)
            ]
            candidate = options[0] if len(options) == 1 else self._best_option(cell, options, ground, rates)
            for number, stride in enumerate((0,) if kind == "kept" else (*ROUNDS, 0)):
                candidate.rounds.append({t: self._curve(t, cell, candidate, number, ground, rates) for t in cell.tasks})
                candidate.choice = self._choice(cell, candidate, stride)
            cell.candidates.append(candidate)
            if self.study.agreement and kind == "reprobed" and len(candidate.grid) > 1:
                candidate.agreement = {t: self._agreement(t, cell, candidate, ground) for t in cell.tasks}
            if ground.choice.batch_norm == "reestimated" and kind == "kept" and not candidate.per_task:
                cell.candidates.append(self._reestimated(cell, candidate, ground))

    def _reestimated(self, cell: Cell, kept: Candidate, ground: Ground) -> Candidate:
        """Try the scales with kept heads again, with the statistics of batch norm estimated anew at each."""
        where, grid, merged = f"{kept.name} {cell.where}", kept.grid, kept.merged
        inputs = {"backbone": [ground.encoder], "merged": [merged], "task": [ground.data[t] for t in cell.tasks]}
        config = {"scales": grid, "images": batch_norm.IMAGES, **self.device}
        cost = len(grid) * batch_norm.IMAGES
        found = self.step("reestimate", f"batch norm at the scales of {where}", config, inputs, cost)
        candidate = replace(kept, name=kept.name + REESTIMATED, rounds=[{}], options=[], statistics=found)
        for t in cell.tasks:
            inputs = {"backbone": [ground.encoder], "task": [ground.data[t]], "merged": [merged]}
            inputs |= {"head": [cell.finetuned[t]], "statistics": [found]}
            label = f"scales of {t}: {where}, batch norm re-estimated"
            config = {"scales": grid, **self.device}
            images = 0.1 * len(grid) * self.images[t]
            candidate.rounds[0][t] = self.step("reestimated_curve", label, config, inputs, images)
        candidate.choice = self._choice(cell, candidate, 0)
        return candidate

    def _merged(self, cell: Cell, recipe: Recipe, ground: Ground) -> Step:
        """Merge by one method; those that look at data or draw at random are told more than others."""
        inputs = {"backbone": [ground.encoder], "finetuned": list(cell.finetuned.values())}
        config: dict[str, Any] = {"method": recipe.name}
        config |= {"config": recipe.settings()} if recipe.settings() else {}
        config |= {"seed": cell.seed} if recipe.needs else {}
        cost = 10.0
        if recipe.measures:
            inputs |= {"task": [ground.data[t] for t in cell.tasks]}
            config |= self.device
            cost = 2000.0 * len(cell.tasks)
        told = "".join(f" {key}={value}" for key, value in recipe.settings().items())
        return self.step("merge", f"merge by {recipe.name}{told} {cell.where}", config, inputs, cost)

    def _best_option(self, cell: Cell, options: list[Candidate], ground: Ground, rates: dict[str, Step]) -> Candidate:
        """Try every option at coarse scales, and go on with the one whose best scale is best."""
        for option in options:
            rough = replace(option, grid=coarse(option.grid)) if option.heads == "kept" else option
            option.rounds.append({t: self._curve(t, cell, rough, 0, ground, rates) for t in cell.tasks})
            option.choice = self._choice(cell, option, 0)
        first = options[0]
        inputs = {"merged": [one.merged for one in options], "choices": [one.choice for one in options]}
        about = {"options": [dict(one.settings) for one in options]}
        label = f"choose hyperparameters: {first.name}, {first.heads} heads {cell.where}"
        chosen = self.step("choose_option", label, about, inputs)
        return Candidate(first.name, first.grid, first.heads, chosen, [], chosen, {}, first.per_task, options)

    def _curve(
        self, task: str, cell: Cell, candidate: Candidate, number: int, ground: Ground, rates: dict[str, Step]
    ) -> Step:
        """Try the scales of one round on one task; rounds after the first read which."""
        if candidate.heads == "surgery":
            return self._surgery(task, cell, candidate, number, ground)
        kept = candidate.heads == "kept"
        inputs = {"backbone": [ground.encoder], "task": [ground.data[task]], "merged": [candidate.merged]}
        scales = [] if number else candidate.grid if kept else coarse(candidate.grid)
        config: dict[str, Any] = {"scales": scales, **self._on(cell)}
        config |= {"task": cell.tasks.index(task)} if candidate.per_task else {}
        if kept:
            own = cell.regime in LEARNING or task in self.brought  # a head that need not be the one it started from
            known = {} if own else {"start": [(cell.zero_shot or cell.head)[task]]}
            inputs |= {"head": [cell.finetuned[task]], **known}
        else:
            inputs |= {"head": [cell.head[task]], "rate": [rates[task]]}
            inputs |= {"plan": [candidate.choice]} if number else {}
            config |= {"probe": self.study.probe.model_dump(mode="json"), "seed": cell.seed}
        cost = (2 if number else len(scales)) * self.images[task] * (0.1 if kept else 1.4)
        label = f"scales of {task}, round {number + 1}: {candidate.title} {cell.where}"
        return self.step("kept_curve" if kept else "reprobed_curve", label, config, inputs, cost)

    def _surgery(self, task: str, cell: Cell, candidate: Candidate, number: int, ground: Ground) -> Step:
        """Learn a correction of features at the scales of one round; rounds after the first read which."""
        inputs = {"backbone": [ground.encoder], "task": [ground.data[task]], "merged": [candidate.merged]}
        inputs |= {"finetuned": [cell.finetuned[task]]} | ({"plan": [candidate.choice]} if number else {})
        scales = [] if number else coarse(candidate.grid)
        config: dict[str, Any] = {"scales": scales, "surgery": self.study.surgery.model_dump(mode="json")}
        config |= {"seed": cell.seed, **self._on(cell)}
        config |= {"task": cell.tasks.index(task)} if candidate.per_task else {}
        cost = (2 if number else len(scales)) * self.images[task] * 1.4
        label = f"scales of {task}, round {number + 1}: {candidate.title} {cell.where}"
        return self.step("surgery_curve", label, config, inputs, cost)

    def _agreement(self, task: str, cell: Cell, candidate: Candidate, ground: Ground) -> Step:
        """Compare features with the task's fine-tuned encoder at every scale of the grid."""
        inputs = {"backbone": [ground.encoder], "task": [ground.data[task]], "merged": [candidate.merged]}
        inputs |= {"finetuned": [cell.finetuned[task]]}
        config: dict[str, Any] = {"scales": candidate.grid, "images": self.study.agreement, **self._on(cell)}
        config |= {"task": cell.tasks.index(task)} if candidate.per_task else {}
        cost = float((1 + len(candidate.grid)) * self.study.agreement)
        return self.step("agreement", f"agreement on {task}: {candidate.title} {cell.where}", config, inputs, cost)

    def _choice(self, cell: Cell, candidate: Candidate, stride: int) -> Step:
        inputs = {f"round{i}": list(curves.values()) for i, curves in enumerate(candidate.rounds)}
        inputs["finetuned"] = list(cell.finetuned.values())
        label = f"choose lambda: {candidate.title} {cell.where}"
        return self.step("choose_scale", label, {"grid": candidate.grid, "refine": stride}, inputs)

    def _per_task(self, cell: Cell, ground: Ground) -> None:
        """Search one lambda a task for addition with kept heads, from the common one."""
        common = [c for c in cell.candidates if (c.name, c.heads) == (ADDITION, "kept")]
        for one in common:
            inputs = {"backbone": [ground.encoder], "task": [ground.data[t] for t in cell.tasks]}
            inputs |= {"finetuned": list(cell.finetuned.values()), "choice": [one.choice]}
            cost = sum(8 * len(cell.tasks) * SEARCHED + 0.2 * self.images[t] for t in cell.tasks)
            config = {"grid": one.grid, "samples": SEARCHED, **self._on(cell)}
            found = self.step("per_task_scales", f"lambda of each task {cell.where}", config, inputs, cost)
            cell.candidates.append(Candidate(PER_TASK, one.grid, "kept", found, [], found))

    def _negate(self, cell: Cell, ground: Ground) -> None:
        """Forget one task by its negated vector; heads are those that the pre-trained encoder was probed with."""
        asked = self.study.negation
        if asked is None or not {asked.forget, asked.control} <= set(cell.tasks):
            return
        names, heads = (asked.forget, asked.control), cell.zero_shot or cell.head
        inputs = {"backbone": [ground.encoder], "task": [ground.data[t] for t in names]}
        inputs |= {"head": [heads[t] for t in names], "finetuned": [cell.finetuned[asked.forget]]}
        config = {"scales": parse_scales(asked.scales), "keep": asked.keep, "names": list(names), **self._on(cell)}
        cost = sum((0.1 * len(config["scales"]) + 0.4) * self.images[t] for t in names)
        label = f"forget {asked.forget}, keep {asked.control} {cell.where}"
        cell.negation = self.step("negate", label, config, inputs, cost)

    def _test(self, cell: Cell, ground: Ground) -> None:
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
            config: dict[str, Any] = {"candidates": kinds, **self._on(cell)}
            if any(c.per_task for c in cell.candidates):
                config |= {"task": cell.tasks.index(t)}
            cell.test[t] = self.step("test_task", f"test {t} {cell.where}", config, inputs, self.images[t])
        names = {"tasks": list(cell.tasks), "candidates": kinds}
        cell.gains = self.step("gains", f"gains {cell.where}", names, {"tests": list(cell.test.values())})

    def _model(self, cell: Cell, ground: Ground) -> None:
        """Plan the model of a cell: what was best on validation, ready to use."""
        inputs = {"backbone": [ground.encoder], "probe": list(cell.head.values())}
        inputs |= {"finetuned": list(cell.finetuned.values()), "tasks": [ground.data[t] for t in cell.tasks]}
        inputs |= {"choices": [c.choice for c in cell.candidates], "merged": [c.merged for c in cell.candidates]}
        inputs |= {
            f"rounds{i}-{k}": [one[t] for one in c.rounds]
            for i, c in enumerate(cell.candidates)
            for k, t in enumerate(cell.tasks)
        }
        inputs |= cell.statistics()
        candidates: list[dict[str, Any]] = [{"method": c.name, "heads": c.heads} for c in cell.candidates]
        for candidate, about in zip(cell.candidates, candidates, strict=True):
            about |= {"config": dict(candidate.settings)} if candidate.settings else {}
        config: dict[str, Any] = {"tasks": list(cell.tasks), "candidates": candidates}
        config |= {"linearised": True} if cell.regime == LINEARISED else {}
        cell.model = self.step("build_model", f"model {cell.where}", config, inputs)

    def _disentanglement(self, cell: Cell, ground: Ground) -> None:
        """Plan the heatmaps of pairs, and the sets of tasks; both read each task's predictions along its own axis."""
        pairs = choose_pairs(cell.tasks, self.study.heatmap.pairs)
        subsets = self.study.subsets
        sets = spread_sets(cell.tasks, subsets.of(len(cell.tasks)), subsets.limit)
        sets += [one for one in self._merged_by_open(cell) if one not in sets]
        drawn = {t for pair in pairs for t in pair}
        axis = self.study.heatmap.scales()
        singles = {t: self._single(t, "heatmap", axis, cell, ground) for t in cell.tasks if t in drawn}
        for pair in pairs:
            cell.heatmaps[pair] = self._heatmap(pair, cell, ground, singles)
        among = {t for one in sets for t in one if subsets.points}
        singles = {t: self._single(t, "box", list(BOX_AXIS), cell, ground) for t in cell.tasks if t in among}
        for one in sets:
            whole = len(one) == len(cell.tasks)
            if subsets.points or not whole:  # the merge of all tasks is measured elsewhere
                cell.subsets[one] = self._subset(one, cell, ground, singles, not whole)

    def _merged_by_open(self, cell: Cell) -> list[tuple[str, ...]]:
        """Return the sets of tasks with captions that the open regimes of any backbone merge, to be compared with."""
        if cell.regime in OPEN:
            return []
        every = [self.sources.captions_for(one) for one in self.study.backbones if self.sources.has_open(one)]
        sets = dict.fromkeys(tuple(t for t in cell.tasks if captions.get(t)) for captions in every)
        return [one for one in sets if 1 < len(one) < len(cell.tasks)]

    def _single(self, task: str, axis: str, scales: list[float], cell: Cell, ground: Ground) -> Step:
        inputs = {"backbone": [ground.encoder], "task": [ground.data[task]], "finetuned": [cell.finetuned[task]]}
        samples = self.study.heatmap.samples
        config = {"scales": scales, "samples": samples, **self._on(cell)}
        label = f"{axis} axis of {task} {cell.where}"
        return self.step("single_task_predictions", label, config, inputs, len(scales) * float(samples))

    def _heatmap(self, pair: tuple[str, str], cell: Cell, ground: Ground, singles: dict[str, Step]) -> Step:
        settings = self.study.heatmap
        inputs = {"backbone": [ground.encoder], "finetuned": [cell.finetuned[t] for t in pair]}
        inputs |= {"singles": [singles[t] for t in pair]}
        config = {"scales": settings.scales(), **self._on(cell)}
        cost = 2.0 * settings.points**2 * settings.samples
        return self.step("heatmap", f"heatmap of {' and '.join(pair)} {cell.where}", config, inputs, cost)

    def _subset(
        self, names: tuple[str, ...], cell: Cell, ground: Ground, singles: dict[str, Step], merge: bool
    ) -> Step:
        settings, axis = self.study.subsets, self.study.heatmap
        grids = [method.grid() for method in self.study.methods if method.name == ADDITION]
        grid = grids[0] if grids else parse_scales(find_recipe(ADDITION).scales)
        config = {"merge": merge, "grid": grid, "samples": settings.samples, **self._on(cell)}
        config |= {"points": settings.points, "axis": list(BOX_AXIS), "seed": zlib.crc32("+".join(names).encode())}
        inputs = {"backbone": [ground.encoder], "task": [ground.data[t] for t in names]}
        inputs |= {"finetuned": [cell.finetuned[t] for t in names]}
        inputs |= {"singles": [singles[t] for t in names]} if settings.points else {}
        images = sum(0.1 * self.images[t] + 8 * min(settings.samples, 0.1 * self.images[t]) for t in names)
        cost = merge * images + settings.points * len(names) * axis.samples
        return self.step("subset", f"add {', '.join(names)} {cell.where}", config, inputs, cost)


def training_config(settings: Finetune, rate: Inputs) -> dict[str, Any]:
    """Return the settings that a fine-tuning step depends on: no rate where it reads one, and not those of a search."""
    left_out = {"learning_rates"} | ({"learning_rate"} if rate else set())
    return settings.model_dump(mode="json", exclude=left_out)


def view_sizes(steps: Iterable[Step]) -> float:
    """Return about how many bytes the evaluation views of a study take; an encoder's own size counts as 224 pixels."""
    sizes = {}
    for step in steps:
        if step.function.endswith(":decode_task"):
            encoder = step.inputs["preprocessing"][0].inputs["backbone"][0]
            size, source = encoder.config["size"] or USUAL_SIZE, step.config["source"]
            images = min(source["images"], 3 * (step.config["limit"] or source["images"]))
            sizes[canonical([source, size])] = view_bytes(images, size)
    return sum(sizes.values())


def plan(file: StudyFile, store: Store, estimate: bool = False) -> list[Cell]:
    """Return the steps of a study, by backbone, regime and seed; unknown addresses raise here, before any work.

    For an ``estimate`` no image is read: the paper's tasks need not be there, and the device of the study neither.
    """
    return Planner(file, store, estimate).cells()
