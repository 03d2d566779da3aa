"""The paper's Tables 1, 3 and 4 in its own form: a run's numbers, and the paper's beside them where a role is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import pandas as pd

from taskvec.merging.variants import ADDED
from taskvec.paper import numbers as paper
from taskvec.report.disentanglement import box_error
from taskvec.report.texts import (
    MISSING,
    NAMES,
    escape_latex,
    gain_text,
    markdown_table,
    one_line,
    percent,
    scale_text,
    short_backbone,
    shown,
)
from taskvec.report.views import View, views


class Entry(NamedTuple):
    """One place of a table: our number as text, and the paper's own, empty where it prints none."""

    ours: str
    paper: str = ""

    def __str__(self) -> str:
        """Put the paper's number in parentheses behind ours."""
        return f"{self.ours} ({self.paper})" if self.paper else self.ours


Row = dict[str, Entry]


@dataclass(frozen=True)
class Comparison:
    """One table of the paper: file name, title, what is shown, rows in blocks by model size, each row by column."""

    name: str
    title: str
    shown: str
    blocks: list[tuple[str, list[Row]]]

    @property
    def columns(self) -> list[str]:
        """Name the columns."""
        return list(self.blocks[0][1][0])

    @property
    def has_paper(self) -> bool:
        """Say whether any of the paper's numbers is shown."""
        return any(entry.paper for _, rows in self.blocks for row in rows for entry in row.values())


class _Kind(NamedTuple):
    """What tells the tables apart: name, title, regimes with their names in the paper, where a row starts."""

    name: str
    title: str
    regimes: dict[str, str]
    start: str


TABLES = (
    _Kind("table1", "Task addition, aligned fine-tuning (the paper's Table 1)", {"aligned": ""}, "probing"),
    _Kind("table3", "Task addition, full fine-tuning (the paper's Table 3)", {"full": ""}, ""),
    _Kind("table4", "Task addition, open vocabulary (the paper's Table 4)",
          {"open": "Encoder", "open-full": "Full"}, "zero_shot"),
)  # fmt: skip
STARTS = {"probing": "probing", "zero_shot": "zero-shot", "": ""}


def comparisons(results: pd.DataFrame, heat: pd.DataFrame | None, roles: Mapping[str, str]) -> list[Comparison]:
    """Build the tables whose regimes have rows with merges."""
    roles = paper.checked(roles)
    merged = [view for view in views(results) if ADDED in view.methods]
    built = (_comparison(kind, merged, heat, roles) for kind in TABLES)
    return [table for table in built if table is not None]


def _comparison(
    kind: _Kind, all_views: list[View], heat: pd.DataFrame | None, roles: Mapping[str, str]
) -> Comparison | None:
    """Order the rows as the paper does, within blocks of one model size; models without a role come last."""
    shown_views = [view for view in all_views if view.regime in kind.regimes]
    if not shown_views:
        return None
    shown_views = sorted(shown_views, key=lambda view: paper.order(roles.get(view.backbone, "")))
    rows = [_row(kind, view, heat, roles.get(view.backbone, "")) for view in shown_views]
    filled = [name for name in rows[0] if any(row[name].ours not in ("", MISSING) for row in rows)]
    sizes = [_size(roles.get(view.backbone, ""), bool(roles)) for view in shown_views]
    sized = [(size, {name: row[name] for name in filled}) for size, row in zip(sizes, rows, strict=True)]
    blocks = [(size, [row for _, row in part]) for size, part in groupby(sized, lambda x: x[0])]
    return Comparison(kind.name, kind.title, shown(shown_views), blocks)


def _size(key: str, named: bool) -> str:
    return paper.MODELS[key].size if key else "Other backbones" if named else ""


def _row(kind: _Kind, view: View, heat: pd.DataFrame | None, key: str) -> Row:
    """Write the columns of the paper, then those that help to read them: joint training, gain, error in the box."""
    named = {
        "Model": Entry(paper.MODELS[key].label if key else short_backbone(view.backbone)),
        "Backbone": Entry(short_backbone(view.backbone) if key else ""),
        "Fine-tuning": Entry(kind.regimes[view.regime]),
    }
    beyond = {
        "joint": Entry(percent(view.result("joint"))),
        "gain over probing": Entry(gain_text(view.gain(ADDED))),
        "ξ in the box": Entry(percent(box_error(heat, view.backbone, view.regime))),
    }
    numbers = _numbers(kind, view, paper.MODELS[key].numbers(view.regime) if key else paper.NO_NUMBERS)
    return named | numbers | {f"Beyond the paper: {name}": entry for name, entry in beyond.items()}


def _numbers(kind: _Kind, view: View, printed: paper.Numbers) -> Row:
    """Write the numbers that the paper prints; Table 3 does not repeat where its rows start."""
    addition, normalised = view.result(ADDED), view.cell(ADDED, metric=view.normalised)
    start = {f"Single-task: {STARTS[kind.start]}": _entry(percent(view.result(kind.start)), printed.start)}
    return (start if kind.start else {}) | {
        "Single-task: final": _entry(percent(view.result("fine_tuned")), printed.final),
        "Addition: absolute": _entry(percent(addition), printed.absolute),
        "Addition: normalised": _entry(percent(normalised), printed.normalised),
        "Addition: λ": _entry(scale_text(addition), printed.scale, 2),
    }


def _entry(ours: str, printed: float, digits: int = 1) -> Entry:
    return Entry(ours, "" if math.isnan(printed) else f"{printed:.{digits}f}")


# ---------------------------------------------------------------- Markdown


def markdown_comparison(table: Comparison) -> str:
    """Write a table with a bold row over each block."""
    body: list[list[str]] = []
    bold = []
    for title, rows in table.blocks:
        if title:
            bold.append(len(body))
            body.append([title, *[""] * (len(table.columns) - 1)])
        body += [[str(entry) for entry in row.values()] for row in rows]
    return markdown_table(pd.DataFrame(body, columns=table.columns), bold)


# ---------------------------------------------------------------- LaTeX


def latex_tables(
    results: pd.DataFrame, heat: pd.DataFrame | None = None, roles: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Write each table as LaTeX by its name (table1, ...), for a document with booktabs and xcolor."""
    return {table.name: latex_table(table) for table in comparisons(results, heat, roles or {})}


def latex_table(table: Comparison) -> str:
    """Write one floating table, the paper's numbers in grey."""
    columns = table.columns
    align = "".join("l" if _is_name(column) else "r" for column in columns)
    caption = f"{table.title}. {escape_latex(table.shown)}." + (
        " In grey: the paper's own numbers." if table.has_paper else ""
    )
    lines = [
        "% needs \\usepackage{booktabs,xcolor}",
        r"\begin{table}", r"\centering", r"\small", r"\setlength{\tabcolsep}{4pt}",
        f"\\caption{{{caption}}}", f"\\label{{tab:{table.name}}}",
        f"\\begin{{tabular}}{{{align}}}", r"\toprule", *_latex_heads(columns), r"\midrule",
    ]  # fmt: skip
    for i, (title, rows) in enumerate(table.blocks):
        lines += [r"\midrule"] if i else []
        lines += [f"\\multicolumn{{{len(columns)}}}{{l}}{{\\textit{{{escape_latex(title)}}}}} \\\\"] if title else []
        lines += [" & ".join(_latex_entry(entry) for entry in row.values()) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _is_name(column: str) -> bool:
    return column in (*NAMES, "Fine-tuning")


def _latex_heads(columns: list[str]) -> list[str]:
    """Write groups over their columns, rules below them, and the columns."""
    spans: list[str] = []
    rules: list[str] = []
    at = 1
    for group, same in groupby(column.rpartition(": ")[0] for column in columns):
        width = len(list(same))
        spans.append(f"\\multicolumn{{{width}}}{{{'c' if group else 'l'}}}{{{escape_latex(group)}}}")
        rules += [f"\\cmidrule(lr){{{at}-{at + width - 1}}}"] if group else []
        at += width
    heads = (escape_latex(column.rpartition(": ")[2]) for column in columns)
    return [" & ".join(spans) + r" \\", "".join(rules), " & ".join(heads) + r" \\"]


def _latex_entry(entry: Entry) -> str:
    """Write our number, and the paper's in grey behind it."""
    grey = f" \\textcolor{{gray}}{{{escape_latex(entry.paper)}}}" if entry.paper else ""
    return _latex_number(entry.ours) + grey


def _latex_number(text: str) -> str:
    """Give negative numbers a minus; a name stays a name."""
    if text == MISSING:
        return "--"
    escaped = escape_latex(one_line(text))
    return escaped if any(letter.isalpha() for letter in text.replace("to", "")) else escaped.replace("-", "$-$")
