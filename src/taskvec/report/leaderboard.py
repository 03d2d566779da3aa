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
from taskvec.report.views import Method, Spread, View, costs_of, name_of, views

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
        return self.view.result(option.method, option.heads) if math.isnan(normalised.mean) else normalised

    def find(self, method: Method, heads: str = "kept") -> Option | None:
        """Return one option, None where it was not measured."""
        wanted = name_of(method), heads
        return next((option for option in self.options if (option.method.name, option.heads) == wanted), None)

    @cached_property
    def methods(self) -> list[Variant]:
        """Name the merging methods, the best on validation with either kind of heads first."""
        merged = sorted((option for option in self.options if option.merged), key=lambda option: -option.validation)
        return list(dict.fromkeys(option.method for option in merged))


def boards(results: pd.DataFrame, costs: pd.DataFrame | None) -> list[Board]:
    """Return a board for every backbone and regime in which several methods were merged and costs are known."""
    if costs is None or costs.empty:
        return []
    merged = [view for view in views(results) if view.methods[1:]]
    return [Board(view, tuple(options(view, costs)), tuple(guesses(view, costs))) for view in merged]


def options(view: View, costs: pd.DataFrame) -> list[Option]:
    """Return the options of a view, in the order of its costs; those without a validation value are left out."""
    spent = costs_of(view, costs)
    sums = spent.assign(
        training=spent["probing_seconds"] + spent["training_seconds"],
        extra=spent["merging_seconds"] + spent["search_seconds"],
    )
    means = sums.groupby(["variant", "heads"], sort=False)[["encoders", "stored", "training", "extra"]].mean()
    scores = {(method.name, heads): (method, heads, value) for (method, heads), value in view.validation_scores.items()}
    rows = zip(means.index, means.to_numpy(), strict=True)
    return [Option(*scores[option], *map(float, row)) for option, row in rows if option in scores]


# ---------------------------------------------------------------- the table


def board_table(board: Board) -> pd.DataFrame:
    """Put each method in one row, kept and re-probed heads side by side with their costs; the baselines come first."""
    rows = [_row(board, method) for method in ALONE if board.find(method)]
    frame = pd.DataFrame(rows + [_row(board, method) for method in board.methods])
    return frame.loc[:, [(frame[column] != MISSING).any() for column in frame.columns]]


def _row(board: Board, method: Method) -> dict[str, str]:
    view, by_heads = board.view, {heads: board.find(method, heads) for heads in HEADS}
    out = {"Method": ALONE.get(name_of(method)) or method_label(method)}
    for heads, label in HEADS.items():
        option, name = by_heads[heads], label.capitalize()
        out[f"{name}: accuracy"] = percent(view.result(method, heads))
        out[f"{name}: normalised"] = percent(view.cell(method, heads, view.normalised))
        out[f"{name}: gain (95 % interval)"] = gain_text(view.gain(method, heads))
        out[f"{name}: merging and search (s)"] = seconds_text(option.extra) if option and option.merged else MISSING
    any_option = next(option for option in by_heads.values() if option)
    stored = {"encoders": f"{any_option.encoders:.3g}", "MB": f"{any_option.stored / 1e6:.1f}"}
    return out | {f"Stored: {name}": text for name, text in stored.items()} | {"Training (s)": training_text(by_heads)}


def training_text(by_heads: dict[str, Option | None]) -> str:
    """Write the seconds of probes and fine-tuning, which re-probed heads may need more of than kept ones."""
    return seconds_text(max((option.training for option in by_heads.values() if option), default=math.nan))


# ---------------------------------------------------------------- what to pick


def frontier(merges: Sequence[Option]) -> list[Option]:
    """Keep of merges, the quickest first, those that validation finds better than every quicker one.

    Those that take at most twice as long as the quickest of them stand for one budget, whose best is kept.
    """
    best: list[Option] = []
    budget = 0.0
    for option in sorted(merges, key=lambda option: (option.extra, -option.validation)):
        if best and option.validation < best[-1].validation + STEP:
            continue
        if best and option.extra <= budget:
            best[-1] = option
        else:
            best.append(option)
            budget = SAME_BUDGET * option.extra
    return best


def picks(board: Board) -> list[Option]:
    """Return the merges worth picking: better than probing, on the frontier, first those that keep one encoder.

    Better is: on validation, and by the interval on the test split where there is one. Merges that keep more than one
    encoder must be better than all that keep one.
    """
    better = [option for option in rivals(board) if _beats(board, option)]
    small = frontier([option for option in better if option.encoders == 1])
    top = max((option.validation + STEP for option in small), default=0.0)
    return small + frontier([option for option in better if option.encoders > 1 and option.validation >= top])


def rivals(board: Board) -> list[Option]:
    """Return the merges that are better than probing on validation, the best first."""
    probing = board.find("probing")
    floor = -math.inf if probing is None else probing.validation
    better = [option for option in board.options if option.merged and option.validation > floor]
    return sorted(better, key=lambda option: -option.validation)


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
    small = [option for option in chosen if option.encoders == 1]
    large = [option for option in chosen if option.encoders > 1]
    clauses = [
        f"{_named(option)} reaches {_level(board, option)} after {seconds_text(option.extra)} s of merging and search"
        for option in small
    ]
    out = [f"{lead} {'; '.join(clauses)}"] if clauses else []
    return out + [
        f"with {option.stored / 1e6:.1f} MB stored in place of {_least(board) / 1e6:.1f}, {_named(option)} reaches "
        f"{_level(board, option)}"
        for option in large[-1:]
    ]


def _encoders(count: int, kind: str = "") -> str:
    return f"{count} {kind}encoder{'s' * (count != 1)}"


def _no_merge(board: Board) -> str:
    """Say why nothing is picked: validation prefers probing, or the test split does not confirm what it prefers."""
    best = next(iter(rivals(board)), None)
    if best is None:
        return "no merge is better than that on validation, so fine-tuned encoders are not worth merging here"
    gain = gain_text(board.view.gain(best.method, best.heads))
    text = f"{_named(best)} is the best on validation and no better than that on the test split ({gain} points)"
    return f"{text}, so fine-tuned encoders are not worth merging here"


def _least(board: Board) -> float:
    return min(option.stored for option in board.options)


def _alternatives(board: Board, chosen: Sequence[Option]) -> list[str]:
    """Write what joint training and individual models bring, and cost, against the best pick."""
    best = max(chosen, key=lambda option: option.validation, default=board.find("probing"))
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
    by_heads: dict[str, list[str]] = {}
    for method, heads in board.view.validation_scores:
        if ended_early(board.view, method, heads):
            by_heads.setdefault(HEADS.get(heads, heads), []).append(method_label(method))
    if not by_heads:
        return ""
    named = "; ".join(f"{', '.join(methods)} with {heads}" for heads, methods in by_heads.items())
    return f"The largest scale that was tried was chosen by {named}: a wider grid (scales) may give more."


def markdown_boards(all_boards: Sequence[Board], smoke: bool = False) -> str:
    """Write leaderboard.md: for each board a table and, as the last line, which option to pick.

    Of a trial run it has what was measured, and no advice.
    """
    parts = ["# Leaderboard", *([SMOKE] if smoke else []), HOW_IT_READS]
    for board in all_boards:
        parts += [f"## {escape_markdown(board.title)}", markdown_table(measured(board_table(board), smoke))]
        if smoke:
            continue
        parts += [escape_markdown(note)] if (note := short_grids(board)) else []
        if len(guess_rows := guess_table(board.guesses)):
            parts += [f"### {GUESSING}", HOW_GUESSES_READ, markdown_table(guess_rows)]
        parts.append(escape_markdown(advice(board)))
    return "\n\n".join(parts) + "\n"
