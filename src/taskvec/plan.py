"""A study as a list of steps: who reads what. Nothing is loaded here but the addresses' identities."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskvec import backbones, tasks
from taskvec.compute import choose_device, has_fast_bfloat16
from taskvec.disentangling import choose_pairs
from taskvec.errors import TaskvecError
from taskvec.pipeline import Step
from taskvec.search import coarse
from taskvec.store import Store
from taskvec.study import BackboneChoice, MethodChoice, StudyFile, TaskChoice

VERSIONS = {
    "load_backbone": 1,
    "preprocessing": 1,
    "decode_task": 1,
    "features": 1,
    "probe_task": 1,
    "choose_rate": 1,
    "pick_head": 1,
    "finetune": 1,
    "merge": 1,
    "kept_curve": 1,
    "reprobed_curve": 1,
    "choose_scale": 1,
    "test_task": 1,
    "gains": 1,
    "single_task_predictions": 1,
    "heatmap": 1,
    "build_model": 1,
}
"""The version of each step's meaning: raise it when the same configuration would give another result."""
ROUNDS = (2, 1)
"""Re-probing refines its coarse search by neighbours two places away, then one."""


@dataclass
class Candidate:
    """A merge that validation may choose: a method and a kind of head, with the steps that tried its scales."""

    method: MethodChoice
    heads: str
    merged: Step
    rounds: list[dict[str, Step]]
    choice: Step


@dataclass
class Cell:
    """All steps of one backbone, regime and seed; steps of single tasks are by task name."""

    backbone: str
    regime: str
    seed: int
    tasks: tuple[str, ...]
    encoder: Step
    head: dict[str, Step] = field(default_factory=dict)
    finetuned: dict[str, Step] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    test: dict[str, Step] = field(default_factory=dict)
    heatmaps: dict[tuple[str, str], Step] = field(default_factory=dict)
    gains: Step | None = None
    model: Step | None = None

    def steps(self) -> Iterator[Step]:
        """Yield the steps whose results a report needs."""
        yield from itertools.chain(
            self.head.values(), self.finetuned.values(), self.test.values(), self.heatmaps.values()
        )
        for candidate in self.candidates:
            yield from (step for one in candidate.rounds for step in one.values())
            yield candidate.choice
        yield from (step for step in (self.gains, self.model) if step is not None)


class Planner:
    """Builds the steps of a study, one small method a kind of step."""

    def __init__(self, file: StudyFile, store: Store) -> None:
        self.study, self.folder, self.store = file.study, file.folder, store
        device = choose_device(file.study.device)
        self.device = {"device": device}
        self.training = {"device": device, "precision": file.study.precision, "fast_bfloat16": has_fast_bfloat16()}
        self.names = unique([t.name or tasks.default_name(self._address(t)) for t in file.study.tasks], "tasks")

    def cells(self) -> list[Cell]:
        """Return the steps of every backbone, regime and seed."""
        study = self.study
        names = unique([b.name or backbones.default_name(b.address) for b in study.backbones], "backbones")
        chosen = dict(zip(self.names, study.tasks, strict=True))
        about = {name: self._describe(task) for name, task in chosen.items()}
        self.images = {name: self._count(found["source"]) for name, found in about.items()}
        cells = []
        for name, choice in zip(names, study.backbones, strict=True):
            encoder = self._backbone(name, choice)
            view = self.step("preprocessing", f"preprocessing of {name}", {}, {"backbone": [encoder]})
            data = {t: self._decode(t, name, self._address(c), about[t], view) for t, c in chosen.items()}
            cached = {t: self._features(t, name, encoder, data[t]) for t in self.names}
            for regime, seed in itertools.product(study.regimes, study.seeds):
                cells.append(self.cell(Cell(name, regime, seed, tuple(self.names), encoder), data, cached))
        return cells

    def cell(self, cell: Cell, data: dict[str, Step], cached: dict[str, Step]) -> Cell:
        """Fill in the steps of one backbone, regime and seed."""
        where = f"({cell.backbone}, {cell.regime}, seed {cell.seed})"
        encoder = cell.encoder
        probes = {t: self._probe(t, where, cell.seed, data[t], cached[t]) for t in cell.tasks}
        rates = self._rates(probes, where)
        for t in cell.tasks:
            cell.head[t] = self.step(
                "pick_head", f"head of {t} {where}", {}, {"probe": [probes[t]], "rate": [rates[t]]}
            )
        for t in cell.tasks:
            inputs = {"backbone": [encoder], "task": [data[t]], "head": [cell.head[t]]}
            cell.finetuned[t] = self._finetune(t, where, cell.seed, inputs)
        for method in self.study.methods:
            self._merge(cell, method, encoder, data, rates, where)
        self._test(cell, encoder, data, where)
        self._heatmaps(cell, encoder, data, where)
        return cell

    def step(
        self,
        function: str,
        label: str,
        config: dict[str, Any],
        inputs: dict[str, list[Step]] | None = None,
        cost: float = 10,
    ) -> Step:
        """Return a step with the study's threads; costs are in forward passes of one image."""
        return Step(
            label, f"taskvec.steps:{function}", VERSIONS[function], config, inputs or {}, self.study.threads, cost
        )

    def _address(self, choice: TaskChoice | BackboneChoice) -> str:
        """Return an address whose path is absolute: relative paths start from the study file's folder."""
        kind, colon, rest = choice.address.partition(":")
        name, at, file = rest.partition("@")
        if kind == "folder":
            return f"{kind}:{self._path(rest)}"
        return f"{kind}{colon}{name}{at}{self._path(file)}" if at else choice.address

    def _path(self, path: str) -> Path:
        return self.folder / Path(path).expanduser()

    def _describe(self, task: TaskChoice) -> dict[str, Any]:
        return {"source": tasks.describe(self._address(task), self.store.tree_digest)}

    def _count(self, source: dict[str, Any]) -> float:
        """Return about how many images a task has, for estimates of time."""
        return float(min(source["images"], 3 * (self.study.limit or source["images"])))

    def _backbone(self, name: str, choice: BackboneChoice) -> Step:
        address = self._address(choice)
        about = backbones.describe(address, choice.size, self.study.allow_pickle)
        config = {"address": address, "size": choice.size, "name": name, "allow_pickle": self.study.allow_pickle}
        return self.step("load_backbone", f"load {name}", config | {"source": about})

    def _decode(self, task: str, backbone: str, address: str, about: dict[str, Any], view: Step) -> Step:
        config = {"address": address, "limit": self.study.limit, **about}
        cost = 0.8 * self.images[task]
        return self.step("decode_task", f"decode {task} ({backbone})", config, {"preprocessing": [view]}, cost)

    def _features(self, task: str, backbone: str, encoder: Step, data: Step) -> Step:
        inputs = {"backbone": [encoder], "task": [data]}
        return self.step("features", f"features of {task} ({backbone})", self.device, inputs, self.images[task])

    def _probe(self, task: str, where: str, seed: int, data: Step, cached: Step) -> Step:
        probe = self.study.probe
        config = {"probe": probe.model_dump(mode="json"), "seed": seed}
        cost = probe.steps * 8.0
        return self.step("probe_task", f"probe {task} {where}", config, {"task": [data], "features": [cached]}, cost)

    def _rates(self, probes: dict[str, Step], where: str) -> dict[str, Step]:
        """Choose one learning rate for all tasks, or one for each."""
        if self.study.probe.rate_per_task:
            return {t: self.step("choose_rate", f"rate of {t} {where}", {}, {"probes": [p]}) for t, p in probes.items()}
        rate = self.step("choose_rate", f"rate {where}", {}, {"probes": list(probes.values())})
        return dict.fromkeys(probes, rate)

    def _finetune(self, task: str, where: str, seed: int, inputs: dict[str, list[Step]]) -> Step:
        settings = self.study.finetune
        config = {"finetune": settings.model_dump(mode="json"), "seed": seed, **self.training}
        cost = settings.steps * settings.batch_size * 3.0
        return self.step("finetune", f"fine-tune {task} {where}", config, inputs, cost)

    def _merge(
        self,
        cell: Cell,
        method: MethodChoice,
        encoder: Step,
        data: dict[str, Step],
        rates: dict[str, Step],
        where: str,
    ) -> None:
        """Merge, and try the scales with each kind of head: kept heads all at once, re-probed ones coarse to fine."""
        finetuned = list(cell.finetuned.values())
        merged = self.step(
            "merge",
            f"merge by {method.name} {where}",
            {"method": method.name},
            {"backbone": [encoder], "finetuned": finetuned},
        )
        shared = {
            t: {"backbone": [encoder], "task": [data[t]], "head": [cell.head[t]], "merged": [merged]}
            for t in cell.tasks
        }
        for kind in self.study.heads:
            title = f"{method.name}, {kind} heads {where}"
            candidate = Candidate(method, kind, merged, [], merged)
            strides = (0,) if kind == "kept" else (*ROUNDS, 0)
            for number, stride in enumerate(strides):
                scales = method.grid() if kind == "kept" else coarse(method.grid())
                curves = {}
                for t in cell.tasks:
                    extra = {} if kind == "kept" else {"rate": [rates[t]]}
                    plan = {"plan": [candidate.choice]} if number else {}
                    config = self._curve_config(kind, [] if number else scales, cell.seed)
                    tried = 2 if number else len(scales)
                    cost = tried * self.images[t] * (0.1 if kind == "kept" else 1.4)
                    label = f"scales of {t}, round {number + 1}: {title}"
                    curves[t] = self.step(f"{kind}_curve", label, config, shared[t] | extra | plan, cost)
                candidate.rounds.append(curves)
                candidate.choice = self._choice(cell, candidate, stride, title)
            cell.candidates.append(candidate)

    def _curve_config(self, kind: str, scales: list[float], seed: int) -> dict[str, Any]:
        config = {"scales": scales, **self.device}
        return config if kind == "kept" else config | {"probe": self.study.probe.model_dump(mode="json"), "seed": seed}

    def _choice(self, cell: Cell, candidate: Candidate, stride: int, title: str) -> Step:
        inputs = {f"round{i}": list(curves.values()) for i, curves in enumerate(candidate.rounds)}
        inputs["finetuned"] = list(cell.finetuned.values())
        config = {"grid": candidate.method.grid(), "refine": stride}
        return self.step("choose_scale", f"choose lambda: {title}", config, inputs)

    def _test(self, cell: Cell, encoder: Step, data: dict[str, Step], where: str) -> None:
        """Plan the only steps that look at test labels: they read every choice, so they come after all of them."""
        common = {"choices": [c.choice for c in cell.candidates], "merged": [c.merged for c in cell.candidates]}
        kinds = [c.heads for c in cell.candidates]
        for t in cell.tasks:
            inputs = {
                "backbone": [encoder],
                "task": [data[t]],
                "head": [cell.head[t]],
                "finetuned": [cell.finetuned[t]],
            }
            rounds = {f"rounds{i}": [one[t] for one in c.rounds] for i, c in enumerate(cell.candidates)}
            cell.test[t] = self.step(
                "test_task",
                f"test {t} {where}",
                {"candidates": kinds, **self.device},
                inputs | common | rounds,
                self.images[t],
            )
        names = {"tasks": list(cell.tasks), "candidates": kinds}
        cell.gains = self.step("gains", f"gains {where}", names, {"tests": list(cell.test.values())})
        own = {
            f"rounds{i}-{k}": [one[t] for one in c.rounds]
            for i, c in enumerate(cell.candidates)
            for k, t in enumerate(cell.tasks)
        }
        kept = {
            "heads": list(cell.head.values()),
            "finetuned": list(cell.finetuned.values()),
            "tasks": list(data.values()),
        }
        config = {
            "tasks": list(cell.tasks),
            "candidates": [{"method": c.method.name, "heads": c.heads} for c in cell.candidates],
        }
        cell.model = self.step(
            "build_model", f"model {where}", config, {"backbone": [encoder], **kept, **common, **own}
        )

    def _heatmaps(self, cell: Cell, encoder: Step, data: dict[str, Step], where: str) -> None:
        settings = self.study.heatmap
        scales = settings.scales()
        pairs = choose_pairs(cell.tasks, settings.pairs)
        singles = {}
        for t in dict.fromkeys(name for pair in pairs for name in pair):
            inputs = {
                "backbone": [encoder],
                "task": [data[t]],
                "head": [cell.head[t]],
                "finetuned": [cell.finetuned[t]],
            }
            config = {"scales": scales, "samples": settings.samples, **self.device}
            cost = len(scales) * float(settings.samples)
            singles[t] = self.step("single_task_predictions", f"heatmap axis of {t} {where}", config, inputs, cost)
        for a, b in pairs:
            inputs = {"backbone": [encoder]}
            inputs |= {
                role: [by[a], by[b]]
                for role, by in (("finetuned", cell.finetuned), ("heads", cell.head), ("singles", singles))
            }
            cost = 2.0 * len(scales) ** 2 * settings.samples
            config = {"scales": scales, **self.device}
            cell.heatmaps[a, b] = self.step("heatmap", f"heatmap of {a} and {b} {where}", config, inputs, cost)


def unique(names: list[str], kind: str) -> list[str]:
    """Return the names, or raise when two are the same or one cannot stand in a table."""
    for name in names:
        if names.count(name) > 1:
            raise TaskvecError(
                f"two {kind} are named '{name}'", f"give each a name of its own: {{address: ..., name: {name}-2}}"
            )
        if name.startswith(".") or any(sign in name for sign in "+/\\\n\r\t"):
            raise TaskvecError(
                f"'{name}' cannot name one of the {kind}: it begins with a dot, or has a + or a slash or a line break",
                "give it another name: key",
            )
    return names


def plan(file: StudyFile, store: Store) -> list[Cell]:
    """Return the steps of a study, by backbone, regime and seed; unknown addresses raise here, before any work."""
    return Planner(file, store).cells()
