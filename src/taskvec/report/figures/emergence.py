"""Beyond the paper: the disentanglement error and what addition gains, along the pre-training of each encoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from taskvec.core.errors import unknown
from taskvec.merging.registry import ADDITION
from taskvec.report.disentanglement import box_error
from taskvec.report.figures.registry import Draw, FigureType, Run
from taskvec.report.figures.style import SNAPSHOT, STYLE, WIDTH, legend, line_style, safe_name
from taskvec.report.views import View, views

FINISHED = math.inf  # where the encoder without a step stands: after all of its snapshots

Measure = Callable[[View], float]
Series = dict[str, dict[float, View]]


def snapshots(results: pd.DataFrame, regime: str) -> Series:
    """Group backbones named NAME@STEP by NAME and step, each with the finished encoder NAME where it was measured."""
    encoders: Series = {}
    regime_views = [view for view in views(results) if view.regime == regime]
    for view in regime_views:
        if match := SNAPSHOT.fullmatch(view.backbone):
            encoders.setdefault(match[1], {})[int(match[2])] = view
    for view in regime_views:
        if view.backbone in encoders:
            encoders[view.backbone][FINISHED] = view
    return {name: dict(sorted(steps.items())) for name, steps in encoders.items() if len(steps) > 1}


def emergence(results: pd.DataFrame, heatmap: pd.DataFrame | None, regime: str) -> Figure:
    """Draw the error in the box, addition and its gain over probing, and both single-task accuracies, by step."""
    series = snapshots(results, regime)
    if not series:
        raise unknown("regime with snapshots", regime, results["regime"].unique())
    steps = sorted({step for by_step in series.values() for step in by_step})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
        (error, added), (gain, single) = figure.subplots(2, 2)
        for index, (name, by_step) in enumerate(series.items()):
            label, style = safe_name(name, 30), line_style(index)
            _line(error, by_step, steps, lambda v: box_error(heatmap, v.backbone, v.regime).mean, label=label, **style)
            _line(added, by_step, steps, lambda v: v.overall(ADDITION, v.heads[0]).mean, label=label, **style)
            _line(gain, by_step, steps, lambda v: v.gain(ADDITION, v.heads[0]).mean, label=label, **style)
            _line(single, by_step, steps, lambda v: v.overall("fine_tuned").mean, label=label, **style)
            _line(single, by_step, steps, lambda v: v.overall("probing").mean, **style | {"linestyle": ":"})
        gain.axhline(0, color="black", linestyle=(0, (4, 2)), linewidth=1)
        _name_axes(error, "disentanglement error ξ in the box (%)", steps)
        _name_axes(gain, "addition: gain over probing (points)", steps)
        mixed = any(view.mixed for by_step in series.values() for view in by_step.values())
        _name_axes(added, f"addition{', fine-tuned = 100' if mixed else ': test accuracy'} (%)", steps)
        _name_axes(single, f"fine-tuned{' = 100' if mixed else ''}; probing dotted (%)", steps)
        legend(figure, error)
        figure.suptitle(f"{safe_name(regime, 24)}, along pre-training", x=0.01, ha="left")
    return figure


def _line(ax: Axes, by_step: dict[float, View], steps: list[float], measure: Measure, **style: Any) -> None:
    """Draw one measure (in %) of one encoder over the steps at which it was measured; steps are evenly spaced."""
    places = [steps.index(step) for step in by_step]
    ax.plot(places, [100 * measure(view) for view in by_step.values()], mec="white", mew=0.3, **style)


def _name_axes(ax: Axes, title: str, steps: list[float]) -> None:
    """Label an axis whose ticks are the steps, in order and not to scale."""
    labels = ["end" if step == FINISHED else f"{step:g}" for step in steps]
    ax.set_xticks(range(len(steps)), labels)
    ax.set_xlabel("pre-training step (not to scale)")
    ax.set_title(title)
    ax.grid(axis="y")


def _plan(run: Run, regime: str) -> Draw | None:
    return partial(emergence, run.results, run.heatmap, regime) if snapshots(run.results, regime) else None


_READING = (
    "Backbones named NAME@STEP are one encoder on its way, the last point is the finished one. Top left: lower means "
    "that task vectors get along better. Top right: what adding them reaches, bottom left what it gains over probing, "
    "with the λ that validation chose."
)
EMERGENCE = FigureType(
    "emergence",
    "Along pre-training.",
    f"{_READING} Bottom right: how good the encoder is for single tasks.",
    _plan,
    mixed_reading=f"{_READING} Bottom right: how close probing comes to fine-tuning, in each task's own metric.",
)
