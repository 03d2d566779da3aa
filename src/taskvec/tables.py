"""Metric rows in, Markdown tables out: the paper's Table 1, the same for every task, and the verdict on top."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import pandas as pd

from taskvec.errors import TaskvecError, unknown

ADDITION = "task_arithmetic"
BASELINES = ("probing", "fine_tuned", "joint")
HEADS = {"kept": "kept heads", "reprobed": "re-probed heads"}
MISSING = "–"
BOX = 1.0  # half the width of the red box of the paper's Figure 1
NEEDED = ("backbone", "regime", "seed", "tasks", "method", "heads", "scale", "task", "split", "metric", "value")
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
DEFINITIONS = (
    "Accuracies are percentages of the test images classified correctly; the mean gives every task the same weight.",
    "*Probing* is a linear head on the frozen encoder; *fine-tuned* is one encoder for each task, the mark to reach.",
    "*Normalised* is the mean over tasks of accuracy / fine-tuned accuracy on the same split (the paper's equation 1).",
    "*Kept heads* are those fitted to the frozen encoder; *re-probed heads* are fitted again to the merged encoder.",
    "*Gain* is in accuracy points over probing; its 95 % interval is a paired bootstrap over the test images.",
    "λ scales the merged task vectors. It was chosen by normalised accuracy on validation; only the chosen λ saw the "
    "test split.",
)
JOINT = "*Joint* is one encoder fine-tuned on all tasks at once."
OVER_SEEDS = "a ± b is mean ± standard deviation over seeds; the ends of an interval are means over seeds."
IN_THE_BOX = (
    "ξ is the weight disentanglement error in % (0 to 200: the shares of changed predictions of two tasks, added), "
    "its mean over the box -1 ≤ λ₁, λ₂ ≤ 1 and over pairs of tasks; lower is better (the paper's Figure 1)."
)


class Cell(NamedTuple):
    """One number over seeds: mean, standard deviation (NaN for one seed), seeds, smallest and largest scale."""

    mean: float
    sd: float = math.nan
    seeds: int = 0
    low: float = math.nan
    high: float = math.nan


NOTHING = Cell(math.nan)


@dataclass(frozen=True)
class View:
    """The rows of one backbone in one regime, on the largest set of tasks that was merged there."""

    backbone: str
    regime: str
    rows: pd.DataFrame

    @cached_property
    def _cells(self) -> dict[tuple[str, str, str, str], Cell]:
        """Take mean and spread over seeds of every (method, heads, metric, task) on the test split."""
        test = self.rows[self.rows["split"] == "test"]
        grouped = test.groupby(["method", "heads", "metric", "task"], sort=False).agg(
            mean=("value", "mean"),
            sd=("value", "std"),
            seeds=("seed", "nunique"),
            low=("scale", "min"),
            high=("scale", "max"),
        )
        values = (Cell(*row) for row in grouped.itertuples(index=False))
        return {cast("tuple[str, str, str, str]", key): cell for key, cell in zip(grouped.index, values, strict=True)}

    def cell(self, method: str, heads: str = "kept", metric: str = "accuracy", task: str = "") -> Cell:
        """Look up a number of the test split as a fraction; an empty task is the mean over tasks."""
        return self._cells.get((method, heads, metric, task), NOTHING)

    @cached_property
    def validation(self) -> dict[str, float]:
        """Score each method by the best mean normalised accuracy on validation, over seeds, of its better heads."""
        rows = self.rows[(self.rows["split"] == "validation") & (self.rows["task"] == "")]
        rows = rows[rows["metric"] == "normalised_accuracy"]
        best = rows.groupby(["method", "heads", "seed"])["value"].max().groupby(["method", "heads"]).mean()
        return {str(method): float(value) for method, value in best.groupby("method").max().items()}

    @cached_property
    def tasks(self) -> list[str]:
        """Name the tasks in the order of the rows."""
        return [task for task in _unique(self.rows["task"]) if task]

    @cached_property
    def methods(self) -> list[str]:
        """Name the merging methods, the paper's addition first."""
        found = [method for method in _unique(self.rows["method"]) if method not in BASELINES]
        return sorted(found, key=lambda method: method != ADDITION)

    @cached_property
    def heads(self) -> list[str]:
        """Name the kinds of heads that merged encoders were read with."""
        present = set(self.rows.loc[~self.rows["method"].isin(BASELINES), "heads"])
        return [heads for heads in HEADS if heads in present]

    @cached_property
    def seeds(self) -> int:
        """Count the seeds."""
        return int(self.rows["seed"].nunique())


def views(results: pd.DataFrame) -> list[View]:
    """Split results into backbones and regimes, each on its largest set of tasks; subsets of tasks are left out."""
    lacking = [column for column in NEEDED if column not in results.columns]
    if lacking or results.empty:
        problem = f"results without the columns {', '.join(lacking)}" if lacking else "results without a row"
        raise TaskvecError(problem, "give the rows of results.csv, read with keep_default_na=False")
    numeric = {column: pd.to_numeric(results[column], errors="coerce") for column in ("scale", "value")}
    settings = results.assign(**numeric).groupby(["backbone", "regime"], sort=False)
    keyed = ((cast("tuple[str, str]", key), rows) for key, rows in settings)
    return [View(str(backbone), str(regime), _largest_set(rows)) for (backbone, regime), rows in keyed]


def view(results: pd.DataFrame, backbone: str, regime: str) -> View:
    """Take one backbone in one regime out of the results."""
    if {"backbone", "regime"} <= set(results.columns):
        own = results[(results["backbone"] == backbone) & (results["regime"] == regime)]
        if len(own):
            return views(own)[0]
    raise unknown(
        "backbone and regime", f"{backbone}, {regime}", (f"{one.backbone}, {one.regime}" for one in views(results))
    )


def _largest_set(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of the merged set with the most tasks."""
    sizes = rows[rows["task"] != ""].groupby("tasks", sort=False)["task"].nunique()
    return rows if sizes.empty else rows[rows["tasks"] == sizes.idxmax()]


def _unique(values: pd.Series[Any]) -> list[str]:
    return [str(value) for value in values.drop_duplicates()]


def short_backbone(address: str) -> str:
    """Shorten an address for reading: of a file after @ only its name stays."""
    name, at, file = address.partition("@")
    return one_line(name + at + re.split(r"[\\/]", file)[-1])


def method_label(method: str) -> str:
    """Call the paper's method addition, as its tables do, and every other by its name."""
    return "addition" if method == ADDITION else one_line(method)


def one_line(text: str) -> str:
    """Put a user's name on one line."""
    return " ".join(str(text).split())


def percent(cell: Cell) -> str:
    """Write a fraction in percent with one decimal, and its spread over seeds where there are several."""
    if math.isnan(cell.mean):
        return MISSING
    return _points(cell.mean) + ("" if math.isnan(cell.sd) else f" ± {_points(cell.sd)}")


def scale_text(cell: Cell) -> str:
    """Write the chosen scale, or the range of choices over seeds."""
    low, high = (_plain_scale(scale) for scale in (cell.low, cell.high))
    return low if low == high else f"{low} to {high}"


def _plain_scale(scale: float) -> str:
    if math.isnan(scale):
        return MISSING
    return f"{scale:.2f}" if math.isclose(scale, round(scale, 2), abs_tol=1e-9) else f"{scale:.4g}"


def _points(fraction: float, sign: str = "") -> str:
    """Write a fraction as points with one decimal, never as -0.0."""
    return f"{round(100 * fraction, 1) + 0.0:{sign}.1f}"


# ---------------------------------------------------------------- the verdict


class _Gain(NamedTuple):
    """Accuracy over probing as fractions: mean over tasks and seeds, its interval, and the scales chosen."""

    heads: str
    mean: float
    low: float
    high: float
    scale: Cell

    @property
    def beats(self) -> bool:
        """Say whether the whole interval, as it is printed, lies above zero."""
        return round(100 * self.low, 1) > 0


def _gain(one: View, method: str, heads: str) -> _Gain:
    middle, low, high = (one.cell(method, heads, f"gain_over_probing{end}") for end in ("", "_low", "_high"))
    return _Gain(heads, middle.mean, low.mean, high.mean, middle)


def headline(results: pd.DataFrame) -> str:
    """Say in one sentence (one line) a backbone and regime whether merging beat linear probing, and by how much."""
    found = views(results)
    several = len({one.backbone for one in found}) > 1, len({one.regime for one in found}) > 1
    return "\n".join(_verdict(one, *several) for one in found)


def _verdict(one: View, name_backbone: bool, name_regime: bool) -> str:
    """Write the sentence on the first method, and one on the best of the others by validation."""
    place = [f"on {short_backbone(one.backbone)}"] if name_backbone else []
    place += [f"in the {one_line(one.regime)} regime"] if name_regime else []
    place += [f"over {one.seeds} seeds"] if one.seeds > 1 else []
    if not one.methods:
        return _sentence(place, f"linear probing reaches {percent(one.cell('probing'))} % and nothing was merged")
    first, *others = one.methods
    text = _sentence(place, f"{_subject(one, first)} {_outcome(one, first)}")
    if not others:
        return text
    best = max(others, key=lambda method: one.validation.get(method, -1.0))
    lead = f"{one_line(best)}, the best of {len(others)} other methods on validation," if others[1:] else one_line(best)
    return text + " " + _sentence([], f"{lead} {_outcome(one, best)}", capital=False)


def _sentence(place: list[str], text: str, capital: bool = True) -> str:
    whole = ", ".join([" ".join(place), text]) if place else text
    return (whole[0].upper() + whole[1:] if capital else whole) + "."


def _subject(one: View, method: str) -> str:
    count = len(one.tasks)
    vectors = f"the {COUNTS[count] if count < len(COUNTS) else count} task vector{'s' if count != 1 else ''}"
    return f"adding {vectors}" if method == ADDITION else f"merging {vectors} with {one_line(method)}"


def _outcome(one: View, method: str) -> str:
    """Compare a method with probing, kept heads first."""
    gains = [_gain(one, method, heads) for heads in one.heads]
    gains = [gain for gain in gains if not math.isnan(gain.mean)]
    if not gains:
        return "was not compared with linear probing"
    mean = "mean " if one.seeds > 1 else ""
    first = f"gained {_points(gains[0].mean)} points over" if gains[0].beats else "did not beat"
    text = f"{first} linear probing with {HEADS[gains[0].heads]} ({_evidence(gains[0], f'{mean}95 % interval ')})"
    return text + "".join(_and_then(gains[0], gain) for gain in gains[1:])


def _and_then(before: _Gain, gain: _Gain) -> str:
    """Join the second kind of heads so that the sentence stays grammatical in all four cases."""
    words = {
        (True, True): f" and {_points(gain.mean)} points with",
        (True, False): " but did not beat it with",
        (False, True): f" but gained {_points(gain.mean)} points with",
        (False, False): ", nor with",
    }[before.beats, gain.beats]
    return f"{words} {HEADS[gain.heads]} ({_evidence(gain, '')})"


def _evidence(gain: _Gain, interval: str) -> str:
    if gain.heads == "kept" and gain.scale.low == gain.scale.high == 0:
        return "validation chose lambda 0, which is probing itself"
    mean = "" if gain.beats else f"{_points(gain.mean, '+')} points, "
    ends = "no interval" if math.isnan(gain.low) else f"{interval}{_points(gain.low)} to {_points(gain.high)}"
    scale = scale_text(gain.scale)
    return f"{mean}{ends}" + ("" if scale == MISSING else f", lambda {scale}")


# ---------------------------------------------------------------- the tables


def summary(results: pd.DataFrame, heatmap: pd.DataFrame | None = None) -> pd.DataFrame:
    """Put each backbone, regime and method in one row, test accuracies in % (the paper's Tables 1 and 3)."""
    records = []
    for one in views(results):
        error = box_error(heatmap, one.backbone, one.regime)
        for method in one.methods or [MISSING]:
            named = {"Backbone": short_backbone(one.backbone), "Regime": one.regime, "Method": method_label(method)}
            records.append({**named, **_numbers(one, method, ""), "ξ in the box": percent(error)})
    return _without_empty(pd.DataFrame(records))


def per_task(results: pd.DataFrame, backbone: str, regime: str, method: str = ADDITION) -> pd.DataFrame:
    """Put each task in one row and their mean in the last, test accuracies in %, with the columns of Table 1."""
    one = view(results, backbone, regime)
    if method not in one.methods:
        raise unknown("method in the results", method, one.methods)
    return task_table(one, method)


def task_table(one: View, method: str) -> pd.DataFrame:
    """Do what ``per_task`` does for rows that were split already."""
    records = [{"Task": one_line(task) or "Mean", **_numbers(one, method, task)} for task in [*one.tasks, ""]]
    return _without_empty(pd.DataFrame(records))


def _numbers(one: View, method: str, task: str) -> dict[str, str]:
    """Write the numbers of one task, or of the mean over tasks, under the headings of the paper's Table 1."""
    out = {"Probing": percent(one.cell("probing", task=task)), "Fine-tuned": percent(one.cell("fine_tuned", task=task))}
    out["Joint"] = percent(one.cell("joint", task=task))
    for heads, label in HEADS.items():
        absolute = one.cell(method, heads, task=task)
        normalised = one.cell(method, heads, "normalised_accuracy", task)
        cells = {"absolute": percent(absolute), "normalised": percent(normalised), "λ": scale_text(absolute)}
        cells["gain (95 % interval)"] = _gain_text(one, method, heads, task)
        out |= {f"{label.capitalize()}: {name}": text for name, text in cells.items()}
    return out


def _gain_text(one: View, method: str, heads: str, task: str) -> str:
    middle, low, high = (one.cell(method, heads, f"gain_over_probing{end}", task) for end in ("", "_low", "_high"))
    if math.isnan(middle.mean):
        return MISSING
    spread = "" if math.isnan(middle.sd) else f" ± {_points(middle.sd)}"
    ends = "" if math.isnan(low.mean) else f" ({_points(low.mean)} to {_points(high.mean)})"
    return _points(middle.mean, "+") + spread + ends


def _without_empty(frame: pd.DataFrame) -> pd.DataFrame:
    """Drop the columns that no row fills: heads that were not tried, no joint fine-tuning, no heatmap."""
    return frame.loc[:, [(frame[column] != MISSING).any() for column in frame.columns]]


def box_error(heatmap: pd.DataFrame | None, backbone: str, regime: str) -> Cell:
    """Average the disentanglement error (0..2) over the box and the pairs; its spread is over seeds."""
    if heatmap is None or heatmap.empty:
        return NOTHING
    rows = heatmap[(heatmap["backbone"] == backbone) & (heatmap["regime"] == regime)]
    rows = rows[(rows["scale_1"].abs() <= BOX + 1e-9) & (rows["scale_2"].abs() <= BOX + 1e-9)]
    if rows.empty:
        return NOTHING
    means = (rows["error_1"] + rows["error_2"]).groupby(rows["seed"]).mean()
    return Cell(float(means.mean()), float(means.std()) if len(means) > 1 else math.nan, len(means))


# ---------------------------------------------------------------- Markdown


def markdown(results: pd.DataFrame, heatmap: pd.DataFrame | None = None) -> str:
    """Write tables.md: the verdict, the summary, a table of tasks for each merge, and what the words mean."""
    verdicts = [escape_markdown(line) for line in headline(results).splitlines()]
    top = verdicts[0] if len(verdicts) == 1 else "\n".join(f"- {line}" for line in verdicts)
    parts = ["# Results", top, "## Summary", "Test accuracy in %, mean over tasks.", _table(summary(results, heatmap))]
    for one in views(results):
        for method in one.methods:
            parts.append(f"## {escape_markdown(title(one, method))}")
            parts.append(_table(task_table(one, method), bold_last=True))
    notes = "\n".join(f"- {note}" for note in definitions(results, heatmap))
    return "\n\n".join([*parts, "## What the words mean", notes]) + "\n"


def title(one: View, method: str) -> str:
    """Name a table of tasks by its backbone, regime and method."""
    return f"{short_backbone(one.backbone)}, {one_line(one.regime)}, {method_label(method)}"


def definitions(results: pd.DataFrame, heatmap: pd.DataFrame | None = None) -> list[str]:
    """Explain the numbers, each note a sentence or two; seeds, joint training and heatmaps only where there are any."""
    notes = list(DEFINITIONS)
    notes += [JOINT] if "joint" in set(results["method"]) else []
    notes += [OVER_SEEDS] if results["seed"].nunique() > 1 else []
    return notes + ([] if heatmap is None or heatmap.empty else [IN_THE_BOX])


def _table(frame: pd.DataFrame, bold_last: bool = False) -> str:
    """Write a Markdown table that reads well as plain text too, names to the left and numbers to the right."""
    body = [[escape_markdown(cell) for cell in row] for row in frame.itertuples(index=False)]
    if bold_last:
        body[-1] = [f"**{cell}**" for cell in body[-1]]
    columns = list(zip(frame.columns, *body, strict=True))
    padded = [_column(*column, left=column[0] in NAMES) for column in columns]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in zip(*padded, strict=True))


def _column(head: str, *cells: str, left: bool) -> list[str]:
    """Pad the cells of one column to one width and put the rule that aligns them under its heading."""
    width = max(4, *(len(cell) for cell in (head, *cells)))
    rule = "-" * width if left else "-" * (width - 1) + ":"
    return [cell.ljust(width) if left else cell.rjust(width) for cell in (head, rule, *cells)]


NAMES = ("Backbone", "Regime", "Method", "Task")


def escape_markdown(text: str) -> str:
    """Escape what Markdown would read as markup; an underscore inside a word is none."""
    return re.sub(r"([\\`*|\[\]<>~$&]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", one_line(text))
