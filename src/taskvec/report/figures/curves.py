"""The paper's Figure 2: normalised accuracy on validation against the scaling coefficient."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from taskvec.core.errors import unknown
from taskvec.learning.head_modes import HEADS
from taskvec.report.figures.registry import Draw, FigureType, Run, of_view
from taskvec.report.figures.style import (
    BLACK,
    GREEN,
    HEAD_COLOUR,
    HEAD_MARKER,
    STYLE,
    WIDTH,
    chosen_rings,
    heading,
    legend,
    line_style,
    line_styles,
    merged_by,
    safe_name,
)
from taskvec.report.texts import method_label, scale_text, short_backbone
from taskvec.report.views import Method, View, find_view, line_search, views


def lambda_curve(results: pd.DataFrame, backbone: str, regime: str, method: Method = "") -> Figure:
    """Draw the paper's Figure 2 for one method: the normalised metric (%) on validation by lambda, and a close-up."""
    view = find_view(results, backbone, regime)
    method = merged_by(view, method)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        whole, close = figure.subplots(1, 2)
        for ax in (whole, close):
            _draw_levels(ax, view)
            for heads in view.heads:
                label = f"{HEADS[heads]} (λ = {scale_text(view.result(method, heads))})"
                style = {"color": HEAD_COLOUR[heads], "marker": HEAD_MARKER[heads]}
                _draw_curve(ax, line_search(view, method, heads), label, style)
            _label_curve(ax, _metric([view]))
            _say_if_empty(ax, _metric([view]))
        whole.set_title("every λ tried")
        close.set_title("close-up of the top")
        close.set_ylabel("")
        close.set_ylim(*_close_up(view, method))
        legend(figure, whole)
        figure.suptitle(heading(view, method), x=0.01, ha="left")
    return figure


def lambda_methods(results: pd.DataFrame, backbone: str, regime: str) -> Figure:
    """Draw the normalised metric (%) on validation against lambda for all methods, kept heads beside re-probed."""
    view = find_view(results, backbone, regime)
    curves = [_Line(method_label(method), view, method, line_style(i)) for i, method in enumerate(view.methods)]
    return _by_heads(curves, view.heads, heading(view), lambda ax: _draw_levels(ax, view))


def lambda_curves(results: pd.DataFrame, regime: str) -> Figure:
    """Draw the paper's Figure 2: the normalised metric (%) of addition against lambda, a line for each backbone."""
    merged = [view for view in views(results) if view.regime == regime and view.methods]
    if not merged:
        raise unknown("regime", regime, (view.regime for view in views(results)))
    styles = line_styles(results)
    curves = [_Line(short_backbone(view.backbone), view, merged_by(view, ""), styles[view.backbone]) for view in merged]
    heads = [head for head in HEADS if any(head in view.heads for view in merged)]
    named = " / ".join(dict.fromkeys(method_label(line.method) for line in curves))
    return _by_heads(curves, heads, f"{safe_name(regime, 30)}, {named}", _draw_fine_tuned)


class _Line(NamedTuple):
    """One line of a figure: its label, whose line search it is, and its style."""

    label: str
    view: View
    method: Method
    style: dict[str, Any]


def _by_heads(curves: list[_Line], heads: list[str], heading: str, levels: Callable[[Axes], object]) -> Figure:
    """Draw one panel for each kind of heads, with a line for each entry, told apart by colour, marker and dashes."""
    metric = _metric([line.view for line in curves])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = figure.subplots(1, len(heads), sharey=True, squeeze=False)[0]
        for ax, head in zip(axes, heads, strict=True):
            levels(ax)
            for line in curves:
                _draw_curve(ax, line_search(line.view, line.method, head), safe_name(line.label, 44), line.style)
            _label_curve(ax, metric)
            ax.set_title(HEADS[head])
            ax.label_outer()
            _say_if_empty(ax, metric)
        legend(figure, axes[0])
        figure.suptitle(heading, x=0.01, ha="left")
    return figure


def _draw_curve(ax: Axes, curve: pd.DataFrame, label: str, style: dict[str, Any]) -> None:
    """Draw a line with markers, a band of one standard deviation over seeds, and a ring around the chosen scale."""
    scale, mean, sd = (curve[name].to_numpy(float) for name in ("scale", "mean", "std"))
    ax.plot(scale, mean, label=label, mec="white", mew=0.3, **style)
    if sd.any():
        ax.fill_between(scale, mean - sd, mean + sd, color=style["color"], alpha=0.18, lw=0)
    at = curve["chosen"].to_numpy(bool)
    ax.plot(scale[at], mean[at], "o", ms=8, mfc="none", mec=style["color"], mew=1.3, gid="chosen", zorder=5)


def _draw_levels(ax: Axes, view: View) -> None:
    """Draw what a merge is compared with: fine-tuned at 100 % and probing."""
    _draw_fine_tuned(ax)
    level = _probing_level(view)
    if not math.isnan(level):
        ax.axhline(level, color=BLACK, linestyle=(0, (4, 2)), linewidth=1.2, label=f"probing ({level:.1f})")


def _draw_fine_tuned(ax: Axes) -> None:
    ax.axhline(100, color=GREEN, linewidth=1.2, label="fine-tuned (= 100)")


def _probing_level(view: View) -> float:
    """Take the normalised metric (%) of probing on validation, mean over tasks and seeds."""
    rows = view.of("probing", "kept")
    rows = rows[(rows["split"] == "validation") & (rows["task"] == "")]
    return 100 * float(rows.loc[rows["metric"] == view.normalised, "value"].mean())


def _close_up(view: View, method: Method) -> tuple[float, float]:
    """Choose the range of the close-up (%): from a little below probing to a little above the best."""
    tops = [float(line_search(view, method, heads)["mean"].max()) for heads in view.heads]
    known = [value for value in (_probing_level(view), 100.0, *tops) if not math.isnan(value)]
    low, high = min(known), max(known)
    pad = max(1.0, 0.25 * (high - low))
    return low - pad, high + pad / 2


def _metric(all_views: list[View]) -> str:
    """Call what is normalised: accuracy, or metric where tasks differ in kind."""
    return "metric" if any(view.mixed for view in all_views) else "accuracy"


def _label_curve(ax: Axes, metric: str) -> None:
    ax.set_xlabel("scaling coefficient λ")
    ax.set_ylabel(f"normalised {metric} on validation (%)")
    ax.grid(axis="y")
    ax.margins(x=0.03)


def _say_if_empty(ax: Axes, metric: str) -> None:
    """Say why there is no curve: nothing can be divided by a fine-tuned value of zero, as in a run of two steps."""
    if not chosen_rings(ax):
        text = f"no normalised {metric}:\na fine-tuned {metric} is zero"
        ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center")


# ---------------------------------------------------------------- the kinds of figures


def _plan_backbones(run: Run, regime: str) -> Draw | None:
    several = sum(view.regime == regime for view in run.views) > 1
    return partial(lambda_curves, run.results, regime) if several else None


def _plan_methods(run: Run, view: View) -> Draw | None:
    searched = [method for method in view.methods if not method.scaling]
    return of_view(lambda_methods)(run, view) if searched[1:] else None


BACKBONES = FigureType(
    "backbones",
    "The line search of every backbone.",
    "A curve that falls from the start means that the task vectors of that backbone only disturb each other. Rings "
    "mark the λ chosen on validation.",
    _plan_backbones,
    paper={"aligned": 2},
)
_READING = (
    "At λ = 0 nothing is added: in the aligned regime, kept heads are then linear probing. Above the dashed line "
    "the merge beats probing;"
)
LAMBDA = FigureType(
    "lambda",
    "How far to go along the task vectors (as in the paper's Figure 2).",
    f"{_READING} 100 is the accuracy of the fine-tuned encoders. Rings mark the λ chosen on validation.",
    of_view(lambda_curve),
    mixed_reading=f"{_READING} 100 is what the fine-tuned encoders reach. Rings mark the λ chosen on validation.",
)
LAMBDAS = FigureType(
    "lambdas",
    "The line search of every method.",
    "Each method builds its vectors in its own way and λ scales them, so compare how high the curves get and not "
    "where they peak. Rings mark the λ chosen on validation.",
    _plan_methods,
)
