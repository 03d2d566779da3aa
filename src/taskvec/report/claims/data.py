"""What a run says for or against a claim: measures of a backbone, and estimates of a margin with an interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from taskvec.merging.registry import ADDITION
from taskvec.paper import numbers as paper
from taskvec.report.disentanglement import box_mean, error_rows, with_errors
from taskvec.report.texts import short_backbone
from taskvec.report.views import Gain, View, task_sets, views

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
FEWEST = 3  # units that an interval needs


class Measure(NamedTuple):
    """A name and its values (%), one for each task, pair or set of tasks.

    ``half_width`` is that of their mean, where each is measured on some images of a sample.
    """

    name: str
    values: pd.Series[float]
    half_width: float = 0.0

    def called(self, more: str) -> Measure:
        """Say more in the name."""
        return self._replace(name=f"{self.name} {more}")


class Estimate(NamedTuple):
    """One measured inequality in words: its margin, the ends of an interval, and what that is over."""

    words: str
    margin: float
    low: float = math.nan
    high: float = math.nan
    over: str = ""
    digits: int = 1

    def verdict(self, strict: bool) -> str:
        """Decide by the interval as it is printed; a margin of zero holds only where the claim allows equality."""
        low, high = round(self.low, self.digits), round(self.high, self.digits)
        if low > 0 or (low == 0 and not strict):
            return HOLDS
        return FAILS if high < 0 or (high == 0 and strict) else UNDECIDED


@dataclass(frozen=True)
class ClaimData:
    """The rows of a run, asked by the paper's names; what was not measured comes out empty."""

    results: pd.DataFrame
    heat: pd.DataFrame | None
    roles: Mapping[str, str]

    @cached_property
    def backbones(self) -> dict[str, str]:
        """Name the backbone that stands for each row of the paper."""
        present = set(self.results["backbone"])
        return paper.backbone_of({name: key for name, key in self.roles.items() if name in present})

    @cached_property
    def control(self) -> str:
        """Name the backbone without pre-training: the first that is called random and stands for no row."""
        free = (str(name) for name in self.results["backbone"].unique() if name not in self.roles)
        return next((name for name in free if paper.is_control(name)), "")

    @cached_property
    def _views(self) -> dict[tuple[str, str], View]:
        all_views = views(self.results) if len(self.results) else []
        return {(view.backbone, view.regime): view for view in all_views}

    def of(self, keys: Iterable[str]) -> list[str]:
        """Name the backbones that stand for some rows, those that are there."""
        return [self.backbones[key] for key in keys if key in self.backbones]

    def merged(self, keys: Iterable[str], regime: str) -> dict[str, View]:
        """Take the views in which addition with kept heads was measured, by the paper's key."""
        all_views = {key: self._views.get((self.backbones.get(key, ""), regime)) for key in keys}
        return {key: view for key, view in all_views.items() if view and not math.isnan(view.cell(ADDITION).mean)}

    def addition(
        self, backbone: str, regime: str, metric: str = "accuracy", among: Sequence[str] | None = None
    ) -> Measure:
        """Measure addition with kept heads on each task, of the merge of all tasks or of a set of them."""
        view = self._set(backbone, regime, "+".join(among)) if among else self._views.get((backbone, regime))
        cells = {task: view.cell(ADDITION, metric=metric, task=task).mean for task in view.tasks} if view else {}
        return Measure(short_backbone(backbone), 100 * pd.Series(cells, dtype=float).dropna())

    def paired(self, backbone: str, regimes: Iterable[str]) -> ClaimData:
        """Keep the rows of the seeds that a backbone has in each of some regimes."""
        rows = self.results[self.results["backbone"] == backbone]
        seeds = [set(rows.loc[rows["regime"] == regime, "seed"]) for regime in regimes]
        return replace(self, results=rows[rows["seed"].isin(set.intersection(*seeds))])

    def _set(self, backbone: str, regime: str, tasks: str) -> View | None:
        """Take the merge of one set of tasks, None where it was not measured."""
        rows = self.results
        rows = rows[(rows["backbone"] == backbone) & (rows["regime"] == regime) & (rows["tasks"] == tasks)]
        return next(iter(views(rows)), None) if len(rows) else None

    def tasks(self, backbone: str, regime: str) -> list[str]:
        """Name the tasks that were merged together."""
        view = self._views.get((backbone, regime))
        return view.tasks if view else []

    @cached_property
    def _pairs(self) -> pd.Series[float]:
        """Average the error (%) over seeds, by whether in the box, backbone, regime and pair of tasks."""
        if self.heat is None or self.heat.empty:
            return pd.Series(dtype=float)
        rows = with_errors(self.heat)
        by = ["backbone", "regime", "task_1", "task_2"]
        outside = rows[~rows["inside"]].groupby(by)["error"].mean()
        errors: pd.Series[float] = 100 * pd.concat({True: box_mean(rows, by), False: outside}).dropna()
        return errors

    def error(self, backbone: str, regime: str, inside: bool = True) -> Measure:
        """Measure the disentanglement error of each pair of tasks, inside the box or outside."""
        place = (inside, backbone, regime)
        known = not self._pairs.empty and place in self._pairs.index
        values = cast("pd.Series[float]", self._pairs.loc[place]) if known else pd.Series(dtype=float)
        return Measure(short_backbone(backbone), values, self._half_width(*place) if known else 0.0)

    def _half_width(self, inside: bool, backbone: str, regime: str) -> float:
        """Return the mean half-width (%) of the points inside the box or outside, which that of their mean is below."""
        assert self.heat is not None
        rows = error_rows(self.heat, backbone, regime)
        inner = box_mean(rows, ["backbone"], "half_width").mean()
        return 100 * float(inner if inside else rows.loc[~rows["inside"], "half_width"].mean())

    @cached_property
    def _means(self) -> pd.DataFrame:
        return self.results[(self.results["split"] == "test") & (self.results["task"] == "")]

    def sets(self, backbone: str, regime: str) -> pd.DataFrame:
        """Measure normalised accuracy on each set of tasks."""
        sets = task_sets(self._means, backbone, regime).dropna(subset=["normalised_accuracy"])
        return sets.assign(value=100 * sets["normalised_accuracy"])


# ---------------------------------------------------------------- estimates


def t_interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return Student's 95 % interval of a mean over units; NaN for fewer than three.

    A percentile bootstrap of so few units is far too narrow: of three normal ones it covers the mean 75 times in 100.
    """
    if len(values) < FEWEST:
        return math.nan, math.nan
    half = float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def paired_difference(higher: Measure, lower: Measure, over: str, least: float = 0.0) -> list[Estimate]:
    """Compare two measures on the units that they share: the first is higher by ``least`` or more.

    The interval of the mean over units is wider by the half-widths of what was measured on some images only.
    """
    both = pd.concat([higher.values, lower.values], axis=1, join="inner")
    if both.empty:
        return []
    first, second = both.mean()
    differences = (both.iloc[:, 0] - both.iloc[:, 1]).to_numpy(float) - least
    words = f"{higher.name} {first:.1f}, {lower.name} {second:.1f}"
    (low, high), width = t_interval(differences), math.hypot(higher.half_width, lower.half_width)
    return [Estimate(words, float(differences.mean()), low - width, high + width, f"{len(both)} {over}")]


def against_threshold(measure: Measure, least: float, over: str, sign: int = 1) -> list[Estimate]:
    """Compare the mean of a measure with a threshold: at least that, or at most with sign -1."""
    if measure.values.empty:
        return []
    distances = sign * (measure.values.to_numpy(float) - least)
    words = f"{measure.name} {measure.values.mean():.1f}"
    return [Estimate(words, float(distances.mean()), *t_interval(distances), f"{len(distances)} {over}")]


def exact(words: str, margin: float, digits: int = 2) -> Estimate:
    """Make an estimate of what has no interval, so that the margin alone decides."""
    return Estimate(words, margin, margin, margin, "", digits)


def of_gain(words: str, gain: Gain, sign: int = 1, offset: float = 0.0) -> Estimate:
    """Turn a gain over probing and its interval into a margin in points; adding nothing gains exactly nothing."""
    ends = (0.0, 0.0) if gain.adds_nothing else (gain.low, gain.high)
    low, high = sorted(offset + sign * 100 * end for end in ends)
    return Estimate(words, offset + sign * 100 * gain.mean, low, high, "test images")
