"""Metric rows in, numbers out: one backbone in one regime over its seeds, its sets of tasks, its errors in the box."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import pandas as pd

from taskvec.core.errors import TaskvecError, unknown
from taskvec.learning.head_modes import HEADS
from taskvec.merging.variants import ADDED, DIFFERENCES, PER_TASK, Variant

BASELINES = ("probing", "zero_shot", "fine_tuned", "joint")
METRICS = {"accuracy": "accuracy", "patch_accuracy": "patch accuracy", "within_15_degrees": "within 15°"}
NEEDED = ("backbone", "regime", "seed", "tasks", "method", "heads", "scale", "task", "split", "metric", "value")
NUMBER = 4
"""Bytes of a float32."""
OF_SETS = ("accuracy", "normalised_accuracy", "disentanglement_error")  # the columns of ``task_sets``


Method = str | Variant
"""A method of results; its plain name stands for the plain merge, or for a baseline."""


class Spread(NamedTuple):
    """One number over seeds: mean, standard deviation (NaN for one seed), smallest and largest scale."""

    mean: float
    sd: float = math.nan
    low: float = math.nan
    high: float = math.nan


NOTHING = Spread(math.nan)


def _over_seeds(entries: list[tuple[float, float]]) -> Spread:
    """Sum up the (scale, value) of every seed; NaN counts as not measured."""
    scales = [scale for scale, _ in entries if not math.isnan(scale)] or [math.nan]
    values = [value for _, value in entries if not math.isnan(value)]
    if not values:
        return NOTHING
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(statistics.fmean(values), sd, min(scales), max(scales))


class Gain(NamedTuple):
    """Accuracy over probing as fractions: mean and spread over seeds, the ends of its interval, the scales chosen."""

    heads: str
    mean: float
    sd: float
    low: float
    high: float
    scale: Spread

    @property
    def beats(self) -> bool:
        """Say whether the whole interval, as it is printed, lies above zero."""
        return round(100 * self.low, 1) > 0

    @property
    def loses(self) -> bool:
        """Say whether the whole interval, as it is printed, lies below zero."""
        return round(100 * self.high, 1) < 0

    @property
    def adds_nothing(self) -> bool:
        """Say whether every seed chose to add nothing and its heads are the probes, so that the merge is probing."""
        return self.heads == "kept" and self.scale.low == self.scale.high == 0 and abs(self.mean) < 1e-9


@dataclass(frozen=True)
class View:
    """The rows of one backbone in one regime, on the largest set of tasks that was merged there.

    The column ``variant`` has the name of each row's ``Variant``.
    """

    backbone: str
    regime: str
    rows: pd.DataFrame

    @cached_property
    def _spreads(self) -> dict[tuple[str, str, str, str], Spread]:
        """Take mean and spread over seeds of every (variant, heads, metric, task) on the test split."""
        test = self.rows[self.rows["split"] == "test"]
        entries: dict[tuple[str, str, str, str], list[tuple[float, float]]] = defaultdict(list)
        keys = zip(*(test[name] for name in ("variant", "heads", "metric", "task")), strict=True)
        for key, scale, value in zip(keys, test["scale"], test["value"], strict=True):
            entries[cast("tuple[str, str, str, str]", key)].append((scale, value))
        return {key: _over_seeds(pairs) for key, pairs in entries.items()}

    def cell(self, method: Method, heads: str = "kept", metric: str = "accuracy", task: str = "") -> Spread:
        """Look up a number of the test split as a fraction; an empty task is the mean over tasks."""
        return self._spreads.get((name_of(method), heads, metric, task), NOTHING)

    @cached_property
    def metrics(self) -> dict[str, str]:
        """Name the own metric of every task."""
        rows = self.rows[self.rows["metric"].isin(METRICS) & (self.rows["task"] != "")].drop_duplicates("task")
        return {str(task): str(metric) for task, metric in zip(rows["task"], rows["metric"], strict=True)}

    @cached_property
    def variants(self) -> dict[str, Variant]:
        """Return the variants of its rows by name."""
        return variants_of(self.rows)

    def of(self, method: Method, heads: str) -> pd.DataFrame:
        """Take the rows of one method with one kind of heads."""
        return self.rows[(self.rows["variant"] == name_of(method)) & (self.rows["heads"] == heads)]

    @property
    def metric(self) -> str:
        """Name the metric that all tasks share, empty where they differ in kind."""
        metrics = set(self.metrics.values()) or {"accuracy"}
        return metrics.pop() if len(metrics) == 1 else ""

    @property
    def mixed(self) -> bool:
        """Say whether there are tasks that are no classification."""
        return self.metric != "accuracy"

    @property
    def normalised(self) -> str:
        """Name the metric by which validation chose: each task's own over that of its fine-tuned encoder."""
        return "normalised_metric" if self.mixed else "normalised_accuracy"

    @cached_property
    def unlearned(self) -> list[str]:
        """Name the tasks whose fine-tuned encoder has, of some seed, nothing right on validation: none is normalised.

        Validation chose by the mean of what is not normalised then.
        """
        rows = self.rows[(self.rows["method"] == "fine_tuned") & (self.rows["split"] == "validation")]
        rows = rows[rows["metric"].isin(METRICS) & (rows["config"] == "{}") & (rows["value"] == 0)]
        return [task for task in self.tasks if task in set(rows["task"])]

    def result(self, method: Method, heads: str = "kept", task: str = "") -> Spread:
        """Look up a task in its own metric; tasks that differ in theirs have no mean (NaN), but its scales are told."""
        metric = self.metrics.get(task, "accuracy") if task else self.metric
        if metric:
            return self.cell(method, heads, metric, task)
        return self.result(method, heads, self.tasks[0])._replace(mean=math.nan, sd=math.nan)

    def overall(self, method: Method, heads: str = "kept") -> Spread:
        """Look up the mean over tasks by which backbones compare: of accuracies, or of normalised metrics if mixed."""
        return self.cell(method, heads, self.normalised if self.mixed else "accuracy")

    def gain(self, method: Method, heads: str = "kept", task: str = "", over: str = "probing") -> Gain:
        """Look up what a merge adds to probing, or to the separate fine-tuned encoders."""
        middle, low, high = (self.cell(method, heads, f"gain_over_{over}{end}", task) for end in ("", "_low", "_high"))
        return Gain(heads, middle.mean, middle.sd, low.mean, high.mean, middle)

    @cached_property
    def task_scales(self) -> pd.DataFrame:
        """Read the lambdas, one a task, that went to the test split: a row for each seed, a column for each task."""
        rows = self.rows[(self.rows["variant"] == PER_TASK.name) & (self.rows["split"] == "test")]
        configs = rows[rows["heads"] == "kept"].drop_duplicates("seed")["config"]
        return pd.DataFrame([json.loads(config).get("scales", {}) for config in configs], dtype=float).dropna(how="all")

    @cached_property
    def validation_scores(self) -> dict[tuple[Variant, str], float]:
        """Score each method and kind of heads by its best on validation, as the search did, mean over seeds.

        Where a fine-tuned metric is zero nothing can be normalised by it, and the search looks at the plain mean.
        """
        rows = self.rows[(self.rows["split"] == "validation") & (self.rows["task"] == "")]
        normal = rows[rows["metric"] == self.normalised]
        plain = rows[rows["metric"].isin(METRICS) & ~rows["seed"].isin(normal["seed"])]
        rows = pd.concat([normal, plain])
        best = rows.groupby(["variant", "heads", "seed"], sort=False)["value"].max()
        means = best.groupby(["variant", "heads"], sort=False).mean()
        return {(self.variants[name], str(heads)): float(means[name, heads]) for name, heads in means.index}

    @cached_property
    def validation(self) -> dict[Variant, float]:
        """Score each method by its better kind of heads on validation."""
        best: dict[Variant, float] = {}
        for (method, _), value in self.validation_scores.items():
            best[method] = max(value, best.get(method, value))
        return best

    @cached_property
    def selected(self) -> tuple[Variant, str]:
        """Name the method and heads that are best on validation: probing, or a merge of all seeds that is better."""
        rows = self.rows[(self.rows["split"] == "validation") & (self.rows["task"] == "")]
        seeds = rows.groupby(["variant", "heads"])["seed"].nunique()
        merges = [key for key in self.validation_scores if key[0].method not in BASELINES]
        complete = [key for key in merges if seeds[key[0].name, key[1]] == self.seeds]
        probing = (Variant("probing"), "kept")
        return max([probing, *complete], key=lambda key: self.validation_scores.get(key, -math.inf))

    def validation_level(self, method: Method, heads: str) -> float:
        """Return the level on validation by which backbones compare, at the scales that validation chose."""
        metric = self.normalised if self.mixed else "accuracy"
        rows = self.of(method, heads)
        rows = rows[rows["task"] == ""]
        chosen = rows.loc[rows["split"] == "test", ["seed", "scale", "config"]].drop_duplicates()
        tried = rows[(rows["split"] == "validation") & (rows["metric"] == metric)]
        value = tried.merge(chosen, on=["seed", "scale", "config"])["value"].mean()
        return -1.0 if math.isnan(value) else float(value)

    @cached_property
    def learning_rates(self) -> dict[float, float]:
        """Return what each learning rate of fine-tuning that was searched reached on validation."""
        rows = self.rows[(self.rows["method"] == "fine_tuned") & (self.rows["split"] == "validation")]
        rows = rows[rows["config"].str.contains("learning_rate", regex=False)]
        return {
            json.loads(config)["learning_rate"]: value
            for config, value in zip(rows["config"], rows["value"], strict=True)
        }

    def unchanged(self, task: str) -> bool:
        """Say whether a fine-tuned encoder has, on every split and seed, exactly the result of its probe."""
        rows = self.rows[(self.rows["task"] == task) & self.rows["metric"].isin(METRICS)]
        rows = rows[rows["config"] == "{}"]
        values = [
            rows[rows["method"] == method].set_index(["seed", "split"])["value"] for method in ("probing", "fine_tuned")
        ]
        return bool(len(values[0]) and values[0].sort_index().equals(values[1].sort_index()))

    @cached_property
    def tasks(self) -> list[str]:
        """Name the tasks in the order of the study, in which rows of several metrics are not."""
        order = str(self.rows["tasks"].iloc[0]).split("+")
        names = [task for task in _unique(self.rows["task"]) if task]
        return sorted(names, key=lambda task: order.index(task) if task in order else len(order))

    @cached_property
    def methods(self) -> list[Variant]:
        """Return the merges, the paper's addition first."""
        return sorted(variants_of(self._merges).values(), key=lambda method: method != ADDED)

    @cached_property
    def heads(self) -> list[str]:
        """Name the kinds of heads that merged encoders were read with."""
        return [heads for heads in HEADS if heads in set(self._merges["heads"])]

    @cached_property
    def _merges(self) -> pd.DataFrame:
        return self.rows[~self.rows["method"].isin(BASELINES) & self.rows["metric"].isin(METRICS)]

    @cached_property
    def seeds(self) -> int:
        """Count the seeds."""
        return int(self.rows["seed"].nunique())


def costs_of(view: View, costs: pd.DataFrame) -> pd.DataFrame:
    """Take the costs of one backbone in one regime on its largest set of tasks, with the bytes that are ``stored``."""
    place = (costs["backbone"] == view.backbone) & (costs["regime"] == view.regime)
    rows: pd.DataFrame = costs[place & (costs["tasks"] == view.rows["tasks"].iloc[0])]
    return with_variants(rows).assign(stored=NUMBER * rows["parameters"] + len(view.tasks) * rows["bytes_per_task"])


def views(results: pd.DataFrame) -> list[View]:
    """Split results into backbones and regimes, each on its largest set of tasks; subsets of tasks are left out."""
    settings = numeric(results).groupby(["backbone", "regime"], sort=False)
    rows_of = ((cast("tuple[str, str]", key), rows) for key, rows in settings)
    return [View(str(backbone), str(regime), _largest_set(rows)) for (backbone, regime), rows in rows_of]


def numeric(results: pd.DataFrame) -> pd.DataFrame:
    """Check that the columns are there, read scales and values as numbers, and add each row's variant."""
    lacking = [column for column in NEEDED if column not in results.columns]
    if lacking or results.empty:
        problem = f"results without the columns {', '.join(lacking)}" if lacking else "results without a row"
        raise TaskvecError(problem, "give the rows of results.csv, read with keep_default_na=False")
    numbers = {name: pd.to_numeric(results[name], errors="coerce") for name in ("scale", "value")}
    return with_variants(results).assign(**numbers)


def name_of(method: Method) -> str:
    """Return the name of a method's variant."""
    return method if isinstance(method, str) else method.name


def with_variants(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the name of each row's variant; a table without a column of differences has no such difference."""
    rows = rows.assign(**{name: "" for name in DIFFERENCES if name not in rows.columns})
    names = rows["method"]
    for column in (rows[name] for name in DIFFERENCES if rows[name].any()):
        names = names.where(column == "", names + ", " + column)
    return rows.assign(variant=names)


def variants_of(rows: pd.DataFrame) -> dict[str, Variant]:
    """Return the variants of rows by name, in their order."""
    known = rows[["variant", "method", *DIFFERENCES]].drop_duplicates()
    return {str(name): Variant(*values) for name, *values in known.itertuples(index=False)}


def find_view(results: pd.DataFrame, backbone: str, regime: str) -> View:
    """Take one backbone in one regime out of the results."""
    if {"backbone", "regime"} <= set(results.columns):
        rows = results[(results["backbone"] == backbone) & (results["regime"] == regime)]
        if len(rows):
            return views(rows)[0]
    raise unknown(
        "backbone and regime", f"{backbone}, {regime}", (f"{view.backbone}, {view.regime}" for view in views(results))
    )


def known_method(view: View, method: Method) -> Variant:
    """Return a method that was merged by, or raise with the nearest."""
    known = {variant.name: variant for variant in view.methods}
    if name_of(method) not in known:
        raise unknown("method in the results", name_of(method), known)
    return known[name_of(method)]


def _largest_set(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of the merged set with the most tasks."""
    sizes = rows[rows["task"] != ""].groupby("tasks", sort=False)["task"].nunique()
    return rows if sizes.empty else rows[rows["tasks"] == sizes.idxmax()]


def _unique(values: pd.Series[Any]) -> list[str]:
    return [str(value) for value in values.drop_duplicates()]


def line_search(view: View, method: Method, heads: str) -> pd.DataFrame:
    """Read the normalised metric on validation by scale: mean and std (%) over seeds, and whether a seed chose it.

    Of several configurations only the one that went to the test split.
    """
    rows = view.of(method, heads)
    rows = rows[(rows["task"] == "") & (rows["metric"] == view.normalised)]
    test = rows[rows["split"] == "test"]
    tried = rows[rows["split"] == "validation"].merge(test[["seed", "config"]].drop_duplicates(), on=["seed", "config"])
    values = 100 * tried.groupby("scale")["value"].agg(["mean", "std"]).fillna({"std": 0.0})
    return values.assign(chosen=values.index.isin(test["scale"])).reset_index()


# ---------------------------------------------------------------- sets of tasks


def task_sets(results: pd.DataFrame, backbone: str, regime: str) -> pd.DataFrame:
    """Put each merged set of tasks in one row: tasks, size, and as fractions accuracy, normalised accuracy and error.

    Of addition with kept heads, on the test split, over the seeds that merged more than one set; else without a row.
    Where a set has tasks that are no classification, normalised is each task's own metric, and there is no accuracy.
    """
    others = [*(metric for metric in METRICS if metric != "accuracy"), "normalised_metric"]
    rows = results[(results["backbone"] == backbone) & (results["regime"] == regime)]
    rows = rows[(rows["split"] == "test") & (rows["task"] == "") & rows["metric"].isin([*OF_SETS, *others])]
    added = (with_variants(rows)["variant"] == ADDED.name) & (rows["heads"] == "kept")
    rows = rows[added | (rows["metric"] == "disentanglement_error")]
    size = rows["tasks"].str.count(r"\+") + 1
    rows = rows.assign(size=size, value=pd.to_numeric(rows["value"], errors="coerce"))
    rows = rows[rows["seed"].isin(rows.loc[size < size.max(), "seed"])]
    table = rows.pivot_table(index=["size", "tasks"], columns="metric", values="value", aggfunc="mean")
    table = table.reindex(columns=[*OF_SETS, *others])
    mixed = table[others].notna().any(axis=1)
    table["normalised_accuracy"] = table["normalised_metric"].where(mixed, table["normalised_accuracy"])
    table["accuracy"] = math.nan if mixed.any() else table["accuracy"]
    return table[list(OF_SETS)].reset_index()
