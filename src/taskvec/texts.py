"""How names and numbers are written: percent, points, scales; Markdown and LaTeX with everything escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pandas as pd

from taskvec.merging import ADDITION, PER_TASK, REESTIMATED, SURGERY
from taskvec.views import METRICS, Gained, Spread, View

MISSING = "–"
LABELS = {ADDITION: "addition", PER_TASK: "addition, λ per task"}
SUFFIXES = {REESTIMATED: ", batch norm re-estimated", SURGERY: ", surgery"}
NAMES = (
    "Backbone", "Regime", "Method", "Task", "Metric", "Model", "Claim", "Paper", "Measured", "Interval", "Verdict",
    "Checkpoint", "Layer",
)  # fmt: skip
LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "λ": r"$\lambda$",
    "ξ": r"$\xi$",
    "±": r"$\pm$",
    "–": "--",
}


def one_line(text: str) -> str:
    """Put a user's name on one line."""
    return " ".join(str(text).split())


def short_backbone(address: str) -> str:
    """Shorten an address for reading: of a file after @ only its name stays."""
    name, at, file = address.partition("@")
    return one_line(name + at + re.split(r"[\\/]", file)[-1])


def method_label(method: str) -> str:
    """Call the paper's method addition, as its tables do, and every other by its name."""
    base = method.removesuffix(REESTIMATED).removesuffix(SURGERY)
    return (LABELS.get(base) or one_line(base)) + SUFFIXES.get(method.removeprefix(base), "")


def metric_label(one: View, task: str) -> str:
    """Name the metric of a task where tasks differ in kind, else nothing needs to be said."""
    return METRICS[one.metrics[task]] if one.mixed and task in one.metrics else MISSING


def shown(found: Sequence[View]) -> str:
    """Say over tables what their numbers are, and of how many tasks where that differs."""
    metrics = {one.metric for one in found}
    if len(metrics) == 1 and metrics != {""}:
        counts = {one.regime: len(one.tasks) for one in found}
        differ = ", ".join(f"{regime}: {count}" for regime, count in counts.items())
        same = "1 task" if max(counts.values()) == 1 else f"{max(counts.values())} tasks"
        over = f"tasks ({differ})" if len(set(counts.values())) > 1 else same
        return f"Test {METRICS[metrics.pop()]} in %, mean over {over}"
    return "Test split in %; tasks differ in their metric, so only normalised values have a mean, of gains too"


# ---------------------------------------------------------------- numbers


def percent(cell: Spread) -> str:
    """Write a fraction in percent with one decimal, and its spread over seeds where there are several."""
    if math.isnan(cell.mean):
        return MISSING
    return points(cell.mean) + ("" if math.isnan(cell.sd) else f" ± {points(cell.sd)}")


def points(fraction: float, sign: str = "") -> str:
    """Write a fraction as points with one decimal, never as -0.0."""
    return f"{round(100 * fraction, 1) + 0.0:{sign}.1f}"


def scale_text(cell: Spread) -> str:
    """Write the chosen scale, or the range of choices over seeds."""
    low, high = (plain_scale(scale) for scale in (cell.low, cell.high))
    return low if low == high else f"{low} to {high}"


def plain_scale(scale: float) -> str:
    """Write one scale with two decimals, or more where it has more."""
    if math.isnan(scale):
        return MISSING
    return f"{scale:.2f}" if math.isclose(scale, round(scale, 2), abs_tol=1e-9) else f"{scale:.4g}"


def gain_text(gain: Gained) -> str:
    """Write a gain with its sign, its spread over seeds and its interval."""
    if math.isnan(gain.mean):
        return MISSING
    spread = "" if math.isnan(gain.sd) else f" ± {points(gain.sd)}"
    ends = "" if math.isnan(gain.low) else f" ({points(gain.low)} to {points(gain.high)})"
    return points(gain.mean, "+") + spread + ends


# ---------------------------------------------------------------- Markdown and LaTeX


def escape_markdown(text: str) -> str:
    """Escape what Markdown would read as markup; an underscore inside a word is none."""
    return re.sub(r"([\\`*|\[\]<>~$&]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", one_line(text))


def markdown_table(frame: pd.DataFrame, bold: Sequence[int] = ()) -> str:
    """Write a Markdown table that reads well as plain text too, names to the left and numbers to the right."""
    body = [[escape_markdown(cell) for cell in row] for row in frame.itertuples(index=False)]
    for row in bold:
        body[row] = [f"**{cell}**" if cell else "" for cell in body[row]]
    columns = list(zip(frame.columns, *body, strict=True))
    padded = [_column(*column, left=column[0] in NAMES) for column in columns]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in zip(*padded, strict=True))


def _column(head: str, *cells: str, left: bool) -> list[str]:
    """Pad the cells of one column to one width and put the rule that aligns them under its heading."""
    width = max(4, *(len(cell) for cell in (head, *cells)))
    rule = "-" * width if left else "-" * (width - 1) + ":"
    return [cell.ljust(width) if left else cell.rjust(width) for cell in (head, rule, *cells)]


def escape_latex(text: str) -> str:
    """Escape what LaTeX would read as a command, and write Greek letters and signs as mathematics."""
    return "".join(LATEX.get(letter, letter) for letter in one_line(text))
