"""What a study plans for one backbone, regime and seed: its steps by role, to be run and read into rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from taskvec.engine.pipeline import Step, leaves
from taskvec.learning.head_modes import HEAD_MODES
from taskvec.learning.regimes import REGIMES, Regime
from taskvec.merging.variants import Variant
from taskvec.study.schema import BackboneChoice


@dataclass
class Trial:
    """A merge that validation may choose: a method and a head mode, with the steps that tried its scales.

    ``selection`` is the step that chose a scale. ``settings`` are its hyperparameters where they are not the authors'.
    ``options`` are what they were chosen from, each tried at a few scales; then ``option`` is the step that chose them
    and ``merged`` has copied the best one. ``per_task`` merges have a direction for each task.
    ``statistics`` is the step that estimated those of batch norm anew, where that was done; ``scaling`` says that each
    task has a scale of its own. ``measures`` has, by metric and task, the steps that measured more at every scale.
    """

    name: str
    grid: list[float]
    heads: str
    merged: Step
    rounds: list[dict[str, Step]]
    selection: Step
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_task: bool = False
    options: list[Trial] = field(default_factory=list)
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
        settings = "".join(f" {key}={value}" for key, value in self.settings.items())
        chosen, statistics = ", chosen" * bool(self.option), ", batch norm re-estimated" * bool(self.statistics)
        return f"{self.name}{settings}{chosen}, {self.heads} heads{statistics}"

    def steps(self) -> Iterator[Step]:
        """Yield the steps that tried and chose its scales, and those of its options."""
        for option in self.options:
            yield from option.steps()
        yield from (step for steps in self.rounds for step in steps.values())
        yield from (step for steps in self.measures.values() for step in steps.values())
        yield self.selection


@dataclass
class SharedSteps:
    """What all regimes of one backbone share: the encoder, decoded tasks and cached features by task name.

    ``whole`` has the steps that keep whole training images, of the tasks that are trained on crops of them, and
    ``precision`` is the step that says in which numbers passes compute; without one it is float32.
    """

    backbone: str
    choice: BackboneChoice
    encoder: Step
    data: dict[str, Step]
    features: dict[str, Step]
    whole: dict[str, Step]
    precision: Step | None = None

    @property
    def looks(self) -> dict[str, Any]:
        """Return what every step reads that looks through the encoder: it, and the precision of its passes."""
        return {"backbone": self.encoder, "precision": self.precision}


@dataclass
class Experiment:
    """All steps of one backbone, regime and seed; steps of single tasks are by task name.

    ``first`` marks the first seed of a regime, for which alone heatmaps, subsets and per-task scales are measured.
    ``heatmaps`` is the step that has the disentanglement errors of all ``pairs``.
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
    trials: list[Trial] = field(default_factory=list)
    test: dict[str, Step] = field(default_factory=dict)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    heatmaps: Step | None = None
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
        """Say which experiment it is, for labels."""
        return f"({self.backbone}, {self.regime}, seed {self.seed})"

    @property
    def start(self) -> dict[str, Step]:
        """Return the heads that fine-tuning starts from, by task."""
        return self.zero_shot or self.head

    def steps(self) -> Iterator[Step]:
        """Yield the steps whose results a report needs."""
        by_task = (self.probe, self.head, self.zero_shot, self.finetuned, self.test)
        yield from itertools.chain(*(steps.values() for steps in by_task))
        yield from itertools.chain(self.subsets.values(), self.negation.values())
        yield from self.rate[1].values() if self.rate else ()
        yield from itertools.chain(*(trial.steps() for trial in self.trials))
        yield from leaves([self.heatmaps, self.joint, self.gains, self.model])
