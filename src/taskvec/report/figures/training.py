"""Training curves: the loss of every fine-tuning of one backbone, a panel a task."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from taskvec.report.figures.registry import Draw, FigureType, Run
from taskvec.report.figures.style import GREY, STYLE, WIDTH, legend_below, line_style, safe_name
from taskvec.report.texts import short_backbone
from taskvec.report.views import View

COLUMNS = 4
"""Panels side by side at most."""
WINDOW = 0.05
"""Share of a training over which the bold line is a mean."""


def training_curves(training: pd.DataFrame, backbone: str) -> Figure:
    """Draw the training loss against the step: a panel a task, a line a regime (mean over seeds), trials in grey."""
    rows = training[training["backbone"] == backbone]
    tasks, regimes = list(dict.fromkeys(rows["task"])), list(dict.fromkeys(rows["regime"]))
    columns = min(COLUMNS, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.7 + 1.5 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False, sharex=True)
        for ax, task in zip(axes.flat, tasks, strict=False):
            _draw_task(ax, rows[rows["task"] == task], regimes)
            ax.set_title(safe_name(task, 80 // columns) if task else "all tasks, joint")
        for ax in axes.flat[len(tasks) :]:
            ax.set_axis_off()
        for column in axes.T:
            last = [ax for ax in column if ax.axison][-1]
            last.set_xlabel("step")
            last.tick_params(labelbottom=True)
        figure.supylabel("training loss", fontsize=STYLE["font.size"])
        named = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}  # noqa: B905
        legend_below(figure, list(named.values()), list(named))
        figure.suptitle(safe_name(short_backbone(backbone), 56), x=0.01, ha="left")
    return figure


def _draw_task(ax: Axes, rows: pd.DataFrame, regimes: list[str]) -> None:
    """Draw the trainings on one task: every loss faintly and their running mean, all from zero up."""
    for _, trial in rows[rows["trial"]].groupby(["regime", "peak"], sort=False):
        ax.plot(trial["step"], _smooth(trial["loss"]), color=GREY, lw=0.6, label="trials of learning rates", zorder=1)
    trained = rows[~rows["trial"]]
    for place, regime in enumerate(regimes):
        curve = trained[trained["regime"] == regime].groupby("step", sort=True)["loss"].mean()
        if len(curve):
            style: dict[str, Any] = line_style(place) | {"marker": "o" if len(curve) < 3 else ""}
            ax.plot(curve.index, curve, color=style["color"], lw=0.6, alpha=0.3)
            ax.plot(curve.index, _smooth(curve), label=safe_name(regime, 24), **style)
    finite = trained["loss"][np.isfinite(trained["loss"])]
    if len(finite):
        ax.set_ylim(0, 1.05 * max(float(finite.max()), 1e-6))
    ax.grid(axis="y")
    ax.margins(x=0.02)


def _smooth(losses: pd.Series[float]) -> pd.Series[float]:
    """Return the running mean of a curve."""
    return losses.rolling(max(1, round(WINDOW * len(losses))), center=True, min_periods=1).mean()


def _plan(run: Run, view: View) -> Draw | None:
    """Return what draws the curves of a backbone, beside the first of its regimes: all share one figure."""
    first = next(other for other in run.views if other.backbone == view.backbone)
    if run.training is None or view.regime != first.regime or view.backbone not in set(run.training["backbone"]):
        return None
    return partial(training_curves, run.training, view.backbone)


TRAINING = FigureType(
    "training",
    "Training curves of every fine-tuning.",
    "The loss on random training batches, with its running mean; a line for each regime, the mean over seeds. A curve "
    "that still falls at the end asks for more steps, one that rises for a lower learning rate. training.csv has the "
    "numbers.",
    _plan,
)
