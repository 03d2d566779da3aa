"""Metric rows in, one HTML file out: verdict, tables, figures, how to get them again; loads nothing."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from taskvec import tables
from taskvec.errors import TaskvecError
from taskvec.figures import Planned, plan

READING = {
    "backbones": (
        "The line search of every backbone (the paper's Figure 2).",
        "A curve that falls from the start means that the task vectors of that backbone only disturb each other. Rings "
        "mark the λ chosen on validation.",
    ),
    "accuracies": (
        "What each task gets.",
        "Left: the grey bar from probing (cross) to fine-tuned (diamond) is the room that a merge has; further right "
        "is better. Right: the accuracy points that merging adds to probing. An interval across the dashed line is no "
        "evidence of a difference. The shaded row is the mean over tasks.",
    ),
    "gains": (
        "All methods side by side.",
        "Means over tasks on the test split, each method at the λ that validation chose. Left: accuracy, with a bar of "
        "one standard deviation where there are several seeds. Right: points over probing with 95 % intervals.",
    ),
    "lambda": (
        "How far to go along the task vectors (the paper's Figure 2).",
        "At λ = 0 nothing is added, and kept heads are linear probing. Above the dashed line the merge beats probing; "
        "100 is the accuracy of the fine-tuned encoders. Rings mark the λ chosen on validation.",
    ),
    "lambdas": (
        "The line search of every method.",
        "Each method builds its vectors in its own way and λ scales them, so compare how high the curves get and not "
        "where they peak. Rings mark the λ chosen on validation.",
    ),
    "heatmap": (
        "How well two task vectors get along (the paper's Figure 1).",
        "Each point adds two vectors with the coefficients on the axes. Light means that the sum answers as each "
        "single vector would alone, dark that it does not. The star is the pre-trained encoder, the red box the search "
        "space from -1 to 1. The error ξ adds two shares of changed predictions, so it reaches 200 %; colours end at "
        "100 %.",
    ),
}


class Picture(NamedTuple):
    """One figure as the page shows it: PNG in base64, what it is called and how to read it."""

    data: str
    alt: str
    name: str
    reading: str


class Column(NamedTuple):
    """A heading over one or several columns of a table."""

    name: str
    span: int


def render(
    results: pd.DataFrame, heatmap: pd.DataFrame | None, figures: Path, lock: dict[str, Any], study_yaml: str
) -> str:
    """Write the whole report of a run as one HTML file, with the PNG figures of folder ``figures`` inside."""
    planned = plan(results, heatmap)
    pictures = {one.stem: _picture(one, figures) for one in planned}
    study = tables.one_line(str(results["study"].iloc[0])) if "study" in results else "study"
    page: str = _template().render(
        study=study,
        verdicts=tables.headline(results).splitlines(),
        summary=tables.summary(results, heatmap),
        backbones=[pictures[one.stem] for one in planned if one.kind == "backbones"],
        sections=[_section(view, planned, pictures) for view in tables.views(results)],
        notes=[_emphasis(note) for note in tables.definitions(results, heatmap)],
        command=lock.get("command", "taskvec run study.yaml"),
        yaml=study_yaml,
        facts=_facts(lock),
        versions=lock.get("versions", {}),
        lock=json.dumps(lock, indent=1, ensure_ascii=False, default=str),
    )
    return page


def _template() -> Any:
    text = resources.files("taskvec").joinpath("page.html.j2").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "groups": _groups,
        "heads": _heads,
        "is_name": tables.NAMES.__contains__,
        "unbroken": _unbroken,
    }
    return environment.from_string(text)


def _section(view: tables.View, planned: list[Planned], pictures: dict[str, Picture]) -> dict[str, Any]:
    """Gather what belongs to one backbone in one regime."""
    own = [one for one in planned if (one.backbone, one.regime) == (view.backbone, view.regime)]
    merges = [(tables.method_label(method), tables.task_table(view, method)) for method in view.methods]
    return {
        "title": f"{tables.short_backbone(view.backbone)}, {tables.one_line(view.regime)}",
        "pictures": [pictures[one.stem] for one in own if one.kind != "heatmap"],
        "heatmaps": [pictures[one.stem] for one in own if one.kind == "heatmap"],
        "merges": merges,
    }


def _picture(one: Planned, folder: Path) -> Picture:
    path = folder / f"{one.stem}.png"
    if not path.is_file():
        raise TaskvecError(f"no figure '{path}'", "write the figures before the page")
    where = ", ".join(part for part in (tables.short_backbone(one.backbone), tables.one_line(one.regime)) if part)
    name, reading = READING[one.kind]
    return Picture(base64.b64encode(path.read_bytes()).decode("ascii"), f"{name} {where}", name, reading)


def _groups(columns: Iterable[str]) -> list[Column]:
    """Read 'Kept heads: absolute' as a group with a column, so that the group is written once over its columns."""
    parts = [name.partition(": ")[0] if ": " in name else "" for name in columns]
    return [Column(name, len(list(same))) for name, same in groupby(parts)]


def _heads(columns: Iterable[str]) -> list[str]:
    return [name.partition(": ")[2] or name for name in columns]


def _unbroken(text: str) -> str:
    """Keep a number and its percent sign on one line."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _facts(lock: dict[str, Any]) -> dict[str, str]:
    """Pick the settings that the numbers depend on, as text; what a lock lacks is left out."""
    shown = {name: lock[name] for name in ("seeds", "threads", "device", "precision", "fingerprint") if name in lock}
    return {
        name: ", ".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in shown.items()
    }


def _emphasis(note: str) -> Markup:
    """Turn the stars of a note into emphasis, everything else into text."""
    return Markup(re.sub(r"\*(.+?)\*", r"<em>\1</em>", str(escape(_unbroken(note)))))
