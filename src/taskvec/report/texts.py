"""How names and numbers are written: percent, points, scales; Markdown and LaTeX with everything escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import pandas as pd
from rich.cells import cell_len

from taskvec.core.notes import printable
from taskvec.merging.variants import ADDED, Variant
from taskvec.report.views import METRICS, Gain, Method, Spread, View

MISSING = "–"
DIFFERENCES = {"surgery": "surgery", "reestimated": "batch norm re-estimated", "per-task": "λ per task"}
"""What readers are told of a merge that differs from the plain one."""
NAMES = (
    "Backbone", "Regime", "Method", "Task", "Metric", "Model", "Claim", "Paper", "Measured", "Interval", "Verdict",
    "Checkpoint", "Layer",
)  # fmt: skip
LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{
        letter: f"{{{letter}}}" for letter in "[]*"
    },  # a row that begins with one would give it to the line break before
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
    """Put a user's name on one line, its control characters as escapes."""
    return printable(" ".join(str(text).split()))


def short_backbone(address: str) -> str:
    """Shorten an address for reading: of a file after @ only its name stays."""
    name, at, file = address.partition("@")
    return one_line(name + at + re.split(r"[\\/]", file)[-1])


def method_label(method: Method) -> str:
    """Call the paper's method addition, as its tables do, and every other by its name; what differs stands behind."""
    variant = method if isinstance(method, Variant) else Variant(method)
    name = "addition" if variant.method == ADDED.method else one_line(variant.method)
    return ", ".join([name, *(DIFFERENCES[value] for value in variant.differences.values())])


def metric_label(view: View, task: str) -> str:
    """Name the metric of a task where tasks differ in kind, else nothing needs to be said."""
    return METRICS[view.metrics[task]] if view.mixed and task in view.metrics else MISSING


def shown(all_views: Sequence[View]) -> str:
    """Say over tables what their numbers are, and of how many tasks where that differs."""
    metrics = {view.metric for view in all_views}
    if len(metrics) == 1 and metrics != {""}:
        counts = {view.regime: len(view.tasks) for view in all_views}
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


def gain_text(gain: Gain) -> str:
    """Write a gain with its sign, its spread over seeds and its interval."""
    if math.isnan(gain.mean):
        return MISSING
    spread = "" if math.isnan(gain.sd) else f" ± {points(gain.sd)}"
    ends = "" if math.isnan(gain.low) else f" ({points(gain.low)} to {points(gain.high)})"
    return points(gain.mean, "+") + spread + ends


def seconds_text(seconds: float) -> str:
    """Write seconds with about two digits."""
    if math.isnan(seconds):
        return MISSING
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:,.0f}"


def measured(frame: pd.DataFrame, smoke: bool) -> pd.DataFrame:
    """Leave out of a trial run's table what compares one number with another: normalised values and gains."""
    return frame[[name for name in frame.columns if not smoke or not re.search("normalised|gain", name, re.IGNORECASE)]]


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


# ---------------------------------------------------------------- tables of plain text

GAP = "  "
SHORTEST = 12
"""Characters of a name that stay in a table that is too wide."""


def shorten(text: str, width: int) -> str:
    """Cut the middle out of text that is wider than ``width`` columns of a terminal."""
    if cell_len(text) <= width:
        return text
    tail = max(0, width - 1) // 3
    head = text
    while head and cell_len(head) + 1 + cell_len(text[len(text) - tail :]) > width:
        head = head[:-1]
    return head + "…" + text[len(text) - tail :]


def text_table(frame: pd.DataFrame, width: int) -> str:
    """Write a table for a terminal of ``width`` columns; what is too wide loses columns by rule, and no word breaks."""
    for less in REDUCTIONS if frame.columns.is_unique else ():
        if table_width(frame) > width:
            frame = less(frame)
    return "\n\n".join(_draw(block) for block in _blocks(_with_short_names(frame, width), width))


def table_width(frame: pd.DataFrame) -> int:
    """Return the columns of a terminal that a table takes."""
    return max(map(cell_len, _draw(frame).splitlines()), default=0)


def _without(pattern: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Return what leaves out the columns whose names match."""
    return lambda frame: frame[[name for name in frame.columns if not re.search(pattern, name)]]


def _only(pattern: str, heading: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Return what keeps of every number what comes before a match, and leaves that out of its heading."""

    def less(frame: pd.DataFrame) -> pd.DataFrame:
        numbers = [name for name in frame.columns if name not in NAMES]
        cut = frame.assign(**{name: frame[name].map(lambda cell: re.split(pattern, cell)[0]) for name in numbers})
        return cut.rename(columns=lambda name: re.sub(heading, "", name))

    return less


REDUCTIONS = (
    _only(r" \(", r" \(95 % interval\)"),  # a gain without its interval, which the page has
    _without("^(Kept|Re-probed) heads: normalised"),
    _only(" ±", "$^"),
    _without("λ|ξ"),
    _without("^Normalised|^Zero-shot|^Joint|^Metric"),
)
"""What a table that is too wide does without, in this order."""


def _with_short_names(frame: pd.DataFrame, width: int) -> pd.DataFrame:
    """Shorten the names in the cells, and then in the headings, of a table that is too wide."""
    for place, name in enumerate(frame.columns):
        over = table_width(frame) - width
        if over > 0 and name in NAMES:
            longest = max(map(cell_len, frame.iloc[:, place]), default=0)
            frame = frame.copy()
            frame.isetitem(place, [shorten(cell, max(SHORTEST, longest - over)) for cell in frame.iloc[:, place]])
    if table_width(frame) > width:
        frame = frame.set_axis([shorten(name, SHORTEST + len(_head(name)[0])) for name in frame.columns], axis=1)
    return frame


def _blocks(frame: pd.DataFrame, width: int) -> Iterator[pd.DataFrame]:
    """Split a table that is still too wide into several below each other, the first column in each."""
    start = 1
    while start < frame.shape[1] or start == 1:
        stop = frame.shape[1]
        while stop > start + 1 and table_width(frame.iloc[:, [0, *range(start, stop)]]) > width:
            stop -= 1
        yield frame.iloc[:, [0, *range(start, stop)]]
        start = stop if stop > start else start + 1


def _head(name: str) -> tuple[str, str]:
    """Split a heading into the group of its column, empty for none, and its own name."""
    group, _, own = name.rpartition(": ")
    return group, own


def _draw(frame: pd.DataFrame) -> str:
    """Write a table in columns, names to the left and numbers to the right, groups once over their columns."""
    heads = [_head(str(name)) for name in frame.columns]
    cells = [[own, *map(str, frame.iloc[:, place])] for place, (_, own) in enumerate(heads)]
    widths = [max(map(cell_len, column)) for column in cells]
    over = []
    for group, same in groupby(range(len(heads)), lambda place: heads[place][0]):
        first, *others = same
        beside = sum(len(GAP) + widths[place] for place in others)
        widths[first] = max(widths[first], cell_len(group) - beside)
        over.append(_pad(group, widths[first] + beside))
    columns = zip(cells, widths, heads, strict=True)
    padded = [[_pad(cell, width, own in NAMES) for cell in column] for column, width, (_, own) in columns]
    lines = [over] if any(group for group, _ in heads) else []
    return "\n".join(GAP.join(line).rstrip() for line in [*lines, *map(list, zip(*padded, strict=True))])


def _pad(text: str, width: int, left: bool = False) -> str:
    room = " " * (width - cell_len(text))
    return text + room if left else room + text
