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
    GUESSING,
    HOW_GUESSES_READ,
    HOW_IT_READS,
    Board,
    advice,
    board_table,
    boards,
    guess_table,
    short_grids,
)
from taskvec.report.paper_tables import comparisons
from taskvec.report.texts import NAMES, measured, method_label, one_line, short_backbone, shown
from taskvec.report.verdict import headline, usage
from taskvec.report.views import View, views

FIGURES = {  # of the paper, by kind and regime
    ("heatmaps-algorithm", "aligned"): 1,
    ("backbones", "aligned"): 2,
    ("heatmaps-data", "aligned"): 3,
    ("heatmaps-scale", "aligned"): 4,
    ("heatmaps-algorithm", "full"): 5,
    ("combinations", "full"): 6,
    ("counts-all", "full"): 7,
    ("counts-data", "full"): 8,
    ("counts-scale", "full"): 9,
}
MAPS = (
    "Each point adds the vectors of two tasks with the coefficients on the axes, and shows the mean over pairs of "
    "tasks, on one scale of colours. Light means that the sum answers as each single vector would alone. The red box "
    "is the space from -1 to 1, the star the pre-trained encoder."
)
SETS = "Every line is the mean over the sets of tasks of one size, each with the λ that validation chose for it."
COUNTS = f"{SETS} Normalised divides by the accuracy of the fine-tuned encoders."
SNAPSHOTS = (
    "Backbones named NAME@STEP are one encoder on its way, the last point is the finished one. Top left: lower means "
    "that task vectors get along better. Top right: what adding them reaches, bottom left what it gains over probing, "
    "with the λ that validation chose."
)
ROOM = (
    "Left: the grey bar from probing (cross) to fine-tuned (diamond) is the room that a merge has; further right "
    "is better."
)
EVIDENCE = "An interval across the dashed line is no evidence of a difference. The shaded row is the mean over tasks."
SEARCH = (
    "At λ = 0 nothing is added: in the aligned regime, kept heads are then linear probing. Above the dashed line "
    "the merge beats probing;"
)
READING = {
    "emergence": (
        "Along pre-training.",
        f"{SNAPSHOTS} Bottom right: how good the encoder is for single tasks.",
    ),
    "backbones": (
        "The line search of every backbone.",
        "A curve that falls from the start means that the task vectors of that backbone only disturb each other. Rings "
        "mark the λ chosen on validation.",
    ),
    "heatmaps-algorithm": ("Weight disentanglement by pre-training algorithm.", MAPS),
    "heatmaps-data": ("Weight disentanglement by size of the pre-training data.", MAPS),
    "heatmaps-scale": ("Weight disentanglement by model scale.", MAPS),
    "heatmaps-all": ("Weight disentanglement of every backbone.", MAPS),
    "combinations": (
        "Accuracy against the number of merged tasks.",
        "Every dot is one set of tasks with the λ that validation chose for it, the line their mean. Left: test "
        "accuracy. Right: divided by the accuracy of the fine-tuned encoders.",
    ),
    "counts-all": ("Every backbone against the number of merged tasks.", COUNTS),
    "counts-data": ("Size of the pre-training data against the number of merged tasks.", COUNTS),
    "counts-scale": ("Model scale against the number of merged tasks.", COUNTS),
    "errors": (
        "Weight disentanglement error against the number of merged tasks.",
        "The mean over random points of the box from -1 to 1 and over sets of one size; for two tasks it is the ξ of "
        "the paper, and in general twice the mean share of changed predictions. Lower is better.",
    ),
    "scales": (
        "A λ for each task beside the common one.",
        "Dots are the λ of each task, found one after the other on validation; the dashed line is the common λ. "
        "Dots on the line mean that one λ is enough.",
    ),
    "accuracies": (
        "What each task gets.",
        f"{ROOM} Right: the accuracy points that merging adds to probing. {EVIDENCE}",
    ),
    "leaderboard": (
        "Accuracy against cost.",
        "Every dot is one option: a merge with one kind of heads, or what merges nothing. Further up is better, "
        "further left is cheaper. Rings are around what the line below the table picks on validation. Dashed lines "
        "repeat what merges nothing.",
    ),
    "gains": (
        "All methods side by side.",
        "Means over tasks on the test split, each method at the λ that validation chose. Left: accuracy, with a bar of "
        "one standard deviation where there are several seeds. Right: points over probing with 95 % intervals.",
    ),
    "lambda": (
        "How far to go along the task vectors (as in the paper's Figure 2).",
        f"{SEARCH} 100 is the accuracy of the fine-tuned encoders. Rings mark the λ chosen on validation.",
    ),
    "lambdas": (
        "The line search of every method.",
        "Each method builds its vectors in its own way and λ scales them, so compare how high the curves get and not "
        "where they peak. Rings mark the λ chosen on validation.",
    ),
    "heatmap": (
        "How well two task vectors get along (as in the paper's Figure 1).",
        "Each point adds two vectors with the coefficients on the axes. Light means that the sum answers as each "
        "single vector would alone, dark that it does not. The star is the pre-trained encoder, the red box the search "
        "space from -1 to 1. The error ξ adds two shares of changed predictions, so it reaches 200 %; colours end at "
        "100 %.",
    ),
}

COUNTS_OF_KINDS = f"{SETS} Every task's own metric is divided by that of its fine-tuned encoder."
READING_OF_KINDS = READING | {  # where tasks differ in kind
    "emergence": (
        "Along pre-training.",
        f"{SNAPSHOTS} Bottom right: how close probing comes to fine-tuning, in each task's own metric.",
    ),
    "combinations": (
        "The normalised metric against the number of merged tasks.",
        "Every dot is one set of tasks with the λ that validation chose for it, the line their mean. Every task's own "
        "metric is divided by that of its fine-tuned encoder.",
    ),
    "counts-all": ("Every backbone against the number of merged tasks.", COUNTS_OF_KINDS),
    "counts-data": ("Size of the pre-training data against the number of merged tasks.", COUNTS_OF_KINDS),
    "counts-scale": ("Model scale against the number of merged tasks.", COUNTS_OF_KINDS),
    "accuracies": (
        "What each task gets.",
        f"{ROOM} Right: the points of the task's own metric that merging adds to probing. {EVIDENCE}",
    ),
    "gains": (
        "All methods side by side.",
        "Means over tasks on the test split, each method at the λ that validation chose. Left: every task's own metric "
        "divided by that of its fine-tuned encoder, with a bar of one standard deviation where there are several "
        "seeds. Right: points over probing with 95 % intervals.",
    ),
    "lambda": (
        "How far to go along the task vectors (as in the paper's Figure 2).",
        f"{SEARCH} 100 is what the fine-tuned encoders reach. Rings mark the λ chosen on validation.",
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
    results: pd.DataFrame,
    heatmap: pd.DataFrame | None,
    figures: Path,
    lock: dict[str, Any],
    study_yaml: str,
    roles: Mapping[str, str] | None = None,
    costs: pd.DataFrame | None = None,
    study_notes: Sequence[str] = (),
) -> str:
    """Write the whole report of a run as one HTML file, with the PNG figures of folder ``figures`` inside."""
    planned = plan(results, heatmap, roles, costs)
    found, smoke = views(results), bool(lock.get("smoke"))
    reading = READING_OF_KINDS if any(view.mixed for view in found) else READING
    pictures = {one.stem: _picture(one, figures, *reading[one.kind]) for one in planned}
    sections = [_section(view, planned, pictures, smoke) for view in found]
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
        shown=shown(found),
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
    own = [one for one in planned if not one.backbone]
    return {
        one_line(regime): [pictures[one.stem] for one in own if one.regime == regime]
        for regime in dict.fromkeys(one.regime for one in own)
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
    picture = next(pictures[one.stem] for one in planned if (one.kind, one.backbone, one.regime) == place)
    shown = {"title": board.title, "table": measured(board_table(board), smoke), "picture": picture}
    if smoke:
        return shown | {"advice": "", "guesses": [], "note": ""}
    return shown | {"advice": advice(board), "guesses": guess_table(board), "note": short_grids(board)}


def _section(view: View, planned: list[Planned], pictures: dict[str, Picture], smoke: bool) -> dict[str, Any]:
    """Gather what belongs to one backbone in one regime."""
    own = [one for one in planned if (one.backbone, one.regime) == (view.backbone, view.regime)]
    merges = [(method_label(method), measured(tables.task_table(view, method), smoke)) for method in view.methods]
    return {
        "title": f"{short_backbone(view.backbone)}, {one_line(view.regime)}",
        "pictures": [pictures[one.stem] for one in own if one.kind not in ("heatmap", "leaderboard")],
        "heatmaps": [pictures[one.stem] for one in own if one.kind == "heatmap"],
        "merges": merges,
    }


def _picture(one: Planned, folder: Path, name: str, reading: str) -> Picture:
    """Read a figure, with its name and how to read it."""
    path = folder / f"{one.stem}.png"
    if not path.is_file():
        raise TaskvecError(f"no figure '{path}'", "write the figures before the page")
    where = ", ".join(part for part in (short_backbone(one.backbone), one_line(one.regime)) if part)
    if (one.kind, one.regime) in FIGURES:
        name = f"{name.removesuffix('.')} (the paper's Figure {FIGURES[one.kind, one.regime]})."
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
    facts = ("seeds", "threads", "device", "processor", "precision", "fingerprint")
    shown = {name: lock[name] for name in facts if name in lock}
    return {
        name: ", ".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in shown.items()
    }


def _emphasis(note: str) -> Markup:
    """Turn the stars of a note into emphasis, everything else into text."""
    return Markup(re.sub(r"\*(.+?)\*", r"<em>\1</em>", str(escape(_unbroken(note)))))
