"""What a kind of figure is: its name, when it is drawn, and how the page says to read it; what figures are drawn of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Generic, NamedTuple, TypeVar

import pandas as pd
from matplotlib.figure import Figure

from taskvec.paper import numbers as paper
from taskvec.report.leaderboard import Board, boards
from taskvec.report.views import View, views

Draw = Callable[[], Figure]
Place = TypeVar("Place", str, View)
"""Whose figure it is: a regime's by its name, or that of one backbone in one regime."""


class Compared(NamedTuple):
    """Backbones that are compared in one figure, and in what they differ."""

    name: str
    what: str
    backbones: list[str]


@dataclass(frozen=True)
class Run:
    """The rows of a run from which figures are drawn: results, heatmaps, roles in the paper, costs, losses."""

    results: pd.DataFrame
    heatmap: pd.DataFrame | None
    roles: Mapping[str, str]
    costs: pd.DataFrame | None
    training: pd.DataFrame | None = None

    @cached_property
    def views(self) -> list[View]:
        """Return each backbone in each regime in which something was merged."""
        return [view for view in views(self.results) if view.methods]

    @cached_property
    def boards(self) -> dict[tuple[str, str], Board]:
        """Return the leaderboards by backbone and regime."""
        return {(board.view.backbone, board.view.regime): board for board in boards(self.results, self.costs)}

    @cached_property
    def compared(self) -> dict[str, Compared]:
        """Return the paper's comparisons of backbones by name."""
        return {group.name: group for group in groups(self.results, self.roles)}


@dataclass(frozen=True)
class FigureType(Generic[Place]):
    """One kind of figure.

    ``plan`` returns what draws it for a place, or None where there is nothing to draw. The page shows ``title`` and
    ``reading`` beside it, or what is said for ``mixed`` tasks, which differ in kind; ``paper`` has the number of the
    paper's figure by regime.
    """

    name: str
    title: str
    reading: str
    plan: Callable[[Run, Place], Draw | None]
    mixed_title: str = ""
    mixed_reading: str = ""
    paper: Mapping[str, int] = field(default_factory=dict)

    def words(self, regime: str, mixed: bool) -> tuple[str, str]:
        """Return the title, with the number in the paper, and how to read it."""
        title = (self.mixed_title if mixed else "") or self.title
        if regime in self.paper:
            title = f"{title.removesuffix('.')} (the paper's Figure {self.paper[regime]})."
        return title, (self.mixed_reading if mixed else "") or self.reading


def of_view(draw: Callable[[pd.DataFrame, str, str], Figure]) -> Callable[[Run, View], Draw]:
    """Return the plan of a figure that every backbone in every regime has."""
    return lambda run, view: partial(draw, run.results, view.backbone, view.regime)


def groups(results: pd.DataFrame, roles: Mapping[str, str]) -> list[Compared]:
    """List the comparisons of the paper's figures; the backbone without pre-training stands beside the algorithms."""
    named = paper.backbone_of(paper.checked(roles))
    algorithms = [present[0] for keys in paper.ALGORITHMS if (present := [named[key] for key in keys if key in named])]
    control = [str(name) for name in results["backbone"].unique() if name not in roles and paper.is_control(str(name))]
    data, scale = (
        [named[key] for pair in pairs if set(pair) <= set(named) for key in pair]
        for pairs in (paper.MORE_DATA, paper.LARGER)
    )
    everything = [str(name) for name in results["backbone"].unique()]
    return [
        Compared("algorithm", "by pre-training algorithm", algorithms + control if algorithms else []),
        Compared("data", "by size of the pre-training data", data),
        Compared("scale", "by model scale", scale),
        Compared("all", "all backbones", everything),
    ]


def among(group: Compared, measured: Collection[str]) -> list[str]:
    """Return the backbones of a group that were measured, or none where fewer than two are left to compare."""
    present = [name for name in group.backbones if name in measured]
    return present if len(present) > 1 else []
