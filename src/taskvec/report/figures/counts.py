"""The paper's Figures 6 to 9: accuracy, and the disentanglement error, against the number of merged tasks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from taskvec.core.errors import unknown
from taskvec.paper.numbers import FIGURE_6
from taskvec.report.figures.registry import Draw, FigureType, Run, among
from taskvec.report.figures.style import BLUE, STYLE, WIDTH, legend, line_styles, safe_name
from taskvec.report.texts import short_backbone
from taskvec.report.views import task_sets

ACCURACIES = {"accuracy": "test accuracy (%)", "normalised_accuracy": "normalised test accuracy (%)"}
OF_KINDS = {"normalised_accuracy": "normalised test metric (%)"}  # where tasks differ in kind
ERROR = {"disentanglement_error": "disentanglement error ξ (%)"}


def combinations(results: pd.DataFrame, backbone: str, regime: str) -> Figure:
    """Draw the paper's Figure 6: every combination of tasks a dot, the mean by their number a line."""
    sets = task_sets(results, backbone, regime)
    if sets.empty:
        raise unknown("backbone and regime with sets of tasks", f"{backbone}, {regime}", with_sets(results, regime))
    measures = _measures([sets])
    figure, axes = _axes(list(measures.values()))
    for ax, metric in zip(axes, measures, strict=True):
        ax.plot(sets["size"], 100 * sets[metric], "o", color=BLUE, alpha=0.35, ms=4, mew=0, label="one set of tasks")
        _mean_line(ax, sets, metric, "mean", {"color": BLUE})
    named = f"{safe_name(short_backbone(backbone), 56)}, {safe_name(regime, 24)}, addition of some of the tasks"
    return _finish(figure, axes, named)


def by_count(results: pd.DataFrame, backbones: Sequence[str], regime: str, what: str) -> Figure:
    """Draw the paper's Figures 7 to 9: mean accuracy by the number of tasks, a line for each backbone."""
    measures = _measures([task_sets(results, backbone, regime) for backbone in backbones])
    return _lines(results, backbones, regime, what, measures)


def error_by_count(results: pd.DataFrame, backbones: Sequence[str], regime: str, what: str) -> Figure:
    """Draw the mean disentanglement error in the box by the number of tasks, a line for each backbone."""
    return _lines(results, backbones, regime, what, ERROR)


def with_sets(results: pd.DataFrame, regime: str, metrics: Sequence[str] = tuple(ACCURACIES)) -> list[str]:
    """Name the backbones of which one of the metrics was measured on sets of at least two sizes."""
    rows = results[(results["regime"] == regime) & (results["split"] == "test") & (results["task"] == "")]
    sets_of = {str(name): task_sets(rows, str(name), regime) for name in rows["backbone"].unique()}
    measured = {name: sets.loc[sets[list(metrics)].notna().any(axis=1), "size"] for name, sets in sets_of.items()}
    return [name for name, sizes in measured.items() if sizes.nunique() > 1]


def _measures(tables: Sequence[pd.DataFrame]) -> dict[str, str]:
    """Choose the panels: where tasks differ in kind there is no accuracy."""
    return ACCURACIES if any(sets["accuracy"].notna().any() for sets in tables) else OF_KINDS


def _lines(results: pd.DataFrame, backbones: Sequence[str], regime: str, what: str, metrics: dict[str, str]) -> Figure:
    figure, axes = _axes(list(metrics.values()))
    styles = line_styles(results)
    for backbone in backbones:
        sets = task_sets(results, backbone, regime)
        for ax, metric in zip(axes, metrics, strict=True):
            _mean_line(ax, sets, metric, safe_name(short_backbone(backbone), 44), styles[backbone])
    return _finish(figure, axes, f"{safe_name(regime, 24)}, {what} (mean over sets of tasks)")


def _axes(labels: list[str]) -> tuple[Figure, list[Axes]]:
    """Lay out one panel for each measure; a single one is two thirds of the page wide."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH if labels[1:] else WIDTH * 2 / 3, 3.1), layout="constrained")
        axes = list(figure.subplots(1, len(labels), squeeze=False)[0])
    for ax, label in zip(axes, labels, strict=True):
        ax.set_xlabel("number of merged tasks")
        ax.set_ylabel(label)
        ax.grid(axis="y")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _mean_line(ax: Axes, sets: pd.DataFrame, metric: str, label: str, style: dict[str, Any]) -> None:
    """Draw the mean over sets of one size."""
    means = 100 * sets.dropna(subset=[metric]).groupby("size")[metric].mean()
    with matplotlib.rc_context(STYLE):
        ax.plot(means.index.to_numpy(int), means.to_numpy(float), label=label, mec="white", mew=0.3, **style)


def _finish(figure: Figure, axes: list[Axes], named: str) -> Figure:
    """Add legend and title."""
    with matplotlib.rc_context(STYLE):
        legend(figure, axes[0])
        figure.suptitle(named, x=0.01, ha="left")
    return figure


# ---------------------------------------------------------------- the kinds of figures

_READING = "Every line is the mean over the sets of tasks of one size, each with the λ that validation chose for it."


def _plan_combinations(run: Run, regime: str) -> Draw | None:
    measured = with_sets(run.results, regime)
    if not measured:
        return None
    backbone = next((name for name in measured if run.roles.get(name) == FIGURE_6), measured[0])
    return partial(combinations, run.results, backbone, regime)


def _plan_errors(run: Run, regime: str) -> Draw | None:
    erring = with_sets(run.results, regime, ["disentanglement_error"])
    return partial(error_by_count, run.results, erring, regime, "all backbones") if erring else None


def _by_group(name: str, title: str, figure: int) -> FigureType[str]:
    """Return the kind of figure that compares one group of backbones, a line for each."""

    def plan(run: Run, regime: str) -> Draw | None:
        group = run.compared[name]
        backbones = among(group, with_sets(run.results, regime))
        return partial(by_count, run.results, backbones, regime, group.what) if backbones else None

    return FigureType(
        f"counts-{name}",
        title,
        f"{_READING} Normalised divides by the accuracy of the fine-tuned encoders.",
        plan,
        mixed_reading=f"{_READING} Every task's own metric is divided by that of its fine-tuned encoder.",
        paper={"full": figure},
    )


_DOTS = "Every dot is one set of tasks with the λ that validation chose for it, the line their mean."
COMBINATIONS = FigureType(
    "combinations",
    "Accuracy against the number of merged tasks.",
    f"{_DOTS} Left: test accuracy. Right: divided by the accuracy of the fine-tuned encoders.",
    _plan_combinations,
    mixed_title="The normalised metric against the number of merged tasks.",
    mixed_reading=f"{_DOTS} Every task's own metric is divided by that of its fine-tuned encoder.",
    paper={"full": 6},
)
COUNTS = (
    _by_group("all", "Every backbone against the number of merged tasks.", 7),
    _by_group("data", "Size of the pre-training data against the number of merged tasks.", 8),
    _by_group("scale", "Model scale against the number of merged tasks.", 9),
)
ERRORS = FigureType(
    "errors",
    "Weight disentanglement error against the number of merged tasks.",
    "The mean over random points of the box from -1 to 1 and over sets of one size; for two tasks it is the ξ of "
    "the paper, and in general twice the mean share of changed predictions. Lower is better.",
    _plan_errors,
)
