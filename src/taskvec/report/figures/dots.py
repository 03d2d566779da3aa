"""Rows of dots: accuracies and gains of every task and of every method, and the scale of every task."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from taskvec.core.errors import unknown
from taskvec.learning.head_modes import HEADS
from taskvec.merging.variants import ADDED, PER_TASK
from taskvec.report.figures.registry import Draw, FigureType, Run, of_view
from taskvec.report.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    HEAD_COLOUR,
    HEAD_MARKER,
    PURPLE,
    SKY,
    STYLE,
    WIDTH,
    heading,
    legend,
    legend_below,
    merged_by,
    safe_name,
)
from taskvec.report.texts import method_label, scale_text, short_backbone
from taskvec.report.views import METRICS, Method, Spread, View, find_view, views


def accuracies(results: pd.DataFrame, backbone: str, regime: str, method: Method = "") -> Figure:
    """Draw accuracy (%), or the own metric, and gain over probing (points) of every task and their mean on test."""
    view = find_view(results, backbone, regime)
    method = merged_by(view, method)
    rows = [*view.tasks, ""]
    figure, axes = _dot_panels(view, [_row_name(view, task) for task in rows])
    _spans(axes[0], view, rows)
    for series in _accuracy_series(view, method):
        spreads = [view.result(series.method, series.heads, task) for task in rows]
        _dots(axes[0], spreads, series.offset, series.label, series.style)
    for heads, offset in _offsets(view).items():
        gains = [_gain_ends(view, method, heads, task) for task in rows]
        _intervals(axes[1], gains, offset, "", _head_style(heads))
    if not view.metric:
        axes[0].text(0.5, len(view.tasks), "no mean of different metrics", **_centred(axes[0]))
    axes[0].set_xlabel(f"test {METRICS.get(view.metric, 'split, own metric of each task')} (%)")
    _finish_dots(figure, axes, len(rows), heading(view, method))
    return figure


def _row_name(view: View, task: str) -> str:
    """Name a row by its task, with its metric where tasks differ in theirs."""
    if not task:
        return "mean (gain: normalised)" if view.mixed else "mean"
    if view.metric:
        return safe_name(task, 26)
    return f"{safe_name(task, 20)} ({METRICS[view.metrics[task]]})" if task in view.metrics else safe_name(task, 26)


def _centred(ax: Axes) -> dict[str, Any]:
    """Put grey text in the middle of a row."""
    place = {"transform": ax.get_yaxis_transform(), "ha": "center", "va": "center"}
    return place | {"color": "#6E6E6E", "fontsize": 7}


def method_gains(results: pd.DataFrame, backbone: str, regime: str) -> Figure:
    """Draw for every method its mean on the test split (%) and its gain over probing (points) with 95 % intervals."""
    view = find_view(results, backbone, regime)
    figure, axes = _dot_panels(view, [safe_name(method_label(method), 26) for method in view.methods])
    for method, label, colour in (("probing", "probing", BLACK), ("fine_tuned", "fine-tuned", GREEN)):
        level = 100 * view.overall(method).mean
        if not math.isnan(level):
            axes[0].axvline(level, color=colour, linestyle=(0, (4, 2)), linewidth=1, label=label)
    for heads, offset in _offsets(view).items():
        means = [view.overall(method, heads) for method in view.methods]
        _dots(axes[0], means, offset, f"merged, {HEADS[heads]}", _head_style(heads))
        gains = [_gain_ends(view, method, heads, "") for method in view.methods]
        _intervals(axes[1], gains, offset, "", _head_style(heads))
    axes[0].set_xlabel(f"{'normalised test metric' if view.mixed else 'test accuracy'} (%), mean over tasks")
    _finish_dots(figure, axes, 0, heading(view))
    return figure


class _Series(NamedTuple):
    """One kind of dots: whose accuracy, how it is called, how far from the middle of its row, and its style."""

    method: Method
    heads: str
    label: str
    offset: float
    style: dict[str, Any]


def _accuracy_series(view: View, method: Method) -> list[_Series]:
    """List the dots of the first figure, baselines in the middle of the row and the two kinds of heads beside it."""
    out = [_Series("probing", "kept", "probing", 0, {"color": BLACK, "marker": "X"})]
    for heads, offset in _offsets(view).items():
        label = f"{safe_name(method_label(method), 24)}, {HEADS[heads]} (λ = {scale_text(view.result(method, heads))})"
        out.append(_Series(method, heads, label, offset, _head_style(heads)))
    out.append(_Series("zero_shot", "kept", "zero-shot", 0, {"color": SKY, "marker": "v"}))
    out.append(_Series("joint", "kept", "joint", 0, {"color": PURPLE, "marker": "^"}))
    out.append(_Series("fine_tuned", "kept", "fine-tuned", 0, {"color": GREEN, "marker": "D"}))
    return [series for series in out if _is_measured(view, series)]


def _is_measured(view: View, series: _Series) -> bool:
    """Say whether any task has a number."""
    return any(not math.isnan(view.result(series.method, series.heads, task).mean) for task in view.tasks)


def _spans(ax: Axes, view: View, tasks: list[str]) -> None:
    """Join probing and fine-tuned of each row by a grey line: the room that a merge has."""
    for row, task in enumerate(tasks):
        ends = [100 * view.result(method, task=task).mean for method in ("probing", "fine_tuned")]
        ax.plot(ends, [row, row], color="#B8B8B8", linewidth=1.6, solid_capstyle="butt", zorder=1.5)


def _head_style(heads: str) -> dict[str, Any]:
    return {"color": HEAD_COLOUR[heads], "marker": HEAD_MARKER[heads]}


def _offsets(view: View) -> dict[str, float]:
    """Move two kinds of heads to both sides of their row, so that equal numbers stay visible."""
    return {"kept": -0.16, "reprobed": 0.16} if len(view.heads) > 1 else dict.fromkeys(view.heads, 0.0)


def _dot_panels(view: View, names: list[str]) -> tuple[Figure, list[Axes]]:
    """Lay out one row for each name, accuracies to the left and gains to the right."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(WIDTH, 1.45 + (0.3 if len(names) < 14 else 0.23) * max(2, len(names))), layout="constrained"
        )
        axes = list(figure.subplots(1, 2, sharey=True, width_ratios=[3, 2]))
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    return figure, axes


def _dots(ax: Axes, spreads: list[Spread], offset: float, label: str, style: dict[str, Any]) -> None:
    """Draw one dot a row (%), with a bar of one standard deviation over seeds."""
    means = [100 * cell.mean for cell in spreads]
    spread = [0.0 if math.isnan(cell.sd) else 100 * cell.sd for cell in spreads]
    heights = [row + offset for row in range(len(spreads))]
    bars: dict[str, Any] = {"xerr": spread} if any(spread) else {}
    ax.errorbar(
        means, heights, linestyle="none", ms=5, elinewidth=1, label=label, mec="white", mew=0.4, **bars, **style
    )


def _gain_ends(view: View, method: Method, heads: str, task: str) -> tuple[float, float, float]:
    """Read a gain over probing and the ends of its interval, in points; without an interval the ends are the gain."""
    gain = view.gain(method, heads, task)
    middle, low, high = (100 * value for value in (gain.mean, gain.low, gain.high))
    return (middle, middle, middle) if math.isnan(low) or math.isnan(high) else (middle, low, high)


def _intervals(
    ax: Axes, gains: list[tuple[float, float, float]], offset: float, label: str, style: dict[str, Any]
) -> None:
    """Draw one gain a row (points) as a dot in its interval."""
    heights = np.arange(len(gains)) + offset
    for height, (_, low, high) in zip(heights, gains, strict=True):
        ax.plot([low, high], [height, height], color=style["color"], linewidth=1.3, solid_capstyle="butt")
    middles = [gain[0] for gain in gains]
    ax.plot(middles, heights, linestyle="none", ms=5, label=label, mec="white", mew=0.4, **style)


def _finish_dots(figure: Figure, axes: list[Axes], tasks: int, heading: str) -> None:
    """Add what both panels share: light lines for the rows, zero for probing, legend and title."""
    for ax in axes:
        ax.grid(axis="both")
        ax.tick_params(axis="y", length=0)
        if tasks > 2:
            ax.axhspan(tasks - 1.5, tasks - 0.5, color="#F1F1F1", zorder=0, lw=0)
    axes[1].axvline(0, color=BLACK, linestyle=(0, (4, 2)), linewidth=1)
    axes[1].set_xlabel("gain over probing\n(points, 95 % interval)")
    handles, labels = axes[0].get_legend_handles_labels()
    with matplotlib.rc_context(STYLE):
        legend_below(figure, handles, labels)
        figure.suptitle(heading, x=0.01, ha="left")


# ---------------------------------------------------------------- the scale of every task


def scales(results: pd.DataFrame, regime: str) -> Figure:
    """Draw the lambda of every task beside the common one, a panel for each backbone of a regime."""
    all_views = with_own_scales(views(results), regime)
    if not all_views:
        raise unknown("regime with a λ for each task", regime, {view.regime for view in views(results)})
    tasks = list(dict.fromkeys(task for view in all_views for task in view.tasks))
    columns = min(4, len(all_views))
    lines = math.ceil(len(all_views) / columns)
    with matplotlib.rc_context(STYLE):
        size = (WIDTH * max(columns, 2) / 4, 0.8 + lines * (0.55 + 0.19 * len(tasks)))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for ax, view in zip(axes, all_views, strict=False):
            _draw_scales(ax, view, tasks)
        for ax in axes[len(all_views) :]:
            ax.set_axis_off()
        figure.suptitle(f"{safe_name(regime, 30)}, a λ for each task", x=0.01, ha="left")
        legend(figure, axes[0])
    return figure


def with_own_scales(all_views: list[View], regime: str) -> list[View]:
    """Keep the backbones of a regime that have a lambda for each task."""
    return [view for view in all_views if view.regime == regime and len(view.task_scales)]


def _draw_scales(ax: Axes, view: View, tasks: list[str]) -> None:
    """Draw a dot for each task with a bar of one standard deviation over seeds, and a line for the common lambda."""
    scales = view.task_scales.reindex(columns=tasks)
    seeds = view.rows.loc[view.rows["variant"] == PER_TASK.name, "seed"]
    common = find_view(view.rows[view.rows["seed"].isin(seeds)], view.backbone, view.regime).result(ADDED)
    if not math.isnan(common.low):
        middle = (common.low + common.high) / 2
        ax.axvline(middle, color=BLACK, linestyle=(0, (4, 2)), linewidth=1, label="common λ")
    rows, spread = np.arange(len(tasks)), scales.std().fillna(0.0)
    bars: dict[str, Any] = {"xerr": spread} if spread.any() else {}
    ax.errorbar(
        scales.mean(),
        rows,
        linestyle="none",
        marker="o",
        ms=5,
        color=BLUE,
        mec="white",
        mew=0.4,
        label="λ of the task",
        **bars,
    )
    ax.set_yticks(rows, [safe_name(task, 20) for task in tasks])
    ax.set_ylim(len(tasks) - 0.5, -0.5)
    ax.set_title(safe_name(short_backbone(view.backbone), 24))
    ax.set_xlabel("λ")
    ax.label_outer()
    ax.grid(axis="both")
    ax.tick_params(axis="y", length=0)


# ---------------------------------------------------------------- the kinds of figures


def _plan_gains(run: Run, view: View) -> Draw | None:
    return of_view(method_gains)(run, view) if view.methods[1:] else None


def _plan_scales(run: Run, regime: str) -> Draw | None:
    return partial(scales, run.results, regime) if with_own_scales(run.views, regime) else None


_ROOM = (
    "Left: the grey bar from probing (cross) to fine-tuned (diamond) is the room that a merge has; further right "
    "is better."
)
_INTERVALS = "An interval across the dashed line is no evidence of a difference. The shaded row is the mean over tasks."
ACCURACIES = FigureType(
    "accuracies",
    "What each task gets.",
    f"{_ROOM} Right: the accuracy points that merging adds to probing. {_INTERVALS}",
    of_view(accuracies),
    mixed_reading=f"{_ROOM} Right: the points of the task's own metric that merging adds to probing. {_INTERVALS}",
)
_MEANS = "Means over tasks on the test split, each method at the λ that validation chose."
_SEVERAL = (
    "with a bar of one standard deviation where there are several seeds. Right: points over probing with 95 % "
    "intervals."
)
GAINS = FigureType(
    "gains",
    "All methods side by side.",
    f"{_MEANS} Left: accuracy, {_SEVERAL}",
    _plan_gains,
    mixed_reading=f"{_MEANS} Left: every task's own metric divided by that of its fine-tuned encoder, {_SEVERAL}",
)
SCALES = FigureType(
    "scales",
    "A λ for each task beside the common one.",
    "Dots are the λ of each task, found one after the other on validation; the dashed line is the common λ. "
    "Dots on the line mean that one λ is enough.",
    _plan_scales,
)
