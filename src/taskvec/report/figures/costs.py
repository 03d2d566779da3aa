"""Accuracy against cost: every option of the leaderboard by what it stores, trains and searches."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from taskvec.learning.head_modes import HEADS
from taskvec.merging.variants import Variant
from taskvec.report.figures.registry import Draw, FigureType, Run
from taskvec.report.figures.style import (
    BLACK,
    GREEN,
    HEAD_COLOUR,
    HEAD_MARKER,
    PURPLE,
    STYLE,
    WIDTH,
    heading,
    legend_below,
    safe_name,
)
from taskvec.report.leaderboard import ALONE, Board, Option, picks
from taskvec.report.texts import method_label
from taskvec.report.views import View

ALONE_STYLE: dict[str, dict[str, Any]] = {
    "probing": {"color": BLACK, "marker": "X"},
    "joint": {"color": PURPLE, "marker": "^"},
    "fine_tuned": {"color": GREEN, "marker": "D"},
}


def cost_panels(board: Board) -> Figure:
    """Draw normalised test accuracy (%) against MB stored, seconds of training, and seconds of merging and search.

    Rings mark what the last line of the leaderboard picks; what merges nothing is a dashed line in the last panel.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes = list(figure.subplots(1, 3, sharey=True, width_ratios=[3, 3, 4]))
        _panel(axes[0], board, lambda option: option.stored / 1e6, "stored (MB)")
        _panel(axes[1], board, lambda option: option.training, "probes and fine-tuning (s)", log=True)
        _panel(
            axes[2],
            board,
            lambda option: option.extra if option.merged else math.nan,
            "merging and search (s)",
            log=True,
        )
        axes[0].set_xlim(left=0)
        axes[0].set_ylabel(f"normalised test {'metric' if board.view.mixed else 'accuracy'} (%)")
        _levels(axes[2], board)
        _name_picks(axes[2], board)
        handles, labels = axes[0].get_legend_handles_labels()
        legend_below(figure, handles, labels)
        figure.suptitle(heading(board.view), x=0.01, ha="left")
    return figure


def _panel(ax: Axes, board: Board, cost: Callable[[Option], float], label: str, log: bool = False) -> None:
    """Draw every option as a dot over one of its costs, and a ring around those picked."""
    for heads in HEADS:
        merges = [option for option in board.options if option.merged and option.heads == heads]
        style = {"color": HEAD_COLOUR[heads], "marker": HEAD_MARKER[heads], "alpha": 0.75}
        _dots(ax, board, merges, cost, f"merged, {HEADS[heads]}", style)
    for method, style in ALONE_STYLE.items():
        _dots(
            ax,
            board,
            [option for option in board.options if option.method == Variant(method)],
            cost,
            ALONE[method],
            style,
        )
    ring = {"color": BLACK, "marker": "o", "markerfacecolor": "none", "markeredgecolor": BLACK, "ms": 9}
    _dots(ax, board, picks(board), cost, "picked", ring)
    if log:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(label)
    ax.margins(y=0.08)
    ax.grid(axis="both")


def _dots(
    ax: Axes, board: Board, options: list[Option], cost: Callable[[Option], float], label: str, style: dict[str, Any]
) -> None:
    if options:
        heights = [100 * board.reached(option).mean for option in options]
        drawn: dict[str, Any] = {"linestyle": "none", "ms": 5, "mew": 0.6} | style
        ax.plot([cost(option) for option in options], heights, label=label, **drawn)


def _levels(ax: Axes, board: Board) -> None:
    """Draw a dashed line at what each option reaches that merges nothing."""
    for method, style in ALONE_STYLE.items():
        if option := board.find(method):
            level = 100 * board.reached(option).mean
            ax.axhline(level, color=style["color"], linestyle=(0, (4, 2)), linewidth=1)


def _name_picks(ax: Axes, board: Board) -> None:
    """Write the method beside each ring, towards the middle of the panel."""
    chosen = picks(board)
    costs = [option.extra for option in board.options if option.merged]
    middle = math.sqrt(min(costs) * max(costs)) if costs and min(costs) > 0 else 0.0
    for option in chosen:
        left = option.extra > middle
        place = (option.extra, 100 * board.reached(option).mean)
        shift: dict[str, Any] = {"xytext": (-7 if left else 7, 5), "ha": "right" if left else "left"}
        ax.annotate(safe_name(method_label(option.method), 20), place, textcoords="offset points", fontsize=7, **shift)


def _plan(run: Run, view: View) -> Draw | None:
    board = run.boards.get((view.backbone, view.regime))
    return partial(cost_panels, board) if board else None


LEADERBOARD = FigureType(
    "leaderboard",
    "Accuracy against cost.",
    "Every dot is one option: a merge with one kind of heads, or what merges nothing. Further up is better, "
    "further left is cheaper. Rings are around what the line below the table picks on validation. Dashed lines "
    "repeat what merges nothing.",
    _plan,
)
