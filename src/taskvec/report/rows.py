"""Result rows of a study out of its artifacts, in the columns of results.csv and disentanglement.csv."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, cast

import pandas as pd

from taskvec.core.files import canonical
from taskvec.engine.pipeline import Step
from taskvec.engine.store import Artifact
from taskvec.merging.variants import ADDED, DIFFERENCES, Variant
from taskvec.study.experiment import Experiment, Trial

COLUMNS = [
    *"study backbone regime seed tasks method config heads scale task split metric value artifact".split(),  # noqa: SIM905
    *DIFFERENCES,
]
HEATMAP_COLUMNS = (
    "backbone regime seed task_1 task_2 scale_1 scale_2 error_1 error_2 n half_width images".split()  # noqa: SIM905
)
NEGATION_COLUMNS = (
    "backbone regime seed forget control scale split forget_accuracy control_accuracy chosen".split()  # noqa: SIM905
)
SCALE = {"probing": 0.0, "zero_shot": 0.0, "joint": 1.0, "fine_tuned": 1.0}
"""The scale under which each baseline stands."""
NO_CONFIG: Mapping[str, Any] = MappingProxyType({})
Done = Mapping[Step, Artifact]
Row = dict[str, Any]


@dataclass(frozen=True)
class Writer:
    """Writes the rows of one experiment: backbone, regime and seed."""

    study: str
    experiment: Experiment
    done: Done

    def rows(self) -> Iterator[Row]:
        """Yield all rows: validation for every scale tried, test for what was chosen; one function a kind of row."""
        yield from self.baselines()
        for trial in self.experiment.trials:
            yield from self.tried_together(trial) if trial.scaling else self.searched(trial)
        yield from self.test_rows()
        for names, step in self.experiment.subsets.items():
            yield from self.subset_rows(names, step)
        yield from self.learning_rates()
        for trial in self.experiment.trials:
            for metric, steps in trial.measures.items():
                yield from self.measures(trial, metric, steps)

    def baselines(self) -> Iterator[Row]:
        """Yield the validation rows of what merges nothing."""
        exp = self.experiment
        for method, steps in (("probing", exp.head), ("zero_shot", exp.zero_shot), ("fine_tuned", exp.finetuned)):
            if steps:
                made_by = {t: self.done[s].id for t, s in steps.items()} | {"": self._id(exp.model)}
                yield from self.baseline(method, "validation", self.validation(steps), made_by)
        if exp.joint:
            values = dict(zip(exp.tasks, self.metrics(exp.joint)["validation"], strict=True))
            made_by = dict.fromkeys([*exp.tasks, ""], self._id(exp.joint))
            yield from self.baseline("joint", "validation", values, made_by)

    def metrics(self, step: Step) -> dict[str, Any]:
        """Return what a step has measured on validation."""
        metrics: dict[str, Any] = self.done[step].json("metrics.json")
        return metrics

    def validation(self, steps: Mapping[str, Step]) -> dict[str, float]:
        """Return the validation accuracy that the step of each task has measured."""
        return {t: self.metrics(step)["validation"] for t, step in steps.items()}

    def config_of(self, trial: Trial) -> Mapping[str, Any]:
        """Return the hyperparameters of a trial that are not the authors'; of several options those chosen."""
        if trial.option:
            return cast("dict[str, Any]", self.done[trial.option].json("option.json")["settings"])
        return trial.settings

    def searched(self, trial: Trial) -> Iterator[Row]:
        """Yield the validation rows of a trial, after those of the options that were not chosen."""
        for option in trial.options:
            if self.config_of(option) != self.config_of(trial):
                yield from self.curve(option)
        yield from self.curve(trial)

    def curve(self, trial: Trial) -> Iterator[Row]:
        """Yield the validation rows of every scale that a trial tried, in rising order."""
        config = self.config_of(trial)
        by_scale: dict[float, tuple[dict[str, float], dict[str, str]]] = {}
        sampled = dict[tuple[float, str], bool]()
        for steps in trial.rounds:
            for task, step in steps.items():
                curve = self.done[step].json("curve.json")
                for scale, value in zip(curve["scales"], curve["validation"], strict=True):
                    values, made_by = by_scale.setdefault(scale, ({}, {"": self._id(trial.selection)}))
                    values[task], made_by[task] = value, self.done[step].id
                    sampled[scale, task] = scale in curve.get("sampled", [])
        for scale, (values, made_by) in sorted(by_scale.items()):
            rows = self.measured(trial.variant, trial.read_by, scale, "validation", values, made_by, config)
            yield from of_sample(rows) if any(sampled[scale, task] for task in values) else rows

    def tried_together(self, trial: Trial) -> Iterator[Row]:
        """Yield the validation rows of every set of scales, one a task, tried on a sample; ``scale`` is their mean."""
        made_by = dict.fromkeys([*self.experiment.tasks, ""], self._id(trial.selection))
        choice = self.done[trial.selection].json("choice.json")
        for part in ("tried", "measured"):
            for scales, accuracies in choice[part]:
                values = dict(zip(self.experiment.tasks, accuracies, strict=True))
                mean, config = self.scales_of(scales)
                rows = self.measured(trial.variant, trial.read_by, mean, "validation", values, made_by, config)
                yield from rows if part == "measured" else of_sample(rows)

    def scales_of(self, scales: Sequence[float]) -> tuple[float, dict[str, Any]]:
        """Return the mean of one scale a task, and the configuration that tells them all."""
        return sum(scales) / len(scales), {"scales": dict(zip(self.experiment.tasks, scales, strict=True))}

    def test_rows(self) -> Iterator[Row]:
        """Yield the test rows: the baselines, fine-tuned, and the chosen scale of every candidate with its gain."""
        exp = self.experiment
        measured = {t: self.done[s].json("test.json") for t, s in exp.test.items()}
        made_by = {t: self.done[s].id for t, s in exp.test.items()} | {"": self._id(exp.gains)}
        for method in SCALE:
            if all(method in found for found in measured.values()):
                values = {t: found[method] for t, found in measured.items()}
                yield from self.baseline(method, "test", values, made_by)
        gains = self.done[exp.gains].json("gains.json") if exp.gains else {}
        for index, trial in enumerate(exp.trials):
            selection = self.done[trial.selection].json("choice.json")
            common = selection["scale"], self.config_of(trial)
            scale, config = self.scales_of(selection["scales"]) if "scales" in selection else common
            values = {t: found[str(index)] for t, found in measured.items()}
            variant, heads = trial.variant, trial.read_by
            yield from self.measured(variant, heads, scale, "test", values, made_by, config)
            for baseline, gained in gains.items():
                named = {exp.tasks[int(place)] if place else "": gain for place, gain in gained[str(index)].items()}
                for task, gain in sorted(named.items()):
                    for part, end in ENDS.items():
                        metric = f"gain_over_{baseline}{end}"
                        yield self.row(variant, heads, scale, task, "test", metric, gain[part], made_by[task], config)

    def subset_rows(self, names: tuple[str, ...], step: Step) -> Iterator[Row]:
        """Yield the rows of one set of tasks: scales tried, the test of the chosen one, and the error in the box."""
        subset = self.done[step].json("subset.json")
        writer = replace(self, experiment=replace(self.experiment, tasks=names))
        made_by = dict.fromkeys([*names, ""], self.done[step].id)
        if "test" in subset:
            for scale, values in zip(subset["scales"], subset["validation"], strict=True):
                by_task = dict(zip(names, values, strict=True))
                yield from of_sample(writer.measured(ADDED, "kept", scale, "validation", by_task, made_by))
            by_task = dict(zip(names, subset["test"], strict=True))
            yield from writer.measured(ADDED, "kept", subset["scale"], "test", by_task, made_by)
            metric = "accuracy" if {self.metric(t) for t in names} == {"accuracy"} else "metric"
            yield from writer.sampling(subset["scale"], metric, subset, "test", made_by[""])
        if "error" in subset:
            error, id = subset["error"], made_by[""]
            yield writer.row(ADDED, "kept", "", "", "test", "disentanglement_error", error, id)
            yield from writer.sampling("", "disentanglement_error", subset, "error", id)

    def sampling(
        self, scale: float | str, metric: str, subset: Mapping[str, Any], what: str, made_by: str
    ) -> Iterator[Row]:
        """Yield the half-width of a mean that a sample gave, and how many images of a task it is from at most."""
        if subset[f"{what}_half_width"]:
            for end in ("half_width", "images"):
                value = subset[f"{what}_{end}"]
                yield self.row(ADDED, "kept", scale, "", "test", f"{metric}_{end}", value, made_by)

    def learning_rates(self) -> Iterator[Row]:
        """Yield the learning rates that were used, and what each rate that was tried reached on validation."""
        exp = self.experiment
        for task, step in exp.probe.items():
            tried = self.done[step].json("probe.json")
            for rate, value in zip(tried["rates"], tried["validation"], strict=True):
                yield self.tried_rate("probing", task, rate, value, step)
        for task, step in exp.finetuned.items():
            if (rate := self.metrics(step).get("learning_rate")) is not None:  # none for a checkpoint that was brought
                yield self.row(Variant("fine_tuned"), "kept", 1.0, task, "", "learning_rate", rate, self.done[step].id)
        if exp.joint:
            rate = self.metrics(exp.joint)["learning_rate"]
            id = self.done[exp.joint].id
            yield self.row(Variant("joint"), "kept", SCALE["joint"], "", "", "learning_rate", rate, id)
        if exp.rate:
            for rate, step in exp.rate[1].items():
                yield self.tried_rate("fine_tuned", exp.rate[0], rate, self.metrics(step)["validation"], step)

    def measures(self, trial: Trial, metric: str, steps: Mapping[str, Step]) -> Iterator[Row]:
        """Yield what steps measured on training images at every scale of a candidate, and the mean over tasks.

        The step of each task left ``values``, one a scale, in a file with the name of the metric.
        """
        curves = {task: self.done[step].json(f"{metric}.json")["values"] for task, step in steps.items()}
        how = trial.variant, trial.read_by
        config = self.config_of(trial)
        for place, scale in enumerate(trial.grid):
            values = {task: curve[place] for task, curve in curves.items()}
            for task, value in values.items():
                yield self.row(*how, scale, task, "train", metric, value, self.done[steps[task]].id, config)
            mean = sum(values.values()) / len(values)
            yield self.row(*how, scale, "", "train", metric, mean, "", config)

    def tried_rate(self, method: str, task: str, rate: float, value: float, step: Step) -> Row:
        """Return the row of one learning rate that was tried on one task."""
        config, id = {"learning_rate": rate}, self.done[step].id
        return self.row(
            Variant(method), "kept", SCALE[method], task, "validation", self.metric(task), value, id, config
        )

    @cached_property
    def tuned(self) -> dict[str, dict[str, float]]:
        """Return the accuracy of every fine-tuned encoder by split, which normalises all others."""
        test = {t: self.done[step].json("test.json")["fine_tuned"] for t, step in self.experiment.test.items()}
        return {"validation": self.validation(self.experiment.finetuned), "test": test}

    def metric(self, task: str) -> str:
        """Return the name of a task's own metric, which the step that fine-tuned on it has told."""
        return str(self.metrics(self.experiment.finetuned[task]).get("metric", "accuracy"))

    def baseline(
        self, method: str, split: str, values: Mapping[str, float], made_by: Mapping[str, str]
    ) -> Iterator[Row]:
        """Yield the rows of what merges nothing, which has one scale and heads of its own."""
        yield from self.measured(Variant(method), "kept", SCALE[method], split, values, made_by)

    def measured(
        self,
        variant: Variant,
        heads: str,
        scale: float,
        split: str,
        values: Mapping[str, float],
        made_by: Mapping[str, str],
        config: Mapping[str, Any] = NO_CONFIG,
    ) -> Iterator[Row]:
        """Yield accuracy and normalised accuracy of every task and their means, and likewise other kinds' metrics."""
        for metric, column in self.columns({t: values[t] for t in self.experiment.tasks}, self.tuned[split]).items():
            for task, value in column.items():
                yield self.row(variant, heads, scale, task, split, metric, value, made_by[task], config)
            mean = sum(column.values()) / len(column)
            yield self.row(variant, heads, scale, "", split, metric, mean, made_by[""], config)

    def columns(self, values: Mapping[str, float], tuned: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Return the metrics of some tasks, each with the tasks that have it; nothing is normalised by zero.

        With tasks of several kinds every task has ``normalised_metric``, its own over the fine-tuned encoder's.
        """
        columns: dict[str, dict[str, float]] = {}
        for task, value in values.items():
            columns.setdefault(self.metric(task), {})[task] = value
        normal = {"normalised_accuracy": columns.get("accuracy", {})}
        normal |= {"normalised_metric": dict(values)} if set(columns) != {"accuracy"} else {}
        for name, column in normal.items():
            if column and all(tuned[t] > 0 for t in column):
                columns[name] = {t: value / tuned[t] for t, value in column.items()}
        return columns

    def row(
        self,
        variant: Variant,
        heads: str,
        scale: float | str,
        task: str,
        split: str,
        metric: str,
        value: float,
        artifact: str,
        config: Mapping[str, Any] = NO_CONFIG,
    ) -> Row:
        """Return one row of results.csv."""
        exp = self.experiment
        place = (self.study, exp.backbone, exp.regime, exp.seed, "+".join(exp.tasks))
        about = (variant.method, canonical(dict(config)), heads, scale, task, split, metric, value, artifact)
        differences = (getattr(variant, name) for name in DIFFERENCES)
        return dict(zip(COLUMNS, (*place, *about, *differences), strict=True))

    def _id(self, step: Step | None) -> str:
        return self.done[step].id if step is not None else ""


ENDS = {"mean": "", "low": "_low", "high": "_high"}
"""The parts of a gain, and how the names of their metrics end."""


def of_sample(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows of what was measured on a sample of a split: none is normalised, as the whole cannot do that."""
    return (row for row in rows if not row["metric"].startswith("normalised"))


def results(study: str, experiments: list[Experiment], done: Done) -> pd.DataFrame:
    """Return all rows of a study in the columns of results.csv."""
    return pd.DataFrame([row for exp in experiments for row in Writer(study, exp, done).rows()], columns=COLUMNS)


def heatmaps(experiments: list[Experiment], done: Done) -> pd.DataFrame | None:
    """Return the rows of disentanglement.csv, or None where a study measured no heatmap."""
    rows = [row for exp in experiments if exp.heatmaps for row in heatmap_rows(exp, done[exp.heatmaps])]
    return pd.DataFrame(rows, columns=HEATMAP_COLUMNS) if rows else None


def negations(experiments: list[Experiment], done: Done) -> pd.DataFrame | None:
    """Return the rows of negation.csv, or None where a study forgets nothing: validation, then the test."""
    rows = [
        row
        for exp in experiments
        for pair, step in exp.negation.items()
        for row in negation_rows(exp, pair, done[step])
    ]
    return pd.DataFrame(rows, columns=NEGATION_COLUMNS) if rows else None


def negation_rows(exp: Experiment, pair: tuple[str, str], artifact: Artifact) -> Iterator[Row]:
    """Yield a row for every scale of negation one experiment tried, and for the test at 0 and at the chosen one."""
    negation = artifact.json("negation.json")
    place = (exp.backbone, exp.regime, exp.seed, *pair)
    columns = (negation[name] for name in ("scales", "forgotten", "control"))
    tried = [("validation", *values) for values in zip(*columns, strict=True)]
    before, after = negation["test"]["before"], negation["test"]["after"]
    for split, scale, *accuracies in (*tried, ("test", 0.0, *before), ("test", negation["scale"], *after)):
        values = (scale, split, *accuracies, scale == negation["scale"])
        yield dict(zip(NEGATION_COLUMNS, (*place, *values), strict=True))


def heatmap_rows(exp: Experiment, artifact: Artifact) -> Iterator[Row]:
    """Yield a row for every point of every heatmap.

    ``n`` is the size of the smaller sample of the two tasks, ``images`` how many of it were looked at; ``half_width``
    is that of the mean error over all pairs at the point.
    """
    errors = artifact.json("errors.json")
    scales = list(enumerate(errors["scales"]))
    for pair, shares in zip(exp.pairs, errors["pairs"], strict=True):
        place, n = (exp.backbone, exp.regime, exp.seed, *pair), min(shares["n"])
        for (i, scale_1), (j, scale_2) in itertools.product(scales, repeat=2):
            values = (scale_1, scale_2, shares["first"][i][j], shares["second"][i][j], n)
            sampled = (errors["half_width"][i][j], min(n, errors["images"][i][j]))
            yield dict(zip(HEATMAP_COLUMNS, (*place, *values, *sampled), strict=True))
