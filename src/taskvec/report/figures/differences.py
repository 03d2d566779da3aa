"""How fine-tuned weights differ from their base: norms by layer, and the cosines between task vectors."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from taskvec.report.figures.style import STYLE, WIDE_CYCLE, WIDTH, legend, line_style, safe_name

MOST_TICKS = 24
"""Names of layers that fit below a panel."""
MOST_NUMBERS = 8
"""Checkpoints up to which cosines are written into their cells."""


def differences(layers: pd.DataFrame, cosines: pd.DataFrame) -> Figure:
    """Draw relative norms by layer, a line a checkpoint, and, of several, the cosines between their task vectors.

    ``layers`` has columns fine_tuned, layer, relative; ``cosines`` first, second, layer ("" for all), cosine.
    """
    whole = cosines[cosines["layer"] == ""]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        axes = figure.subplots(1, 2, squeeze=False, width_ratios=[3, 2])[0] if len(whole) else [figure.subplots()]
        norms(axes[0], layers)
        if len(whole):
            angles(axes[1], whole)
        legend(figure, axes[0])
        figure.suptitle("Fine-tuned weights against their base", x=0.01, ha="left")
    return figure


def norms(ax: Axes, layers: pd.DataFrame) -> None:
    """Draw the norm of each task vector over the base's, layer by layer."""
    names = list(dict.fromkeys(layers["layer"]))
    for i, (label, rows) in enumerate(layers.groupby("fine_tuned", sort=False)):
        values = 100 * rows.set_index("layer")["relative"].reindex(names).to_numpy(float)
        ax.plot(range(len(names)), values, label=safe_name(str(label), 32), **line_style(i, WIDE_CYCLE))
    step = math.ceil(len(names) / MOST_TICKS)
    ax.set_xticks(range(0, len(names), step), [safe_name(name, 24) for name in names[::step]], rotation=90, fontsize=6)
    ax.set_ylim(bottom=0)
    ax.grid(axis="y")
    ax.set_ylabel("norm of the task vector\n(% of the base's)")
    ax.set_title("by layer")


def angles(ax: Axes, whole: pd.DataFrame) -> None:
    """Draw the matrix of cosines, with its numbers where there is room."""
    names = list(dict.fromkeys([*whole["first"], *whole["second"]]))
    places = {name: place for place, name in enumerate(names)}
    matrix = np.eye(len(names))
    for row in whole.itertuples():
        i, j = places[str(row.first)], places[str(row.second)]
        matrix[i, j] = matrix[j, i] = float(str(row.cosine))
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    if len(names) <= MOST_NUMBERS:
        for (i, j), value in np.ndenumerate(matrix):
            ax.text(
                j,
                i,
                f"{round(value, 2) + 0.0:.2f}",
                ha="center",
                va="center",
                fontsize=6,
                color="w" if abs(value) > 0.6 else "k",
            )
    short = [safe_name(name, 18) for name in names]
    ax.set_xticks(range(len(names)), short, rotation=90, fontsize=6)
    ax.set_yticks(range(len(names)), short, fontsize=6)
    ax.spines[:].set_visible(False)
    ax.set_title("cosine")
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
