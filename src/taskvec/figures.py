"""Metric rows in, PNG and PDF out: the paper's Figures 1 and 2, and accuracy for each task at a glance."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from taskvec.errors import unknown
from taskvec.tables import (
    ADDITION,
    BOX,
    HEADS,
    Cell,
    View,
    box_error,
    method_label,
    one_line,
    percent,
    scale_text,
    short_backbone,
    view,
    views,
)

# Okabe and Ito's colour-blind-safe palette; its yellow is left out, too faint for lines on white.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
CYCLE = (BLUE, VERMILLION, PURPLE, ORANGE, SKY)  # without those of probing and fine-tuned
HEAD_COLOUR = {"kept": BLUE, "reprobed": VERMILLION}
HEAD_MARKER = {"kept": "o", "reprobed": "s"}
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAP = ListedColormap(matplotlib.colormaps["magma_r"](np.linspace(0, 0.9, 256)), "light to dark")
FULL_SCALE = 100.0  # % of xi at which the colour bar ends: half of the predictions of both tasks have changed
WIDTH = 7.2  # inches, the width of a page
MOST_PANELS = 28  # as many pairs as eight tasks have
UNDATED: dict[str, dict[str, None]] = {  # endings, and what would differ between two days or two installations
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.6,
    "figure.titlesize": 9.5,
    "figure.titleweight": "bold",
    "pdf.fonttype": 42,
    "text.usetex": False,
    "axes.unicode_minus": True,
}


class Planned(NamedTuple):
    """One figure of a run: the stem of its file names, what it is, and whose rows it draws (empty: all)."""

    stem: str
    kind: str
    backbone: str
    regime: str
    draw: Callable[[], Figure]


# ---------------------------------------------------------------- figures of one backbone


def accuracies(results: pd.DataFrame, backbone: str, regime: str, method: str = "") -> Figure:
    """Draw test accuracy (%) and gain over probing (points) of every task and their mean, one row each."""
    one = view(results, backbone, regime)
    method = _method(one, method)
    rows = [*one.tasks, ""]
    figure, axes = _dot_panels(one, [_name(task, 26) or "mean" for task in rows])
    _spans(axes[0], one, rows)
    for series in _accuracy_series(one, method):
        found = [one.cell(series.method, series.heads, task=task) for task in rows]
        _dots(axes[0], found, series.offset, series.label, series.style)
    for heads, offset in _offsets(one).items():
        gains = [_gain_ends(one, method, heads, task) for task in rows]
        _intervals(axes[1], gains, offset, "", _head_style(heads))
    axes[0].set_xlabel("test accuracy (%)")
    _finish_dots(figure, axes, len(rows), _heading(one, method))
    return figure


def method_gains(results: pd.DataFrame, backbone: str, regime: str) -> Figure:
    """Draw for every method its mean test accuracy (%) and its gain over probing (points) with 95 % intervals."""
    one = view(results, backbone, regime)
    figure, axes = _dot_panels(one, [_name(method_label(method), 26) for method in one.methods])
    for method, label, colour in (("probing", "probing", BLACK), ("fine_tuned", "fine-tuned", GREEN)):
        level = 100 * one.cell(method).mean
        if not math.isnan(level):
            axes[0].axvline(level, color=colour, linestyle=(0, (4, 2)), linewidth=1, label=label)
    for heads, offset in _offsets(one).items():
        found = [one.cell(method, heads) for method in one.methods]
        _dots(axes[0], found, offset, f"merged, {HEADS[heads]}", _head_style(heads))
        gains = [_gain_ends(one, method, heads, "") for method in one.methods]
        _intervals(axes[1], gains, offset, "", _head_style(heads))
    axes[0].set_xlabel("test accuracy (%), mean over tasks")
    _finish_dots(figure, axes, 0, _heading(one))
    return figure


def lambda_curve(results: pd.DataFrame, backbone: str, regime: str, method: str = "") -> Figure:
    """Draw the paper's Figure 2 for one method: validation normalised accuracy (%) against lambda, and a close-up."""
    one = view(results, backbone, regime)
    method = _method(one, method)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        whole, close = figure.subplots(1, 2)
        for ax in (whole, close):
            _draw_levels(ax, one)
            for heads in one.heads:
                label = f"{HEADS[heads]} (λ = {scale_text(one.cell(method, heads))})"
                _draw_curve(ax, _curve(one, method, heads), label, HEAD_COLOUR[heads], HEAD_MARKER[heads])
            _label_curve(ax)
            _say_if_empty(ax)
        whole.set_title("every λ tried")
        close.set_title("close-up of the top")
        close.set_ylabel("")
        close.set_ylim(*_close_up(one, method))
        _legend(figure, whole)
        figure.suptitle(_heading(one, method), x=0.01, ha="left")
    return figure


def heatmaps(heatmap: pd.DataFrame, backbone: str, regime: str) -> Figure:
    """Draw the paper's Figure 1: the disentanglement error xi (%) over two scales, a panel for each pair of tasks."""
    panels = _panels(heatmap, backbone, regime)
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    side = (WIDTH - 0.7) / max(columns, 2)
    with matplotlib.rc_context(STYLE):
        size = (side * columns + 0.7, (side + 0.12) * lines + (0.3 if columns > 1 else 0.4))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax, panel in zip(axes, panels, strict=False):
            mesh = _draw_panel(ax, *panel)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        label = "weight disentanglement error ξ (%)" if lines * columns > 1 else "disentanglement error ξ (%)"
        figure.colorbar(mesh, ax=list(axes), label=label, extend="max", **_bar(lines, side))
        figure.suptitle(_heatmap_heading(heatmap, backbone, regime, columns), x=0.01, ha="left")
    return figure


# ---------------------------------------------------------------- figures across methods and backbones


def lambda_methods(results: pd.DataFrame, backbone: str, regime: str) -> Figure:
    """Draw normalised accuracy (%) on validation against lambda for all methods, kept heads beside re-probed."""
    one = view(results, backbone, regime)
    curves = {method_label(method): (one, method) for method in one.methods}
    return _by_heads(curves, one.heads, _heading(one), lambda ax: _draw_levels(ax, one))


def lambda_curves(results: pd.DataFrame, regime: str) -> Figure:
    """Draw the paper's Figure 2: normalised accuracy (%) of addition against lambda, a line for each backbone."""
    found = [one for one in views(results) if one.regime == regime and one.methods]
    if not found:
        raise unknown("regime", regime, (one.regime for one in views(results)))
    curves = {short_backbone(one.backbone): (one, _method(one, "")) for one in found}
    heads = [head for head in HEADS if any(head in one.heads for one in found)]
    named = " / ".join(dict.fromkeys(method_label(method) for _, method in curves.values()))
    return _by_heads(curves, heads, f"{_name(regime, 30)}, {named}", _draw_fine_tuned)


def _by_heads(
    curves: dict[str, tuple[View, str]], heads: list[str], heading: str, levels: Callable[[Axes], object]
) -> Figure:
    """Draw one panel for each kind of heads, with a line for each entry, told apart by colour, marker and dashes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2 + 0.17 * math.ceil(len(curves) / 3)), layout="constrained")
        axes = figure.subplots(1, len(heads), sharey=True, squeeze=False)[0]
        for ax, head in zip(axes, heads, strict=True):
            levels(ax)
            for i, (label, (one, method)) in enumerate(curves.items()):
                dashes = DASHES[i // len(CYCLE) % len(DASHES)]
                colour, marker = CYCLE[i % len(CYCLE)], MARKERS[i % len(MARKERS)]
                _draw_curve(ax, _curve(one, method, head), _name(label, 44), colour, marker, dashes)
            _label_curve(ax)
            ax.set_title(HEADS[head])
            ax.label_outer()
            _say_if_empty(ax)
        _legend(figure, axes[0])
        figure.suptitle(heading, x=0.01, ha="left")
    return figure


# ---------------------------------------------------------------- curves over lambda


class _Curve(NamedTuple):
    """Validation normalised accuracy (%) at each scale, mean and spread over seeds, and the scales that were chosen."""

    scale: np.ndarray[Any, Any]
    mean: np.ndarray[Any, Any]
    sd: np.ndarray[Any, Any]
    chosen: np.ndarray[Any, Any]


def _curve(one: View, method: str, heads: str) -> _Curve:
    """Read the line search of one method; of several configurations only the one that went to the test split."""
    rows = one.rows
    rows = rows[(rows["method"] == method) & (rows["heads"] == heads) & (rows["task"] == "")]
    rows = rows[rows["metric"] == "normalised_accuracy"]
    test = rows[rows["split"] == "test"]
    tried = rows[rows["split"] == "validation"].merge(test[["seed", "config"]].drop_duplicates(), on=["seed", "config"])
    by_scale = tried.groupby("scale")["value"].agg(["mean", "std"])
    chosen = sorted(set(test["scale"].dropna()) & set(by_scale.index))
    return _Curve(
        by_scale.index.to_numpy(float),
        100 * by_scale["mean"].to_numpy(float),
        100 * by_scale["std"].fillna(0).to_numpy(float),
        np.flatnonzero(by_scale.index.isin(chosen)),
    )


def _draw_curve(ax: Axes, curve: _Curve, label: str, colour: str, marker: str, dashes: object = "-") -> None:
    """Draw a line with markers, a band of one standard deviation over seeds, and a ring around the chosen scale."""
    ax.plot(curve.scale, curve.mean, color=colour, marker=marker, linestyle=dashes, label=label, mec="white", mew=0.3)
    if curve.sd.any():
        ax.fill_between(curve.scale, curve.mean - curve.sd, curve.mean + curve.sd, color=colour, alpha=0.18, lw=0)
    at = curve.chosen
    ax.plot(curve.scale[at], curve.mean[at], "o", ms=8, mfc="none", mec=colour, mew=1.3, gid="chosen", zorder=5)


def _draw_levels(ax: Axes, one: View) -> None:
    """Draw what a merge is compared with: fine-tuned at 100 % and probing."""
    _draw_fine_tuned(ax)
    level = _probing_level(one)
    if not math.isnan(level):
        ax.axhline(level, color=BLACK, linestyle=(0, (4, 2)), linewidth=1.2, label=f"probing ({level:.1f})")


def _draw_fine_tuned(ax: Axes) -> None:
    ax.axhline(100, color=GREEN, linewidth=1.2, label="fine-tuned (= 100)")


def _probing_level(one: View) -> float:
    """Take the normalised accuracy (%) of probing on validation, mean over tasks and seeds."""
    rows = one.rows[(one.rows["method"] == "probing") & (one.rows["split"] == "validation") & (one.rows["task"] == "")]
    return 100 * float(rows.loc[rows["metric"] == "normalised_accuracy", "value"].mean())


def _close_up(one: View, method: str) -> tuple[float, float]:
    """Choose the range of the close-up (%): from a little below probing to a little above the best."""
    tops = [float(curve.mean.max()) for curve in (_curve(one, method, heads) for heads in one.heads) if curve.mean.size]
    known = [value for value in (_probing_level(one), 100.0, *tops) if not math.isnan(value)]
    low, high = min(known), max(known)
    pad = max(1.0, 0.25 * (high - low))
    return low - pad, high + pad / 2


def _label_curve(ax: Axes) -> None:
    ax.set_xlabel("scaling coefficient λ")
    ax.set_ylabel("normalised accuracy on validation (%)")
    ax.grid(axis="y")
    ax.margins(x=0.03)


def _say_if_empty(ax: Axes) -> None:
    """Say why there is no curve: nothing can be divided by a fine-tuned accuracy of zero, as in a run of two steps."""
    if not _rings(ax):
        text = "no normalised accuracy:\na fine-tuned accuracy is zero"
        ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center")


def _rings(ax: Axes) -> list[Line2D]:
    """Find the rings drawn around chosen scales."""
    return [line for line in ax.get_lines() if line.get_gid() == "chosen" and np.size(line.get_xdata())]


def _legend(figure: Figure, ax: Axes) -> None:
    """Put the legend below the panels, with the ring of the chosen scale explained once."""
    handles, labels = ax.get_legend_handles_labels()
    rings = _rings(ax)
    if rings:
        handles, labels = [*handles, rings[0]], [*labels, "chosen on validation"]
    figure.legend(handles, labels, loc="outside lower center", ncols=_legend_columns(labels))


def _legend_columns(labels: list[str]) -> int:
    """Choose as many columns, four at most, as fit on the width of a page (about 116 characters)."""
    columns = min(4, len(labels))
    while columns > 1 and _legend_width(labels, columns) > 116:
        columns -= 1
    return columns


def _legend_width(labels: list[str], columns: int) -> int:
    """Estimate the characters of the longest labels of all columns side by side, each with its mark."""
    rows = math.ceil(len(labels) / columns)
    return sum(8 + max(map(len, labels[i : i + rows])) for i in range(0, len(labels), rows))


# ---------------------------------------------------------------- rows of dots


class _Series(NamedTuple):
    """One kind of dots: whose accuracy, how it is called, how far from the middle of its row, and its style."""

    method: str
    heads: str
    label: str
    offset: float
    style: dict[str, Any]


def _accuracy_series(one: View, method: str) -> list[_Series]:
    """List the dots of the first figure, baselines in the middle of the row and the two kinds of heads beside it."""
    out = [_Series("probing", "kept", "probing", 0, {"color": BLACK, "marker": "X"})]
    for heads, offset in _offsets(one).items():
        label = f"{_name(method_label(method), 24)}, {HEADS[heads]} (λ = {scale_text(one.cell(method, heads))})"
        out.append(_Series(method, heads, label, offset, _head_style(heads)))
    out.append(_Series("joint", "kept", "joint", 0, {"color": PURPLE, "marker": "^"}))
    out.append(_Series("fine_tuned", "kept", "fine-tuned", 0, {"color": GREEN, "marker": "D"}))
    return [series for series in out if not math.isnan(one.cell(series.method, series.heads).mean)]


def _spans(ax: Axes, one: View, tasks: list[str]) -> None:
    """Join probing and fine-tuned of each row by a grey line: the room that a merge has."""
    for row, task in enumerate(tasks):
        ends = [100 * one.cell(method, task=task).mean for method in ("probing", "fine_tuned")]
        ax.plot(ends, [row, row], color="#B8B8B8", linewidth=1.6, solid_capstyle="butt", zorder=1.5)


def _head_style(heads: str) -> dict[str, Any]:
    return {"color": HEAD_COLOUR[heads], "marker": HEAD_MARKER[heads]}


def _offsets(one: View) -> dict[str, float]:
    """Move two kinds of heads to both sides of their row, so that equal numbers stay visible."""
    return {"kept": -0.16, "reprobed": 0.16} if len(one.heads) > 1 else dict.fromkeys(one.heads, 0.0)


def _dot_panels(one: View, names: list[str]) -> tuple[Figure, list[Axes]]:
    """Lay out one row for each name, accuracies to the left and gains to the right."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(WIDTH, 1.45 + (0.3 if len(names) < 14 else 0.23) * max(2, len(names))), layout="constrained"
        )
        axes = list(figure.subplots(1, 2, sharey=True, width_ratios=[3, 2]))
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    return figure, axes


def _dots(ax: Axes, found: list[Cell], offset: float, label: str, style: dict[str, Any]) -> None:
    """Draw one dot a row (%), with a bar of one standard deviation over seeds."""
    means = [100 * cell.mean for cell in found]
    spread = [0.0 if math.isnan(cell.sd) else 100 * cell.sd for cell in found]
    heights = [row + offset for row in range(len(found))]
    bars: dict[str, Any] = {"xerr": spread} if any(spread) else {}
    ax.errorbar(
        means, heights, linestyle="none", ms=5, elinewidth=1, label=label, mec="white", mew=0.4, **bars, **style
    )


def _gain_ends(one: View, method: str, heads: str, task: str) -> tuple[float, float, float]:
    """Read a gain over probing and the ends of its interval, in points; without an interval the ends are the gain."""
    middle, low, high = (
        100 * one.cell(method, heads, f"gain_over_probing{end}", task).mean for end in ("", "_low", "_high")
    )
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
        figure.legend(handles, labels, loc="outside lower center", ncols=_legend_columns(labels))
        figure.suptitle(heading, x=0.01, ha="left")


# ---------------------------------------------------------------- heatmaps


def _panels(heatmap: pd.DataFrame, backbone: str, regime: str) -> list[tuple[str, str, pd.DataFrame, Cell]]:
    """Average xi (%) over seeds for each pair of tasks, as (name on x, name on y, grid, mean in the box)."""
    rows = heatmap[(heatmap["backbone"] == backbone) & (heatmap["regime"] == regime)]
    if rows.empty:
        known = heatmap[["backbone", "regime"]].drop_duplicates().agg(", ".join, axis=1)
        raise unknown("backbone and regime", f"{backbone}, {regime}", known)
    pairs = list(rows.groupby(["task_1", "task_2"], sort=False))
    panels = [("task 1", "task 2", rows)] if len(pairs) > 1 else []
    panels += [(_name(str(key[0]), 16), _name(str(key[1]), 16), part) for key, part in pairs[:MOST_PANELS]]  # type: ignore[index]
    return [(x, y, _grid(part), box_error(part, backbone, regime)) for x, y, part in panels]


def _grid(rows: pd.DataFrame) -> pd.DataFrame:
    """Arrange xi (%) with scale_2 down the rows and scale_1 along the columns."""
    xi = rows.assign(xi=100 * (rows["error_1"] + rows["error_2"]))
    return xi.pivot_table(index="scale_2", columns="scale_1", values="xi", aggfunc="mean")


def _draw_panel(ax: Axes, first: str, second: str, grid: pd.DataFrame, error: Cell) -> Any:
    """Draw one heatmap: light where the weights are disentangled, the search space boxed, a star at the pre-trained."""
    mesh = ax.pcolormesh(
        _edges(grid.columns.to_numpy(float)), _edges(grid.index.to_numpy(float)), grid.to_numpy(float),
        cmap=MAP, vmin=0, vmax=FULL_SCALE, edgecolors="face", linewidth=0.1,
    )  # fmt: skip
    for colour, width in (("white", 2.4), ("#E00000", 1.3)):
        ax.add_patch(Rectangle((-BOX, -BOX), 2 * BOX, 2 * BOX, fill=False, edgecolor=colour, linewidth=width))
    ax.plot(0, 0, marker="*", ms=7, color=BLACK, mec="white", mew=0.6)
    ax.set_aspect("equal")
    ax.set_title("mean of the pairs" if first == "task 1" else f"{first} + {second}", pad=13, weight="bold", size=7.5)
    ax.text(0, 1.025, f"ξ in the box {percent(error)} %", transform=ax.transAxes, fontsize=7)
    ax.set_xlabel(f"λ of {first}", fontsize=7.5)
    ax.set_ylabel(f"λ of {second}", fontsize=7.5)
    ax.tick_params(labelsize=7, length=2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(7, integer=True))
    return mesh


def _bar(lines: int, side: float) -> dict[str, Any]:
    """Keep the colour bar at two rows of panels or fewer, at the top, and equally thick (0.1 inches)."""
    shrink = min(0.92, 2 / lines)
    return {"shrink": shrink, "aspect": 10 * shrink * lines * side, "anchor": (0, 1), "pad": 0.015}


def _edges(centres: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Put the borders of cells half-way between their centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = [(a + b) / 2 for a, b in pairwise(centres)]
    return np.array([2 * centres[0] - middle[0], *middle, 2 * centres[-1] - middle[-1]])


def _heatmap_heading(heatmap: pd.DataFrame, backbone: str, regime: str, columns: int) -> str:
    rows = heatmap[(heatmap["backbone"] == backbone) & (heatmap["regime"] == regime)]
    pairs = len(rows[["task_1", "task_2"]].drop_duplicates())
    left_out = f" ({MOST_PANELS} of {pairs} pairs shown)" if pairs > MOST_PANELS else ""
    return _name(short_backbone(backbone), 26 if columns == 1 else 56) + f", {_name(regime, 24)}{left_out}"


# ---------------------------------------------------------------- names and files


@cache
def _drawable() -> frozenset[int]:
    """List the characters that the font of the figures can draw."""
    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def _name(text: str, longest: int) -> str:
    """Make a user's name safe to draw: one line, no mathematics, known characters, its middle cut when too long."""
    known = _drawable()
    text = "".join(letter if ord(letter) in known else "\N{REPLACEMENT CHARACTER}" for letter in one_line(text))
    if len(text) > longest:
        tail = (longest - 1) // 3
        text = text[: longest - 1 - tail] + "…" + text[-tail:]
    return text.replace("$", r"\$")


def _heading(one: View, method: str = "") -> str:
    seeds = f", mean of {one.seeds} seeds" if one.seeds > 1 else ""
    named = f", {_name(method_label(method), 24)}" if method else ""
    return _name(short_backbone(one.backbone), 56) + f", {_name(one.regime, 24)}{named}{seeds}"


def _method(one: View, method: str) -> str:
    """Take the method asked for, or the first there is: the paper's addition where it was run."""
    if method and method not in one.methods:
        raise unknown("method in the results", method, one.methods)
    if not one.methods:
        raise unknown("method in the results", ADDITION, one.methods)
    return method or one.methods[0]


def plan(results: pd.DataFrame, heatmap: pd.DataFrame | None = None) -> list[Planned]:
    """List the figures of a run in reading order; a figure's files are its stem with .png and .pdf."""
    found = [one for one in views(results) if one.methods]
    out: list[Planned] = []
    for regime in dict.fromkeys(one.regime for one in found):
        if len([one for one in found if one.regime == regime]) > 1:
            out.append(
                Planned(_stem("backbones", regime), "backbones", "", regime, partial(lambda_curves, results, regime))
            )
    for one in found:
        kinds: dict[str, Callable[..., Figure]] = {"accuracies": accuracies}
        kinds |= {"gains": method_gains} if one.methods[1:] else {}
        kinds |= {"lambda": lambda_curve}
        kinds |= {"lambdas": lambda_methods} if one.methods[1:] else {}
        out += [_planned(kind, draw, results, one) for kind, draw in kinds.items()]
        if heatmap is not None and ((heatmap["backbone"] == one.backbone) & (heatmap["regime"] == one.regime)).any():
            out.append(_planned("heatmap", heatmaps, heatmap, one))
    return out


def _planned(kind: str, draw: Callable[..., Figure], rows: pd.DataFrame, one: View) -> Planned:
    stem = _stem(kind, one.backbone, one.regime)
    return Planned(stem, kind, one.backbone, one.regime, lambda: draw(rows, one.backbone, one.regime))


def _stem(kind: str, *names: str) -> str:
    """Make a file name that stays the same from run to run; names that lose characters get a digest of the whole."""
    short = [short_backbone(name) for name in names]
    parts = [re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:48] for name in short]
    plain = all(part == name.replace(":", "-", 1) for part, name in zip(parts, names, strict=True))
    digest = [] if plain else [hashlib.blake2b("\0".join(names).encode(), digest_size=3).hexdigest()]
    return "--".join([kind, *(part for part in parts if part), *digest])


def write(results: pd.DataFrame, heatmap: pd.DataFrame | None, folder: Path) -> list[str]:
    """Write every figure of a run as PNG (200 dpi) and PDF, the same bytes for the same rows; return the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    for planned in plan(results, heatmap):
        figure = planned.draw()
        for ending in UNDATED:
            name = f"{planned.stem}.{ending}"
            _write_whole(folder / name, _encode(figure, ending))
            names.append(name)
            figure.set_layout_engine("none")  # the PDF keeps the layout of the PNG
    return names


def _encode(figure: Figure, ending: str) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=ending, dpi=200, metadata=UNDATED[ending])
    return buffer.getvalue()


def _write_whole(path: Path, data: bytes) -> None:
    """Write beside the file and rename, so that no reader meets half a figure."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    beside.replace(path)
