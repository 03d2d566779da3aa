"""The leaderboard: every way to serve all tasks, what it reaches, what it costs, and which to pick for a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from taskvec.learning.head_modes import HEADS
from taskvec.merging.variants import Variant
from taskvec.report.scale_guess import GUESSING, HOW_GUESSES_READ, Guess, guess_table, guesses
from taskvec.report.texts import (
    MISSING,
    escape_markdown,
    gain_text,
    markdown_table,
    measured,
    method_label,
    percent,
    seconds_text,
    short_backbone,
)
from taskvec.report.verdict import SMOKE, ended_early
from taskvec.report.views import Method, Spread, View, name_of, own_costs, views

ALONE = {"probing": "linear probing", "joint": "joint fine-tuning", "fine_tuned": "individual models"}
"""The options that merge nothing, as the leaderboard calls them."""
STEP = 0.001
"""By how much (a fraction) an option must be better on validation than a cheaper one to be worth naming."""
SAME_BUDGET = 2
"""How many times as long two merges may take, one and the other, to count as one budget."""
HOW_IT_READS = (
    "Test split; normalised to the individual models, in %. *Stored* is what must be kept to answer all tasks, heads "
    "included. *Training* is the time of probes and fine-tuning, *merging and search* that of the merge, of trying "
    "scales and hyperparameters on validation and, with re-probed heads, of fitting them: seconds of one worker on the "
    "machine that ran the study, summed over tasks, mean over seeds. Rows are sorted by validation."
)


@dataclass(frozen=True)
class Option:
    """One way to serve all tasks: its value on validation, by which it is picked, and its costs, as means over seeds.

    ``validation`` is a fraction of the individual models' accuracy; ``training`` and ``extra`` are seconds, ``stored``
    bytes.
    """

    method: Variant
    heads: str
    validation: float
    encoders: float
    stored: float
    training: float
    extra: float

    @property
    def merged(self) -> bool:
        """Say whether it is a merge."""
        return self.method.method not in ALONE


@dataclass(frozen=True)
class Board:
    """The options of one backbone in one regime."""

    view: View
    options: tuple[Option, ...]
    guesses: tuple[Guess, ...] = ()

    @property
    def title(self) -> str:
        """Name the backbone and the regime."""
        return f"{short_backbone(self.view.backbone)}, {self.view.regime}"

    def reached(self, option: Option) -> Spread:
        """Return the value of an option on the test split: normalised, where the individual models normalise it."""
        normalised = self.view.cell(option.method, option.heads, self.view.normalised)
        return self.view.own(option.method, option.heads) if math.isnan(normalised.mean) else normalised

    def find(self, method: Method, heads: str = "kept") -> Option | None:
        """Return one option, None where it was not measured."""
        wanted = name_of(method), heads
        return next((one for one in self.options if (one.method.name, one.heads) == wanted), None)

    @cached_property
    def methods(self) -> list[Variant]:
        """Name the merging methods, the best on validation with either kind of heads first."""
        merged = sorted((one for one in self.options if one.merged), key=lambda one: -one.validation)
        return list(dict.fromkeys(one.method for one in merged))


def boards(results: pd.DataFrame, costs: pd.DataFrame | None) -> list[Board]:
    """Return a board for every backbone and regime in which several methods were merged and costs are known."""
    if costs is None or costs.empty:
        return []
    found = [one for one in views(results) if one.methods[1:]]
    return [Board(one, tuple(options(one, costs)), tuple(guesses(one, costs))) for one in found]


def options(one: View, costs: pd.DataFrame) -> list[Option]:
    """Return the options of a view, in the order of its costs; those without a validation value are left out."""
    own = own_costs(one, costs)
    sums = own.assign(
        training=own["probing_seconds"] + own["training_seconds"],
        extra=own["merging_seconds"] + own["search_seconds"],
    )
    means = sums.groupby(["variant", "heads"], sort=False)[["encoders", "stored", "training", "extra"]].mean()
    tried = {(method.name, heads): (method, heads, value) for (method, heads), value in one.tried.items()}
    rows = zip(means.index, means.to_numpy(), strict=True)
    return [Option(*tried[option], *map(float, row)) for option, row in rows if option in tried]


# ---------------------------------------------------------------- the table


def board_table(board: Board) -> pd.DataFrame:
    """Put each method in one row, kept and re-probed heads side by side with their costs; the baselines come first."""
    rows = [_row(board, method) for method in ALONE if board.find(method)]
    frame = pd.DataFrame(rows + [_row(board, method) for method in board.methods])
    return frame.loc[:, [(frame[column] != MISSING).any() for column in frame.columns]]


def _row(board: Board, method: Method) -> dict[str, str]:
    one, found = board.view, {heads: board.find(method, heads) for heads in HEADS}
    out = {"Method": ALONE.get(name_of(method)) or method_label(method)}
    for heads, label in HEADS.items():
        option, name = found[heads], label.capitalize()
        out[f"{name}: accuracy"] = percent(one.own(method, heads))
        out[f"{name}: normalised"] = percent(one.cell(method, heads, one.normalised))
        out[f"{name}: gain (95 % interval)"] = gain_text(one.gain(method, heads))
        out[f"{name}: merging and search (s)"] = seconds_text(option.extra) if option and option.merged else MISSING
    known = next(option for option in found.values() if option)
    stored = {"encoders": f"{known.encoders:.3g}", "MB": f"{known.stored / 1e6:.1f}"}
    return out | {f"Stored: {name}": text for name, text in stored.items()} | {"Training (s)": training_text(found)}


def training_text(found: dict[str, Option | None]) -> str:
    """Write the seconds of probes and fine-tuning, which re-probed heads may need more of than kept ones."""
    return seconds_text(max((option.training for option in found.values() if option), default=math.nan))


# ---------------------------------------------------------------- what to pick


def frontier(found: Sequence[Option]) -> list[Option]:
    """Keep of merges, the quickest first, those that validation finds better than every quicker one.

    Those that take at most twice as long as the quickest of them stand for one budget, whose best is kept.
    """
    kept: list[Option] = []
    budget = 0.0
    for option in sorted(found, key=lambda one: (one.extra, -one.validation)):
        if kept and option.validation < kept[-1].validation + STEP:
            continue
        if kept and option.extra <= budget:
            kept[-1] = option
        else:
            kept.append(option)
            budget = SAME_BUDGET * option.extra
    return kept


def picks(board: Board) -> list[Option]:
    """Return the merges worth picking: better than probing, on the frontier, first those that keep one encoder.

    Better is: on validation, and by the interval on the test split where there is one. Merges that keep more than one
    encoder must be better than all that keep one.
    """
    able = [one for one in rivals(board) if _beats(board, one)]
    small = frontier([one for one in able if one.encoders == 1])
    top = max((one.validation + STEP for one in small), default=0.0)
    return small + frontier([one for one in able if one.encoders > 1 and one.validation >= top])


def rivals(board: Board) -> list[Option]:
    """Return the merges that are better than probing on validation, the best first."""
    probing = board.find("probing")
    found = [one for one in board.options if one.merged and (probing is None or one.validation > probing.validation)]
    return sorted(found, key=lambda one: -one.validation)


def _beats(board: Board, option: Option) -> bool:
    gain = board.view.gain(option.method, option.heads)
    return gain.beats or math.isnan(gain.low)


def advice(board: Board) -> str:
    """Say in plain words which option to pick at which budget: picked by validation, told by the test split."""
    chosen = picks(board)
    parts = [_unlearned(board), _without_tuning(board), *_merges(board, chosen), *_alternatives(board, chosen)]
    lead = "Which to pick, in test accuracy" + ("" if board.view.unlearned else " as a share of the individual models'")
    if board.view.mixed:
        lead = lead.replace("test accuracy", "each task's test metric")
    return f"{lead}: " + " ".join(f"{part[0].upper()}{part[1:]}." for part in parts if part)


def _level(board: Board, option: Option) -> str:
    return f"{percent(board.reached(option))} %"


def _named(option: Option) -> str:
    return f"{method_label(option.method)} with {HEADS.get(option.heads, option.heads)}"


def _unlearned(board: Board) -> str:
    """Say why nothing is a share of the individual models."""
    names = board.view.unlearned
    if not names:
        return ""
    whose = f"the individual model{'s' * (len(names) > 1)} of {', '.join(names)} got no validation image right"
    return f"{whose}, so nothing can be normalised, and validation compared mean accuracies"


def _without_tuning(board: Board) -> str:
    probing = board.find("probing")
    if probing is None:
        return ""
    return f"with no fine-tuning, linear probing reaches {_level(board, probing)}"


def _merges(board: Board, chosen: Sequence[Option]) -> list[str]:
    """Write a clause on each pick, the quickest first; where there is none, say so."""
    if not chosen:
        return [_no_merge(board)]
    lead = f"with {_encoders(len(board.view.tasks), 'fine-tuned ')} at hand and one to be kept,"
    small = [one for one in chosen if one.encoders == 1]
    large = [one for one in chosen if one.encoders > 1]
    clauses = [
        f"{_named(one)} reaches {_level(board, one)} after {seconds_text(one.extra)} s of merging and search"
        for one in small
    ]
    out = [f"{lead} {'; '.join(clauses)}"] if clauses else []
    return out + [
        f"with {one.stored / 1e6:.1f} MB stored in place of {_least(board) / 1e6:.1f}, {_named(one)} reaches "
        f"{_level(board, one)}"
        for one in large[-1:]
    ]


def _encoders(count: int, kind: str = "") -> str:
    return f"{count} {kind}encoder{'s' * (count != 1)}"


def _no_merge(board: Board) -> str:
    """Say why nothing is picked: validation prefers probing, or the test split does not confirm what it prefers."""
    best = next(iter(rivals(board)), None)
    if best is None:
        return "no merge is better than that on validation, so fine-tuned encoders are not worth merging here"
    gain = gain_text(board.view.gain(best.method, best.heads))
    found = f"{_named(best)} is the best on validation and no better than that on the test split ({gain} points)"
    return f"{found}, so fine-tuned encoders are not worth merging here"


def _least(board: Board) -> float:
    return min(one.stored for one in board.options)


def _alternatives(board: Board, chosen: Sequence[Option]) -> list[str]:
    """Write what joint training and individual models bring, and cost, against the best pick."""
    best = max(chosen, key=lambda one: one.validation, default=board.find("probing"))
    joint, tuned = board.find("joint"), board.find("fine_tuned")
    out = []
    if joint and best:
        price = f"{seconds_text(joint.training)} s of training on all data at once"
        out.append(f"joint fine-tuning reaches {_level(board, joint)} for {price}, {_against(joint, best)}")
    if tuned and best:
        size = f"{_encoders(round(tuned.encoders))}, {tuned.stored / 1e6:.1f} MB"
        out.append(f"the individual models ({size}) are {_against(tuned, best)}")
    return out


def _against(other: Option, best: Option) -> str:
    verdict = "better" if other.validation >= best.validation + STEP else "no better"
    return f"{verdict} on validation than {'the best merge' if best.merged else 'linear probing'}"


def short_grids(board: Board) -> str:
    """Name the merges that chose, in some seed, the largest of several scales, where a wider grid may give more."""
    found: dict[str, list[str]] = {}
    for method, heads in board.view.tried:
        if ended_early(board.view, method, heads):
            found.setdefault(HEADS.get(heads, heads), []).append(method_label(method))
    if not found:
        return ""
    named = "; ".join(f"{', '.join(methods)} with {heads}" for heads, methods in found.items())
    return f"The largest scale that was tried was chosen by {named}: a wider grid (scales) may give more."


def markdown_boards(found: Sequence[Board], smoke: bool = False) -> str:
    """Write leaderboard.md: for each board a table and, as the last line, which option to pick.

    Of a trial run it has what was measured, and no advice.
    """
    parts = ["# Leaderboard", *([SMOKE] if smoke else []), HOW_IT_READS]
    for board in found:
        parts += [f"## {escape_markdown(board.title)}", markdown_table(measured(board_table(board), smoke))]
        if smoke:
            continue
        parts += [escape_markdown(note)] if (note := short_grids(board)) else []
        if len(guessed := guess_table(board.guesses)):
            parts += [f"### {GUESSING}", HOW_GUESSES_READ, markdown_table(guessed)]
        parts.append(escape_markdown(advice(board)))
    return "\n\n".join(parts) + "\n"
