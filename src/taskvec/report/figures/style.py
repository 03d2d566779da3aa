"""What all figures share: colours, type, legends, and names that are safe to draw."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D

from taskvec.merging.recipes import ADDITION
from taskvec.merging.variants import Variant
from taskvec.report.texts import method_label, one_line, short_backbone
from taskvec.report.views import Method, View, known_method

# Okabe and Ito's colour-blind-safe palette; its yellow is left out, too faint for lines on white.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY, WINE, OLIVE, BROWN = "#7F7F7F", "#882255", "#999933", "#8C564B"  # two of Tol's, and two between them
CYCLE = (BLUE, VERMILLION, PURPLE, ORANGE, SKY, WINE, OLIVE, GREY, BROWN)  # without those of probing and fine-tuned
WIDE_CYCLE = (*CYCLE[:5], BLACK, GREY, WINE, OLIVE, BROWN)  # for figures in which probing has no line
HEAD_COLOUR = {"kept": BLUE, "reprobed": VERMILLION}
HEAD_MARKER = {"kept": "o", "reprobed": "s"}
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.2, 1.2, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SNAPSHOT = re.compile(r"(.+)@(\d+)")
"""The name of an encoder on its way: NAME@STEP."""
WIDTH = 6.4  # inches: at 200 dots an inch, type of 9 points stays legible where a page is 400 pixels wide
CHARACTERS = 12.5
"""How many characters of a legend fit an inch, with room to spare."""
ROW = 0.19
"""Inches that a row of a legend takes."""
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
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
    "legend.handlelength": 3.5,
    "legend.columnspacing": 1.6,
    "figure.titlesize": 10.5,
    "figure.titleweight": "bold",
    "pdf.fonttype": 42,
    "text.usetex": False,
    "axes.unicode_minus": True,
}


# ---------------------------------------------------------------- legends


def chosen_rings(ax: Axes) -> list[Line2D]:
    """Find the rings drawn around chosen scales."""
    return [line for line in ax.get_lines() if line.get_gid() == "chosen" and np.size(line.get_xdata())]


def legend(figure: Figure, ax: Axes) -> None:
    """Put the legend below the panels, with the ring of the chosen scale explained once."""
    handles, labels = ax.get_legend_handles_labels()
    rings = chosen_rings(ax)
    if rings:
        handles, labels = [*handles, rings[0]], [*labels, "chosen on validation"]
    legend_below(figure, handles, labels)


def legend_below(figure: Figure, handles: list[Any], labels: list[str]) -> None:
    """Put a legend below the panels, in as many columns as fit; the figure grows by its rows after the first."""
    columns = legend_columns(labels, figure.get_figwidth())
    figure.set_figheight(figure.get_figheight() + ROW * (math.ceil(len(labels) / max(1, columns)) - 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def legend_columns(labels: list[str], width: float = WIDTH) -> int:
    """Choose as many columns, four at most, as fit on the width of a figure in inches."""
    columns = min(4, len(labels))
    while columns > 1 and _legend_width(labels, columns) > CHARACTERS * width:
        columns -= 1
    return columns


def _legend_width(labels: list[str], columns: int) -> int:
    """Estimate the characters of the longest labels of all columns side by side, each with its mark.

    As matplotlib does, the first columns have one label more where they do not come out even.
    """
    split = np.array_split(np.array(labels), columns)
    return sum(10 + max(map(len, column)) for column in split)


# ---------------------------------------------------------------- names


@cache
def _drawable() -> frozenset[int]:
    """List the characters that the font of the figures can draw."""
    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def safe_name(text: str, longest: int) -> str:
    """Make a user's name safe to draw: one line, no mathematics, known characters, its middle cut when too long."""
    known = _drawable()
    text = "".join(letter if ord(letter) in known else "\N{REPLACEMENT CHARACTER}" for letter in one_line(text))
    if len(text) > longest:
        tail = (longest - 1) // 3
        text = text[: longest - 1 - tail] + "…" + text[-tail:]
    return text.replace("$", r"\$")


def line_styles(results: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Give every backbone of a run its colour, marker and dashes, the same in all figures.

    Snapshots NAME@STEP of one encoder look as it does but for their dashes.
    """
    encoders: dict[str, list[str]] = {}
    for name in map(str, results["backbone"].unique()):
        match = SNAPSHOT.fullmatch(name)
        encoders.setdefault(match[1] if match else name, []).append(name)
    return {
        name: line_style(i, WIDE_CYCLE, place)
        for i, names in enumerate(encoders.values())
        for place, name in enumerate(sorted(names, key=_steps_left))
    }


def _steps_left(name: str) -> float:
    """Order snapshots from the end of pre-training back."""
    match = SNAPSHOT.fullmatch(name)
    return -int(match[2]) if match else -math.inf


def line_style(i: int, colours: tuple[str, ...] = CYCLE, place: int = 0) -> dict[str, Any]:
    """Tell lines apart by colour, marker and dashes; those of one backbone at other places by dashes alone."""
    dashes = DASHES[(i // len(colours) + place) % len(DASHES)]
    return {
        "color": colours[i % len(colours)],
        "marker": MARKERS[(i + i // len(colours)) % len(MARKERS)],
        "linestyle": dashes,
    }


def heading(view: View, method: Method = "") -> str:
    """Name backbone, regime, method and seeds over a figure."""
    seeds = f", mean of {view.seeds} seeds" if view.seeds > 1 else ""
    named = f", {safe_name(method_label(method), 24)}" if method else ""
    return safe_name(short_backbone(view.backbone), 56) + f", {safe_name(view.regime, 24)}{named}{seeds}"


def merged_by(view: View, method: Method) -> Variant:
    """Take the method asked for, or the first there is: the paper's addition where it was run."""
    return known_method(view, method or next(iter(view.methods), ADDITION))
