"""Metric rows in, Markdown tables out: the verdict, the paper's claims and tables, and the same for every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pandas as pd

from taskvec.learning.head_modes import HEADS
from taskvec.learning.regimes import REGIMES
from taskvec.merging.variants import ADDED, PER_TASK, Variant
from taskvec.report.claims.claims import HOW_CLAIMS_ARE_DECIDED, claims
from taskvec.report.disentanglement import box_error, sampling_text
from taskvec.report.paper_tables import comparisons, markdown_comparison
from taskvec.report.texts import (
    MISSING,
    escape_markdown,
    gain_text,
    markdown_table,
    measured,
    method_label,
    metric_label,
    one_line,
    percent,
    scale_text,
    short_backbone,
    shown,
)
from taskvec.report.verdict import headline, usage
from taskvec.report.views import Method, View, find_view, known_method, views, with_variants

__all__ = ["definitions", "headline", "markdown", "per_task", "summary", "task_table", "title", "views"]

DEFINITIONS = (
    "Accuracies are percentages of the test images classified correctly; the mean gives every task the same weight.",
    "*Probing* is a linear head on the frozen encoder; *fine-tuned* is one encoder for each task, the mark to reach.",
    "*Normalised* is the mean over tasks of accuracy / fine-tuned accuracy on the same split (the paper's equation 1).",
    "*Kept heads* are those that each task had when its vector was made; *re-probed heads* are fitted again to the "
    "merged encoder.",
    "*Gain* is in accuracy points over probing; its 95 % interval is a paired bootstrap over the test images.",
    "λ scales the merged task vectors. It was chosen by normalised accuracy on validation; only the chosen λ saw the "
    "test split.",
)
OF_KINDS = (
    "*Metric* says what counts as right: *accuracy* is the share of test images classified correctly, *patch accuracy* "
    "the share of their patches, *within 15°* the share of test images whose predicted angle is off by 15 degrees or "
    "less. Such numbers have no common mean.",
    DEFINITIONS[1],
    "*Normalised* is a task's metric / that of its fine-tuned encoder on the same split; its mean over tasks gives "
    "every task the same weight (the paper's equation 1, with every task's own metric).",
    DEFINITIONS[3],
    "*Gain* is in points of the task's own metric over probing; its mean is of normalised points, each task's gain / "
    "its fine-tuned metric. Its 95 % interval is a paired bootstrap over the test images.",
    "λ scales the merged task vectors. It was chosen by the mean normalised metric on validation; only the chosen λ "
    "saw the test split.",
)
OF_SOME_IMAGES = {
    "accuracy_half_width": "accuracy",
    "metric_half_width": "the tasks' own metrics",
    "disentanglement_error_half_width": "the disentanglement error",
}
"""Metrics of half-widths, and of what they are."""
SETS_OF_SOME_IMAGES = (
    "Sets of some of the tasks are measured on as many test images as their means need; the 95 % half-width of a set's "
    "mean over its tasks is at most"
)
METHODS = {
    "zero_shot": "*Zero-shot* is the frozen encoder with the head from the class names.",
    "joint": REGIMES["joint"].meaning,
    PER_TASK.name: "*Addition, λ per task* searches one λ after the other, from the common one "
    "on, for the first seed only; the λ of a mean over tasks is their mean.",
}
OVER_SEEDS = (
    "a ± b is mean ± standard deviation over seeds, a number without ± is of one seed; the ends of an interval are "
    "means over seeds."
)
IN_THE_BOX = (
    "ξ is the weight disentanglement error in % (0 to 200: the shares of changed predictions of two tasks, added), "
    "its mean over the area of the box -1 ≤ λ₁, λ₂ ≤ 1 and over pairs of tasks; lower is better (as in the paper's "
    "Figure 1). Between points of the grid it is interpolated, around the origin (error 0) too, so only errors of one "
    "grid compare."
)
OF_PAPER = "Numbers in parentheses are the paper's own, averages over its eight tasks."


def summary(results: pd.DataFrame, heatmap: pd.DataFrame | None = None) -> pd.DataFrame:
    """Put each backbone, regime and method in one row, test accuracies in % (the paper's Tables 1 and 3)."""
    records = []
    for view in views(results):
        error = box_error(heatmap, view.backbone, view.regime)
        for method in view.methods or [Variant(MISSING)]:
            named = {"Backbone": short_backbone(view.backbone), "Regime": view.regime, "Method": method_label(method)}
            records.append({**named, **_numbers(view, method, ""), "ξ in the box": percent(error)})
    return _without_empty(pd.DataFrame(records))


def per_task(results: pd.DataFrame, backbone: str, regime: str, method: Method = ADDED) -> pd.DataFrame:
    """Put each task in one row and their mean in the last, in % of its own metric, with the columns of Table 1."""
    view = find_view(results, backbone, regime)
    return task_table(view, known_method(view, method))


def task_table(view: View, method: Method) -> pd.DataFrame:
    """Do what ``per_task`` does for rows that were split already."""
    named = [{"Task": one_line(task) or "Mean", "Metric": metric_label(view, task)} for task in [*view.tasks, ""]]
    records = [name | _numbers(view, method, task) for name, task in zip(named, [*view.tasks, ""], strict=True)]
    return _without_empty(pd.DataFrame(records))


def _numbers(view: View, method: Method, task: str) -> dict[str, str]:
    """Write the numbers of one task, or of the mean over tasks, under the headings of the paper's Table 1."""
    baselines = {"Probing": "probing", "Zero-shot": "zero_shot", "Fine-tuned": "fine_tuned", "Joint": "joint"}
    out = {name: percent(view.result(baseline, task=task)) for name, baseline in baselines.items()}
    for name in ("Probing", "Zero-shot", "Joint"):
        over_tuned = view.cell(baselines[name], metric="normalised_metric", task=task)
        out[f"Normalised: {name.lower()}"] = percent(over_tuned)
    for heads, label in HEADS.items():
        absolute = view.result(method, heads, task)
        if method == PER_TASK and heads == "kept" and task in view.task_scales:
            absolute = absolute._replace(low=view.task_scales[task].min(), high=view.task_scales[task].max())
        normalised = view.cell(method, heads, view.normalised, task)
        cells = {"absolute": percent(absolute), "gain (95 % interval)": gain_text(view.gain(method, heads, task))}
        cells |= {"normalised": percent(normalised), "λ": scale_text(absolute)}
        out |= {f"{label.capitalize()}: {name}": text for name, text in cells.items()}
    return out


def _without_empty(frame: pd.DataFrame) -> pd.DataFrame:
    """Drop the columns that no row fills: heads that were not tried, no joint fine-tuning, no heatmap."""
    return frame.loc[:, [(frame[column] != MISSING).any() for column in frame.columns]]


def title(view: View, method: Method) -> str:
    """Name a table of tasks by its backbone, regime and method."""
    return f"{short_backbone(view.backbone)}, {one_line(view.regime)}, {method_label(method)}"


def definitions(results: pd.DataFrame, heatmap: pd.DataFrame | None = None) -> list[str]:
    """Explain the numbers, each note a sentence or two; of regimes, methods and measures only those there are."""
    regimes, methods = set(results["regime"]), set(with_variants(results)["variant"])
    common = OF_KINDS if any(view.mixed for view in views(results)) else DEFINITIONS
    notes = [*common, *(regime.meaning for name, regime in REGIMES.items() if name in regimes)]
    notes += [note for method, note in METHODS.items() if method in methods]
    notes += [OVER_SEEDS] if results["seed"].nunique() > 1 else []
    notes += sets_notes(results)
    sampled = f" {text}." if (text := sampling_text(heatmap)) else ""
    return notes + ([] if heatmap is None or heatmap.empty else [IN_THE_BOX + sampled])


def sets_notes(results: pd.DataFrame) -> list[str]:
    """Say how sure the means of sets of tasks are, where they are of some test images."""
    widths = results[results["metric"].isin(OF_SOME_IMAGES)].groupby("metric")["value"].max()
    named = [
        f"{100 * widths[metric]:.1f} points of {what}" for metric, what in OF_SOME_IMAGES.items() if metric in widths
    ]
    return [f"{SETS_OF_SOME_IMAGES} {' and '.join(named)}."] if named else []


# ---------------------------------------------------------------- Markdown


def markdown(
    results: pd.DataFrame,
    heatmap: pd.DataFrame | None = None,
    roles: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    costs: pd.DataFrame | None = None,
    lock: Mapping[str, Any] = MappingProxyType({}),
    step_notes: Sequence[str] = (),
) -> str:
    """Write tables.md: verdict, notes, the paper's claims and tables, a table for each merge, what words mean.

    ``notes`` are the study's own, ``told`` what its steps noted. A trial run has measured values only: nothing in it
    can be compared.
    """
    smoke = bool(lock.get("smoke"))
    verdicts = [escape_markdown(line) for line in headline(results, costs, lock).splitlines()]
    top = verdicts[0] if len(verdicts) == 1 else "\n".join(f"- {line}" for line in verdicts)
    top += f"\n\nUse the model that was kept, in this folder: `{command}`" if (command := usage(lock)) else ""
    parts = ["# Results", top, *_listed("Before you compare", notes), *_listed("What was noted", step_notes)]
    parts += [] if smoke else _claims(results, heatmap, roles or {})
    for table in [] if smoke else comparisons(results, heatmap, roles or {}):
        parts += [f"## {table.title}", f"{table.shown}. {OF_PAPER if table.has_paper else ''}"]
        parts[-1] = parts[-1].rstrip()
        parts.append(markdown_comparison(table))
    parts += ["## Summary", f"{shown(views(results))}.", markdown_table(measured(summary(results, heatmap), smoke))]
    for view in views(results):
        for method in view.methods:
            parts.append(f"## {escape_markdown(title(view, method))}")
            parts.append(markdown_table(measured(task_table(view, method), smoke), bold=[-1]))
    meanings = "\n".join(f"- {note}" for note in definitions(results, heatmap))
    return "\n\n".join([*parts, "## What the words mean", meanings]) + "\n"


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    """Write lines under a title; no lines, no title."""
    return [f"## {title}", "\n".join(f"- {escape_markdown(line)}" for line in lines)] if lines else []


def _claims(results: pd.DataFrame, heatmap: pd.DataFrame | None, roles: Mapping[str, str]) -> list[str]:
    """Write the section on the paper's claims; without roles there is none."""
    found = claims(results, heatmap, roles)
    return ["## The paper's claims", HOW_CLAIMS_ARE_DECIDED, markdown_table(found)] if len(found) else []
