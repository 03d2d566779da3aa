"""The paper's Figures 1, 3, 4 and 5: the weight disentanglement error over two scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from taskvec.core.errors import unknown
from taskvec.report.disentanglement import BOX, box_error, error_rows, sampling_text
from taskvec.report.figures.registry import Draw, FigureType, Run, among
from taskvec.report.figures.style import BLACK, STYLE, WIDTH, safe_name
from taskvec.report.texts import percent, short_backbone
from taskvec.report.views import Spread, View

MAP = ListedColormap(matplotlib.colormaps["magma_r"](np.linspace(0, 0.9, 256)), "light to dark")
FULL_SCALE = 100.0  # % of xi at which the colour bar ends: half of the predictions of both tasks have changed
HIGH_ENOUGH = 2.3  # inches of a figure beside which the long label of the colour bar fits
MOST_PANELS = 28  # as many pairs as eight tasks have


class _Panel(NamedTuple):
    """One heatmap: its title, the names of its axes, the grid (%) and the mean in the box."""

    title: str
    first: str
    second: str
    grid: pd.DataFrame
    error: Spread


def heatmaps(heatmap: pd.DataFrame, backbone: str, regime: str) -> Figure:
    """Draw the disentanglement error xi (%) over two scales, a panel for each pair of tasks and their mean."""
    rows = heatmap[(heatmap["backbone"] == backbone) & (heatmap["regime"] == regime)]
    if rows.empty:
        known = heatmap[["backbone", "regime"]].drop_duplicates().agg(", ".join, axis=1)
        raise unknown("backbone and regime", f"{backbone}, {regime}", known)
    pairs = [([str(task) for task in tasks], part) for tasks, part in rows.groupby(["task_1", "task_2"], sort=False)]  # type: ignore[attr-defined]
    panels = [_panel("mean of the pairs", rows)] if len(pairs) > 1 else []
    for tasks, part in pairs[:MOST_PANELS]:
        first, second = (safe_name(task, 16) for task in tasks)
        panels.append(_panel(f"{first} + {second}", part, first, second))
    left_out = f" ({MOST_PANELS} of {len(pairs)} pairs shown)" if len(pairs) > MOST_PANELS else ""
    named = safe_name(short_backbone(backbone), 56 if panels[1:] else 26) + f", {safe_name(regime, 24)}{left_out}"
    return _draw_panels(panels, named, sampling_text(rows))


def by_backbone(heatmap: pd.DataFrame, backbones: Sequence[str], regime: str, what: str) -> Figure:
    """Draw the paper's Figure 1: the mean over pairs of tasks, a panel for each backbone on one scale of colours."""
    rows = {backbone: error_rows(heatmap, backbone, regime) for backbone in backbones}
    panels = [_panel(safe_name(short_backbone(backbone), 24), part) for backbone, part in rows.items()]
    counts = sorted({len(part[["task_1", "task_2"]].drop_duplicates()) for part in rows.values()})
    pairs = " to ".join(str(count) for count in (counts[0], counts[-1])[: len(counts)])
    named = f"{safe_name(regime, 24)}, {what} (mean of {pairs} pair{'s' * (pairs != '1')} of tasks)"
    return _draw_panels(panels, named, sampling_text(pd.concat(rows.values())))


def _panel(title: str, rows: pd.DataFrame, first: str = "task 1", second: str = "task 2") -> _Panel:
    backbone, regime = rows[["backbone", "regime"]].iloc[0]
    return _Panel(title, first, second, _grid(rows), box_error(rows, backbone, regime))


def _draw_panels(panels: list[_Panel], named: str, below: str) -> Figure:
    """Draw panels side by side, four a row at most, with one colour bar, and a line below them where there is one."""
    lines = math.ceil(len(panels) / 4)
    columns = math.ceil(len(panels) / lines)
    side = (WIDTH - 0.7) / max(columns, 2)
    with matplotlib.rc_context(STYLE):
        size = (side * columns + 0.7, (side + 0.2) * lines + (0.3 if columns > 1 else 0.4))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax, panel in zip(axes, panels, strict=False):
            mesh = _draw_panel(ax, panel)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        label = "weight disentanglement error ξ (%)" if size[1] > HIGH_ENOUGH else "error ξ (%)"
        figure.colorbar(mesh, ax=list(axes), label=label, extend="max", **_bar(lines, side))
        figure.suptitle(named, x=0.01, ha="left")
        if below:
            figure.supxlabel(below, x=0.01, ha="left", size=7)
    return figure


def _grid(rows: pd.DataFrame) -> pd.DataFrame:
    """Arrange xi (%) with scale_2 down the rows and scale_1 along the columns."""
    xi = rows.assign(xi=100 * (rows["error_1"] + rows["error_2"]))
    return xi.pivot_table(index="scale_2", columns="scale_1", values="xi", aggfunc="mean")


def _draw_panel(ax: Axes, panel: _Panel) -> Any:
    """Draw one heatmap: light where the weights are disentangled, the search space boxed, a star at the pre-trained."""
    grid = panel.grid
    mesh = ax.pcolormesh(
        _edges(grid.columns.to_numpy(float)), _edges(grid.index.to_numpy(float)), grid.to_numpy(float),
        cmap=MAP, vmin=0, vmax=FULL_SCALE, edgecolors="face", linewidth=0.1,
    )  # fmt: skip
    for colour, width in (("white", 2.4), ("#E00000", 1.3)):
        ax.add_patch(Rectangle((-BOX, -BOX), 2 * BOX, 2 * BOX, fill=False, edgecolor=colour, linewidth=width))
    ax.plot(0, 0, marker="*", ms=7, color=BLACK, mec="white", mew=0.6)
    ax.set_aspect("equal")
    ax.set_title(panel.title, pad=13, weight="bold", size=7.5)
    ax.text(0, 1.025, f"ξ in the box {percent(panel.error)} %", transform=ax.transAxes, fontsize=7)
    ax.set_xlabel(f"λ of {panel.first}", fontsize=7.5)
    ax.set_ylabel(f"λ of {panel.second}", fontsize=7.5)
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


# ---------------------------------------------------------------- the kinds of figures


def _plan_heatmap(run: Run, view: View) -> Draw | None:
    if run.heatmap is None or error_rows(run.heatmap, view.backbone, view.regime).empty:
        return None
    return partial(heatmaps, run.heatmap, view.backbone, view.regime)


def _by_group(name: str, title: str, paper: dict[str, int]) -> FigureType[str]:
    """Return the kind of figure that compares one group of backbones; all of them where no other can be drawn."""

    def plan(run: Run, regime: str) -> Draw | None:
        if run.heatmap is None:
            return None
        measured = set(run.heatmap.loc[run.heatmap["regime"] == regime, "backbone"])
        groups = {group.name: backbones for group in run.compared.values() if (backbones := among(group, measured))}
        if name not in groups or (name == "all" and len(groups) > 1):
            return None
        return partial(by_backbone, run.heatmap, groups[name], regime, run.compared[name].what)

    return FigureType(
        f"heatmaps-{name}",
        title,
        "Each point adds the vectors of two tasks with the coefficients on the axes, and shows the mean over pairs of "
        "tasks, on one scale of colours. Light means that the sum answers as each single vector would alone. The red "
        "box is the space from -1 to 1, the star the pre-trained encoder.",
        plan,
        paper=paper,
    )


HEATMAPS = (
    _by_group("algorithm", "Weight disentanglement by pre-training algorithm.", {"aligned": 1, "full": 5}),
    _by_group("data", "Weight disentanglement by size of the pre-training data.", {"aligned": 3}),
    _by_group("scale", "Weight disentanglement by model scale.", {"aligned": 4}),
    _by_group("all", "Weight disentanglement of every backbone.", {}),
)
HEATMAP = FigureType(
    "heatmap",
    "How well two task vectors get along (as in the paper's Figure 1).",
    "Each point adds two vectors with the coefficients on the axes. Light means that the sum answers as each "
    "single vector would alone, dark that it does not. The star is the pre-trained encoder, the red box the search "
    "space from -1 to 1. The error ξ adds two shares of changed predictions, so it reaches 200 %; colours end at "
    "100 %.",
    _plan_heatmap,
)
