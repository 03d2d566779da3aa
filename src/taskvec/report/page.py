"""Metric rows in, one HTML file out: verdict, claims, tables, figures, how to get them again; loads nothing."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from taskvec.core.errors import TaskvecError
from taskvec.core.notes import note_lines
from taskvec.report import tables
from taskvec.report.claims.claims import HOW_CLAIMS_ARE_DECIDED, claims
from taskvec.report.figures.drawing import Planned, plan
from taskvec.report.leaderboard import (
    HOW_IT_READS,
    Board,
    advice,
    board_table,
    boards,
    short_grids,
)
from taskvec.report.paper_tables import comparisons
from taskvec.report.scale_guess import GUESSING, HOW_GUESSES_READ, guess_table
from taskvec.report.texts import NAMES, measured, method_label, one_line, short_backbone, shown
from taskvec.report.verdict import headline, usage
from taskvec.report.views import View, views


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
    results: pd.DataFrame,
    heatmap: pd.DataFrame | None,
    figures: Path,
    lock: dict[str, Any],
    study_yaml: str,
    roles: Mapping[str, str] | None = None,
    costs: pd.DataFrame | None = None,
    study_notes: Sequence[str] = (),
    training: pd.DataFrame | None = None,
) -> str:
    """Write the whole report of a run as one HTML file, with the PNG figures of folder ``figures`` inside."""
    planned = plan(results, heatmap, roles, costs, training)
    all_views, smoke = views(results), bool(lock.get("smoke"))
    mixed = any(view.mixed for view in all_views)
    pictures = {figure.stem: _picture(figure, figures, mixed) for figure in planned}
    sections = [_section(view, planned, pictures, smoke) for view in all_views]
    compared = [] if smoke else comparisons(results, heatmap, roles or {})
    page: str = _template().render(
        study=one_line(str(results["study"].iloc[0])) if "study" in results else "study",
        smoke=smoke,
        verdicts=headline(results, costs, lock).splitlines(),
        usage=usage(lock),
        study_notes=study_notes,
        told=note_lines(lock.get("notes", [])),
        claims=[] if smoke else claims(results, heatmap, roles or {}),
        how_claims=HOW_CLAIMS_ARE_DECIDED,
        comparisons=compared,
        of_paper=any(table.has_paper for table in compared),
        boards=[_board(board, planned, pictures, smoke) for board in boards(results, costs)],
        how_it_reads=_emphasis(HOW_IT_READS),
        guessing=GUESSING,
        how_guesses_read=_emphasis(HOW_GUESSES_READ),
        shown=shown(all_views),
        summary=measured(tables.summary(results, heatmap), smoke),
        regimes=_regimes(planned, pictures),
        sections=sections,
        notes=[_emphasis(note) for note in tables.definitions(results, heatmap)],
        command=lock.get("command", "taskvec run study.yaml"),
        yaml=study_yaml,
        facts=_facts(lock),
        versions=lock.get("versions", {}),
        lock=json.dumps(lock, indent=1, sort_keys=True, ensure_ascii=False, default=str),
    )
    return page


def _regimes(planned: list[Planned], pictures: dict[str, Picture]) -> dict[str, list[Picture]]:
    """Gather the figures that compare backbones, by regime."""
    figures = [figure for figure in planned if not figure.backbone]
    return {
        one_line(regime): [pictures[figure.stem] for figure in figures if figure.regime == regime]
        for regime in dict.fromkeys(figure.regime for figure in figures)
    }


def _template() -> Any:
    text = resources.files("taskvec.report").joinpath("page.html.j2").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "groups": _groups,
        "heads": _heads,
        "is_name": NAMES.__contains__,
        "unbroken": _unbroken,
    }
    return environment.from_string(text)


def _board(board: Board, planned: list[Planned], pictures: dict[str, Picture], smoke: bool) -> dict[str, Any]:
    """Gather what belongs to one leaderboard; a trial run has no advice."""
    place = ("leaderboard", board.view.backbone, board.view.regime)
    stem = next(figure.stem for figure in planned if (figure.kind, figure.backbone, figure.regime) == place)
    shown = {"title": board.title, "table": measured(board_table(board), smoke), "picture": pictures[stem]}
    if smoke:
        return shown | {"advice": "", "guesses": [], "note": ""}
    return shown | {"advice": advice(board), "guesses": guess_table(board.guesses), "note": short_grids(board)}


def _section(view: View, planned: list[Planned], pictures: dict[str, Picture], smoke: bool) -> dict[str, Any]:
    """Gather what belongs to one backbone in one regime."""
    figures = [figure for figure in planned if (figure.backbone, figure.regime) == (view.backbone, view.regime)]
    merges = [(method_label(method), measured(tables.task_table(view, method), smoke)) for method in view.methods]
    return {
        "title": f"{short_backbone(view.backbone)}, {one_line(view.regime)}",
        "pictures": [pictures[figure.stem] for figure in figures if figure.kind not in ("heatmap", "leaderboard")],
        "heatmaps": [pictures[figure.stem] for figure in figures if figure.kind == "heatmap"],
        "merges": merges,
    }


def _picture(figure: Planned, folder: Path, mixed: bool) -> Picture:
    """Read a figure, with its name and how to read it."""
    path = folder / f"{figure.stem}.png"
    if not path.is_file():
        raise TaskvecError(f"no figure '{path}'", "write the figures before the page")
    where = ", ".join(part for part in (short_backbone(figure.backbone), one_line(figure.regime)) if part)
    name, reading = figure.type.words(figure.regime, mixed)
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
    facts = ("seeds", "threads", "device", "processor", "precision", "evaluation_precision", "fingerprint")
    return {name: _listed(lock[name]) for name in facts if lock.get(name) not in (None, {})}


def _listed(value: Any) -> str:
    """Return a value as text, a list or mapping with commas."""
    if isinstance(value, dict):
        value = [f"{key} {part}" for key, part in value.items()]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _emphasis(note: str) -> Markup:
    """Turn the stars of a note into emphasis, everything else into text."""
    return Markup(re.sub(r"\*(.+?)\*", r"<em>\1</em>", str(escape(_unbroken(note)))))
