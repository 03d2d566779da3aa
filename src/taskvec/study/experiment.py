"""What a study plans for one backbone, regime and seed: its steps by role, to be run and read into rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from taskvec.engine.pipeline import Step
from taskvec.learning.head_modes import HEAD_MODES
from taskvec.learning.regimes import REGIMES, Regime
from taskvec.merging.variants import Variant
from taskvec.study.schema import BackboneChoice

Inputs = dict[str, list[Step]]


@dataclass
class Candidate:
    """A merge that validation may choose: a method and a head mode, with the steps that tried its scales.

    ``settings`` are its hyperparameters where they are not the authors'. ``options`` are what they were chosen from,
    each tried at a few scales; then ``option`` is the step that chose them and ``merged`` has copied the best one.
    ``per_task`` merges have a direction for each task.
    ``statistics`` is the step that estimated those of batch norm anew, where that was done; ``scaling`` says that each
    task has a scale of its own. ``measures`` has, by metric and task, the steps that measured more at every scale.
    """

    name: str
    grid: list[float]
    heads: str
    merged: Step
    rounds: list[dict[str, Step]]
    choice: Step
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_task: bool = False
    options: list[Candidate] = field(default_factory=list)
    option: Step | None = None
    statistics: Step | None = None
    scaling: str = ""
    measures: dict[str, dict[str, Step]] = field(default_factory=dict)

    @property
    def variant(self) -> Variant:
        """Return what it is in results."""
        statistics = "reestimated" if self.statistics else ""
        return Variant(self.name, HEAD_MODES[self.heads].correction, statistics, self.scaling)

    @property
    def read_by(self) -> str:
        """Return the heads that it is read by, as results name them."""
        return HEAD_MODES[self.heads].heads

    @property
    def title(self) -> str:
        """Name it with its hyperparameters, for labels."""
        told = "".join(f" {key}={value}" for key, value in self.settings.items())
        return f"{self.name}{told}{', chosen' if self.option else ''}, {self.heads} heads"


@dataclass
class Ground:
    """What all regimes of one backbone share: the encoder, decoded tasks and cached features by task name.

    ``whole`` has the steps that keep whole training images, of the tasks that are trained on crops of them.
    """

    backbone: str
    choice: BackboneChoice
    encoder: Step
    data: dict[str, Step]
    features: dict[str, Step]
    whole: dict[str, Step]

    def training(self, names: Iterable[str]) -> Inputs:
        """Return what training on some tasks reads of them: decoded splits, and whole images by place."""
        chosen = list(names)
        whole = {f"whole{place}": [self.whole[t]] for place, t in enumerate(chosen) if t in self.whole}
        return {"task": [self.data[t] for t in chosen]} | whole


@dataclass
class Cell:
    """All steps of one backbone, regime and seed; steps of single tasks are by task name.

    ``first`` marks the first seed of a regime, for which alone heatmaps, subsets and per-task scales are measured.
    """

    backbone: str
    regime: str
    seed: int
    tasks: tuple[str, ...]
    encoder: Step
    first: bool = True
    probe: dict[str, Step] = field(default_factory=dict)
    head: dict[str, Step] = field(default_factory=dict)
    zero_shot: dict[str, Step] = field(default_factory=dict)
    finetuned: dict[str, Step] = field(default_factory=dict)
    joint: Step | None = None
    rate: tuple[str, dict[float, Step]] | None = None
    candidates: list[Candidate] = field(default_factory=list)
    test: dict[str, Step] = field(default_factory=dict)
    heatmaps: dict[tuple[str, str], Step] = field(default_factory=dict)
    subsets: dict[tuple[str, ...], Step] = field(default_factory=dict)
    negation: dict[tuple[str, str], Step] = field(default_factory=dict)
    gains: Step | None = None
    model: Step | None = None

    @property
    def how(self) -> Regime:
        """Return the record of its regime."""
        return REGIMES[self.regime]

    @property
    def where(self) -> str:
        """Say which cell it is, for labels."""
        return f"({self.backbone}, {self.regime}, seed {self.seed})"

    def statistics(self) -> Inputs:
        """Return the steps that estimated statistics of batch norm, by the number of their candidate."""
        return {f"statistics{i}": [c.statistics] for i, c in enumerate(self.candidates) if c.statistics is not None}

    def chosen_options(self) -> Inputs:
        """Return the steps that chose hyperparameters, by the number of their candidate."""
        return {f"option{i}": [c.option] for i, c in enumerate(self.candidates) if c.option is not None}

    def steps(self) -> Iterator[Step]:
        """Yield the steps whose results a report needs."""
        by_task = (self.probe, self.head, self.zero_shot, self.finetuned, self.test)
        yield from itertools.chain(*(steps.values() for steps in by_task))
        yield from itertools.chain(self.heatmaps.values(), self.subsets.values(), self.negation.values())
        yield from self.rate[1].values() if self.rate else ()
        for candidate in [c for one in self.candidates for c in (*one.options, one)]:
            yield from (step for one in candidate.rounds for step in one.values())
            yield from itertools.chain(*(steps.values() for steps in candidate.measures.values()))
            yield candidate.choice
        yield from (step for step in (self.joint, self.gains, self.model) if step is not None)
