"""A study: the validated description of an experiment, with a default for everything but backbones and tasks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, FiniteFloat, field_validator, model_validator

from taskvec.core.errors import TaskvecError, did_you_mean
from taskvec.core.settings import (
    MOST,
    MOST_SCALES,
    Count,
    Finetune,
    Heatmap,
    Lora,
    Negation,
    Probe,
    Rate,
    Settings,
    Subsets,
    Surgery,
    check_distinct,
    parse_scales,
)
from taskvec.encoders.addresses import parse
from taskvec.learning.head_modes import ModeName
from taskvec.learning.regimes import REGIMES
from taskvec.merging.registry import ADDITION, Recipe, find_recipe
from taskvec.paper.numbers import MODELS
from taskvec.study.names import Name, told_twins, twins

MOST_OPTIONS = 64
"""How many combinations of a method's hyperparameters one study searches at most."""
FEW = {"steps": 2, "examples": 8}
"""Hyperparameters of methods that cost time, and what a trial run gives them."""
Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**63)], ...],
    Field(min_length=1, max_length=100),
    AfterValidator(check_distinct),
]


class Choice(Settings):
    """A mapping with one key that matters, for which a plain string may stand."""

    short_for: ClassVar[str] = "address"

    @model_validator(mode="before")
    @classmethod
    def _long(cls, value: Any) -> Any:
        return {cls.short_for: value} if isinstance(value, str) else value


def check_regime(regime: str) -> str:
    """Return the name of a regime, or raise with the nearest."""
    if regime not in REGIMES:
        raise ValueError(f"unknown regime '{regime}'; {did_you_mean(regime, REGIMES)}")
    return regime


def check_paper(key: str) -> str:
    """Return the name of a row of the paper's tables, or raise with the nearest; empty is none."""
    if key and key not in MODELS:
        raise ValueError(f"unknown row of the paper's tables '{key}'; {did_you_mean(key, MODELS)}")
    return key


Regime = Annotated[str, AfterValidator(check_regime)]


class BackboneChoice(Choice):
    """A backbone: its address, its input size in pixels (its own when left out), and a name for tables.

    ``learning_rates`` of its own, by regime, go before those of ``finetune``; ``regimes`` are those of the study that
    it takes part in, all when left out; ``paper`` names the row of the paper's tables that it stands for.
    ``projection`` takes a CLIP model's features after its projection or before it; ``batch_norm: reestimated`` also
    measures merged encoders with statistics of batch norm that are estimated anew.
    """

    address: str
    size: Annotated[int, Field(ge=8, le=2048)] | None = None
    name: Name = ""
    regimes: tuple[Regime, ...] = ()
    learning_rates: dict[Regime, Rate] = Field(default={})
    paper: Annotated[str, AfterValidator(check_paper)] = ""
    projection: bool | None = None
    batch_norm: Literal["merged", "reestimated"] = "merged"

    @property
    def called(self) -> str:
        """Return its name in tables and folders: its own, or the one that its address gives."""
        return self.name or parse(self.address).default_name

    def shortened(self) -> BackboneChoice:
        """Return the same backbone, but of an encoder along its pre-training at most the second step."""
        base, at, step = self.address.partition("@")  # the address may be none: that is told when it is planned
        if not (base.startswith("lab:") and step.isdecimal() and int(step) > 2):
            return self
        return self.model_copy(update={"address": f"{base}{at}2", "name": self.called})


class RegimeChoice(Choice):
    """A regime of fine-tuning, with seeds and steps of its own where they differ from the study's.

    ``disentanglement: false`` leaves out its heatmaps and sets of tasks.
    """

    short_for: ClassVar[str] = "name"
    name: Regime
    seeds: Seeds | None = None
    steps: Count | None = None
    disentanglement: bool = True

    def shortened(self) -> RegimeChoice:
        """Return the same regime with one seed and two steps where it has its own."""
        seeds = None if self.seeds is None else self.seeds[:1]
        return self.model_copy(update={"steps": None if self.steps is None else 2, "seeds": seeds})


class TaskChoice(Choice):
    """A task: its address and a name for tables.

    ``finetuned`` is a file of an encoder that was fine-tuned on it elsewhere, ``head`` one of its head, and ``classes``
    name that head's outputs in their order.
    """

    address: str
    name: Name = ""
    finetuned: str = ""
    head: str = ""
    classes: Annotated[tuple[str, ...], AfterValidator(check_distinct)] = ()


def few_scales(grid: Sequence[float]) -> tuple[float, ...]:
    """Return the first, the middle and the last scale of a grid."""
    return tuple(dict.fromkeys((grid[0], grid[len(grid) // 2], grid[-1])))


def checked_recipe(name: str, config: dict[str, Any]) -> Recipe:
    """Return the recipe of a name and hyperparameters, or raise as a validator does."""
    try:
        return find_recipe(name, config)
    except TaskvecError as error:
        raise ValueError(f"{error.problem}; {error.fix}") from None


class MethodChoice(Choice):
    """A merging method, or several joined by +, its scales, ``start:stop:step`` or a list, and its hyperparameters.

    A hyperparameter that is a list is searched on validation, all their combinations.
    """

    short_for: ClassVar[str] = "name"
    name: str
    scales: tuple[FiniteFloat, ...] = ()
    config: dict[str, Any] = Field(default={})

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        name = "+".join(part.strip() for part in name.split("+"))
        checked_recipe(name, {})
        return name

    @model_validator(mode="after")
    def _configured(self) -> MethodChoice:
        for key, value in self.config.items():
            if value == []:
                raise ValueError(f"'{key}' is an empty list; give its values")
        count = math.prod(len(value) for value in self.config.values() if isinstance(value, list))
        if count > MOST_OPTIONS:
            raise ValueError(f"{count:,} combinations of hyperparameters; give at most {MOST_OPTIONS}")
        self.recipes()  # raises where one is not taken
        return self

    @field_validator("scales", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(parse_scales(value))
        if not isinstance(value, list | tuple) or not value:
            raise ValueError("scales are start:stop:step or a list of numbers")
        if len(value) > MOST_SCALES:
            raise ValueError(f"{len(value):,} scales; give at most {MOST_SCALES}")
        return value

    @field_validator("scales")
    @classmethod
    def _rising(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted({scale + 0.0 for scale in scales}))

    def grid(self) -> list[float]:
        """Return the scales to try in rising order, the method's own by default."""
        return list(self.scales) or parse_scales(self.recipes()[0].scales)

    def shortened(self) -> MethodChoice:
        """Return the same method with few scales, of every list of hyperparameters the first, and few steps."""
        first = {key: value[0] if isinstance(value, list) else value for key, value in self.config.items()}
        known = {key for method, _ in self.recipes()[0].stages for key in method.config.model_fields}
        few = {key: least for key, least in FEW.items() if key in known}
        return self.model_copy(update={"scales": few_scales(self.grid()), "config": first | few})

    def recipes(self) -> list[Recipe]:
        """Return the recipe of every combination of the listed hyperparameters, the last one changing fastest."""
        values = [value if isinstance(value, list) else [value] for value in self.config.values()]
        options = [dict(zip(self.config, chosen, strict=True)) for chosen in itertools.product(*values)]
        recipes = [checked_recipe(self.name, option) for option in options]
        return [recipe for index, recipe in enumerate(recipes) if recipe not in recipes[:index]]


class Study(Settings):
    """A whole experiment; everything but backbones and tasks has a default."""

    name: Annotated[Name, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    backbones: Annotated[tuple[BackboneChoice, ...], Field(min_length=1)]
    tasks: Annotated[tuple[TaskChoice, ...], Field(min_length=1)]
    plugins: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    regimes: Annotated[tuple[RegimeChoice, ...], Field(min_length=1)] = (RegimeChoice(name="aligned"),)
    methods: Annotated[tuple[MethodChoice, ...], Field(min_length=1)] = (MethodChoice(name=ADDITION),)
    heads: Annotated[tuple[ModeName, ...], Field(min_length=1)] = ("kept", "reprobed")
    search: Literal["grid", "racing"] = "grid"
    scales: Literal["common", "per-task"] = "common"
    heatmap: Heatmap = Heatmap()
    subsets: Subsets = Subsets()
    agreement: Annotated[int, Field(ge=0, le=MOST)] = 0
    surgery: Surgery = Surgery()
    seeds: Seeds = (0,)
    probe: Probe = Probe()
    finetune: Finetune = Finetune()
    lora: Lora = Lora()
    negation: Negation | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    evaluation_precision: Literal["auto", "float32", "tf32", "float16"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    allow_pickle: bool = False
    limit: Count | None = None
    data: str | None = None
    skip_corrupt: bool = False
    notes: tuple[Annotated[str, Field(min_length=1)], ...] = ()

    @field_validator("regimes")
    @classmethod
    def _joint(cls, regimes: tuple[RegimeChoice, ...]) -> tuple[RegimeChoice, ...]:
        names = [regime.name for regime in regimes]
        if "joint" in names and "aligned" not in names:
            raise ValueError("joint fine-tuning starts from the aligned regime's heads; add aligned")
        return regimes

    @model_validator(mode="after")
    def _effective(self) -> Study:
        """Raise for what could have no effect, or another than it says; a line for each."""
        idle = (*self._idle_backbones(), *self._idle_regimes(), *self._idle_measures(), *self._idle_checkpoints())
        if problems := dict.fromkeys((*idle, *self._idle_linearised())):
            raise ValueError("\n".join(problems))
        return self

    def _idle_backbones(self) -> Iterator[str]:
        known = {regime.name for regime in self.regimes}
        for choice in self.backbones:
            for name in (*choice.regimes, *choice.learning_rates):
                if name not in known:
                    yield f"'{choice.address}' names the regime '{name}', which the study does not run; add it there"
            if "joint" in choice.regimes and "aligned" not in choice.regimes:
                yield f"'{choice.address}' takes part in joint and not in aligned, whose heads it needs; add aligned"
            if choice.batch_norm == "reestimated" and "kept" not in self.heads:
                yield f"'{choice.address}': re-estimated batch norm is measured with kept heads; add kept"
            if choice.paper and sum(other.paper == choice.paper for other in self.backbones) > 1:
                yield f"two backbones stand for the paper's '{choice.paper}'; leave it to one"

    def _idle_regimes(self) -> Iterator[str]:
        seeds = {regime.name: regime.seeds or self.seeds for regime in self.regimes}
        for seed in sorted(set(seeds.get("joint", ())) - set(seeds.get("aligned", ()))):
            yield f"joint has seed {seed}, which aligned has not, whose heads it needs; add it there"
        images = self.finetune.batch_size // self.finetune.accumulate
        if "joint" in seeds and images < len(self.tasks):
            yield f"joint needs an image of each of {len(self.tasks)} tasks in a pass of {images}: raise batch_size"
        if self.lora != Lora() and not any(REGIMES[name].lora for name in seeds):
            yield "lora has settings, but the study does not run the regime lora; add it to regimes"

    def _idle_linearised(self) -> Iterator[str]:
        """Yield what a linearised encoder cannot do."""
        linearised = {regime.name for regime in self.regimes if REGIMES[regime.name].linearised}
        if not linearised:
            return
        for method in self.methods:
            if method.recipes()[0].measures:
                yield f"'{method.name}' measures layers or gradients, which a linearised encoder has not; leave it out"
        for choice in self.backbones:
            if choice.batch_norm == "reestimated" and not (choice.regimes and linearised.isdisjoint(choice.regimes)):
                yield (
                    f"'{choice.address}': a linearised encoder keeps its statistics of batch norm, so they are not "
                    "estimated anew; leave out batch_norm, or the regime for this backbone"
                )
        for task in self.tasks:
            if task.finetuned:
                yield f"'{task.address}' brings a checkpoint, not one of a linearised encoder; leave out the regime"

    def _idle_measures(self) -> Iterator[str]:
        kept = ADDITION in {method.name for method in self.methods} and "kept" in self.heads
        if self.scales == "per-task" and not kept:
            yield f"per-task scales are those of {ADDITION} with kept heads; add both"
        plain = any(not (REGIMES[regime.name].linearised or REGIMES[regime.name].joint) for regime in self.regimes)
        if self.search == "racing" and not ("kept" in self.heads and plain):
            yield "search: racing needs kept heads and a regime that is not linearised; add them, or leave it out"
        if self.agreement and "reprobed" not in self.heads:
            yield "agreement is checked against re-probed heads, which the study does not fit; add reprobed to heads"
        sizes = self.subsets.sizes
        for size in () if sizes == "all" else sizes:
            if size > len(self.tasks):
                yield f"subsets has sets of {size} tasks, and there are {len(self.tasks)}; leave that size out"
        pairs = math.comb(len(self.tasks), 2)
        if self.heatmap.pairs > pairs and self.heatmap.pairs != Heatmap().pairs:
            yield f"heatmap has {self.heatmap.pairs} pairs of tasks, of which there are at most {pairs}; give no more"

    def _idle_checkpoints(self) -> Iterator[str]:
        """Yield what is wrong with checkpoints that tasks bring: each is of one backbone, made in one regime."""
        regimes = [regime.name for regime in self.regimes if not REGIMES[regime.name].joint]
        for task in self.tasks:
            if not task.finetuned:
                if task.head or task.classes:
                    yield f"'{task.address}' has a head or classes but no checkpoint that they go with; add finetuned"
            elif len(self.backbones) > 1:
                count = len(self.backbones)
                yield f"'{task.address}' brings a checkpoint, which is of one backbone, and there are {count}; keep one"
            elif len(regimes) > 1:
                every = ", ".join(regimes)
                yield f"'{task.address}' brings a checkpoint, which is of one regime, and there are {every}; keep one"

    @field_validator("regimes", "methods", "heads")
    @classmethod
    def _distinct(cls, chosen: tuple[Any, ...]) -> tuple[Any, ...]:
        return check_distinct(chosen)

    @field_validator("backbones", "tasks")
    @classmethod
    def _named_apart(cls, chosen: tuple[Any, ...]) -> tuple[Any, ...]:
        if twice := twins([choice.name for choice in chosen if choice.name]):
            raise ValueError("\n".join(told_twins(*pair) for pair in twice))
        return chosen

    def smoke(self) -> Study:
        """Return the same study with one seed, 2 steps of 4 images, 32 images a split and few scales: a trial run.

        Joint fine-tuning has an image of every task in a batch.
        """
        images = max(4, len(self.tasks)) if any(REGIMES[regime.name].joint for regime in self.regimes) else 4
        few: dict[str, Any] = {"steps": 2, "warmup": 0, "accumulate": 1}
        few |= {"batch_size": min(self.finetune.batch_size, images)}
        few |= {"learning_rates": self.finetune.learning_rates[:2]}
        return self.model_copy(
            update={
                "name": f"{self.name}-smoke",
                "probe": self.probe.model_copy(update={"steps": 2, "warmup": 0}),
                "surgery": self.surgery.model_copy(update={"steps": 2}),
                "finetune": self.finetune.model_copy(update=few),
                "methods": tuple(method.shortened() for method in self.methods),
                "regimes": tuple(regime.shortened() for regime in self.regimes),
                "seeds": self.seeds[:1],
                "agreement": min(self.agreement, 8),
                "heatmap": self.heatmap.shortened(),
                "subsets": self.subsets.shortened(),
                "negation": self.negation and self.negation.shortened(),
                "limit": 32,
                "backbones": tuple(choice.shortened() for choice in self.backbones),
            }
        )


@dataclass(frozen=True)
class StudyFile:
    """A study, the text it was read from, and the folder that its relative paths start from."""

    study: Study
    text: str
    folder: Path
    smoke: bool = False

    @property
    def plugins(self) -> list[Path]:
        """The files of its plugins."""
        return plugin_files(self.study.plugins, self.folder)

    def shortened(self) -> StudyFile:
        """Return its trial run, marked as one."""
        return replace(self, study=self.study.smoke(), smoke=True)


def plugin_files(names: Iterable[str], folder: Path) -> list[Path]:
    """Return the files that a study names as its plugins; relative paths start from its folder."""
    return [folder / Path(name).expanduser() for name in names]
