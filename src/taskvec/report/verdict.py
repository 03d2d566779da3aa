"""The verdict of a run: what one encoder reaches against probing and separate ones, what is kept, and what failed."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pandas as pd

from taskvec.learning.head_modes import HEADS
from taskvec.merging.variants import ADDED, DIFFERENCES, Variant
from taskvec.report.texts import (
    MISSING,
    method_label,
    one_line,
    percent,
    plain_scale,
    points,
    scale_text,
    short_backbone,
)
from taskvec.report.views import BASELINES, Gain, Method, View, costs_of, views

COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
FEW = 4  # backbones and regimes that get sentences of their own; more are summed up
SMOKE = "SMOKE RUN: 2 steps, at most 32 images a split: everything ran, and its numbers mean nothing."
"""What a trial run says in the place of a verdict."""
PROBING = (Variant("probing"), "kept")


def headline(
    results: pd.DataFrame, costs: pd.DataFrame | None = None, lock: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """Say in one line for each backbone and regime, or for each regime where they are many, what was found.

    ``costs`` adds what is stored; ``lock`` says which models were kept, and of a trial run that it is one.
    """
    all_views = views(results)
    if lock.get("smoke"):
        return SMOKE
    several = len({view.backbone for view in all_views}) > 1, len({view.regime for view in all_views}) > 1
    many = len(all_views) > FEW
    lines = _summed_up(all_views) if many else [_Verdict(view, *several, costs).text() for view in all_views]
    models = lock.get("models", {})
    more = len(models) > 1 or len(all_views) > 1 or all_views[0].seeds > 1
    return "\n".join([*lines, _models(models)] if models and more else lines)


def usage(lock: Mapping[str, Any], folder: str = ".") -> str:
    """Write the command that uses the model of a run folder, by default the one it is given in; empty without one."""
    if not lock.get("models") or lock.get("smoke"):
        return ""
    return f"taskvec predict {shlex.quote(folder)} image.jpg"


def number(count: int) -> str:
    """Write a small number as a word."""
    return COUNTS[count] if count < len(COUNTS) else str(count)


def _models(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Name the model that is kept for every backbone."""
    parts = []
    for backbone, about in models.items():
        probing = about["method"] == "probing"
        variant = Variant(about["method"], **{key: about[key] for key in DIFFERENCES if key in about})
        what = "linear probing" if probing else _described(variant, about["heads"])
        scale = "" if probing else f", lambda {plain_scale(about['scale'])}"
        parts.append(f"{short_backbone(backbone)}: {what}{scale} ({one_line(about['regime'])}, seed {about['seed']})")
    return f"Kept in models/, the best on validation: {'; '.join(parts)}."


def _described(method: Method, heads: str) -> str:
    return f"{method_label(method)} with {HEADS[heads]}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


# ---------------------------------------------------------------- one backbone in one regime


@dataclass(frozen=True)
class _Verdict:
    """The sentences on one backbone in one regime, which are named where there are several."""

    view: View
    name_backbone: bool
    name_regime: bool
    costs: pd.DataFrame | None

    def text(self) -> str:
        """Write one sentence on the answer and what is stored, and one on the paper's addition and what failed."""
        answer, more = [self.place() + self.answer(), self.storage()], [*self.others(), *failures(self.view)]
        return " ".join(_sentence("; ".join(filter(None, parts))) for parts in (answer, more) if parts)

    def place(self) -> str:
        """Name backbone, regime and seeds where they need to be told."""
        place = [f"on {short_backbone(self.view.backbone)}"] if self.name_backbone else []
        place += [f"in the {one_line(self.view.regime)} regime"] if self.name_regime else []
        place += [f"over {self.view.seeds} seeds"] if self.view.seeds > 1 else []
        return f"{' '.join(place)}, " if place else ""

    def answer(self) -> str:
        """Say what the option reaches that validation chose, against probing and against separate encoders."""
        view, kept = self.view, self.view.selected
        if kept == PROBING:
            reached = f"linear probing, one encoder{self._tasks()}, reaches {level(view, *PROBING)}{self._share(*kept)}"
            return f"{reached}: {'no merge was better on validation' if view.methods else 'nothing was merged'}"
        gain = view.gain(*kept)
        scale = scale_text(view.result(*kept))
        how = _described(*kept) + ("" if scale == MISSING else f", lambda {scale}")
        text = f"{self._subject()} ({how}) reaches {level(view, *kept)}{self._share(*kept)}"
        return f"{text}, and {against_probing(view, gain)}"

    def _subject(self) -> str:
        stored = self._stored()
        return f"one {'model' if stored is not None and stored[0] > 1 else 'encoder'}{self._tasks()}"

    def _tasks(self) -> str:
        count = len(self.view.tasks)
        every = "both" if count == 2 else f"all {number(count)}"
        return f" for {every} tasks" if count > 1 else " for the one task"

    def _share(self, method: Method, heads: str) -> str:
        """Compare with one fine-tuned encoder for each task; what is mixed was compared in its level already."""
        view, count = self.view, len(self.view.tasks)
        tuned, share = view.overall("fine_tuned"), view.cell(method, heads, view.normalised)
        if view.mixed or math.isnan(tuned.mean):
            return ""
        separate = f"{number(count)} separate fine-tuned encoders" if count > 1 else "a fine-tuned encoder"
        behind = view.gain(method, heads, over="fine_tuned")
        apart = "" if math.isnan(behind.mean) else f"; {points(behind.mean, '+')} points{interval(behind, ', ')}"
        if math.isnan(share.mean):
            return f" ({separate}: {percent(tuned)} %{apart})"
        return f", {percent(share)} % of {separate} ({percent(tuned)} %{apart})"

    def _stored(self) -> tuple[float, float, float] | None:
        """Return the encoders that the kept option stores, its bytes, and those of the separate encoders."""
        if self.costs is None or self.costs.empty:
            return None
        means = costs_of(self.view, self.costs).groupby(["variant", "heads"])[["encoders", "stored"]].mean()
        stored = {key: values for key, *values in zip(means.index, means["encoders"], means["stored"], strict=True)}
        tuned, (method, heads) = stored.get(("fine_tuned", "kept")), self.view.selected
        if (method.name, heads) not in stored or tuned is None:
            return None
        encoders, size = stored[method.name, heads]
        return encoders, size, tuned[1]

    def storage(self) -> str:
        """Say what the kept option stores in place of one encoder a task."""
        storage, count = self._stored(), len(self.view.tasks)
        if storage is None or count == 1:
            return ""
        encoders, size, separate = storage
        heads = f"{number(round(encoders))} encoder{'s' * (encoders > 1)} and {number(count)} heads"
        return f"it stores {heads}, {size / 1e6:.1f} MB in place of {separate / 1e6:.1f} MB"

    def others(self) -> Iterator[str]:
        """Say what the first method gained, and the best confirmed merge where the kept one is not better."""
        view = self.view
        mentioned = {view.selected}
        for method in view.methods[:1]:
            kinds = [heads for heads in view.heads if (method, heads) != view.selected]
            mentioned |= {(method, heads) for heads in kinds}
            if kinds:
                yield f"{_merging(view, method)} {outcome(view, method, kinds)}"
        others = [key for key in view.validation_scores if key[0].method not in BASELINES and key not in mentioned]
        confirmed = [key for key in others if view.gain(*key).beats]
        if confirmed and view.selected != PROBING and not view.gain(*view.selected).beats:
            method, heads = max(confirmed, key=view.validation_scores.__getitem__)
            yield f"of the others, {method_label(method)} {outcome(view, method, [heads])}"


def level(view: View, method: Method, heads: str) -> str:
    """Write the mean over tasks, of metrics that differ in kind as a share of what fine-tuned encoders reach."""
    return f"{percent(view.overall(method, heads))} %{' of fine-tuned' if view.mixed else ''}"


def interval(gain: Gain, lead: str = "") -> str:
    """Write a 95 % interval, of which several seeds have the mean; nothing where there is none."""
    if math.isnan(gain.low):
        return ""
    return f"{lead}95 % interval {points(gain.low)} to {points(gain.high)}"


def against_probing(view: View, gain: Gain) -> str:
    """Say whether the interval of a gain lies above zero, below or across; without one, only how large it is."""
    unit, probing = "normalised points" if view.mixed else "points", f"linear probing ({level(view, *PROBING)})"
    if math.isnan(gain.mean):
        return f"was not compared with {probing}"
    if math.isnan(gain.low):
        return f"is {points(gain.mean, '+')} {unit} from {probing}, without an interval"
    ends = interval(gain, ", ")
    if gain.beats:
        return f"beats {probing} by {points(gain.mean)} {unit}{ends}"
    verdict = "is worse than" if gain.loses else "is no better than"
    return f"{verdict} {probing}: {points(gain.mean, '+')} {unit}{ends}"


def _merging(view: View, method: Method) -> str:
    count = len(view.tasks)
    vectors = f"the {number(count)} task vector{'s' if count != 1 else ''}"
    return f"adding {vectors}" if method == ADDED else f"merging {vectors} with {method_label(method)}"


def outcome(view: View, method: Method, heads: list[str]) -> str:
    """Compare a method with probing, with some kinds of heads."""
    gains = [gain for kind in heads if not math.isnan((gain := view.gain(method, kind)).mean)]
    if not gains:
        return "was not compared with linear probing"
    unit = "normalised points" if view.mixed else "points"
    if any(math.isnan(gain.low) for gain in gains):
        clauses = (f"{points(gain.mean, '+')} {unit} with {HEADS[gain.heads]}" for gain in gains)
        return f"moved linear probing by {' and '.join(clauses)}, without an interval"
    first = f"gained {points(gains[0].mean)} {unit} over" if gains[0].beats else "did not beat"
    text = f"{first} linear probing with {HEADS[gains[0].heads]} ({_evidence(gains[0])})"
    return text + "".join(_and_then(gains[0], gain) for gain in gains[1:])


def _and_then(before: Gain, gain: Gain) -> str:
    """Join the second kind of heads so that the sentence stays grammatical in all four cases."""
    words = {
        (True, True): f" and {points(gain.mean)} points with",
        (True, False): " but did not beat it with",
        (False, True): f" but gained {points(gain.mean)} points with",
        (False, False): ", nor with",
    }[before.beats, gain.beats]
    return f"{words} {HEADS[gain.heads]} ({_evidence(gain)})"


def _evidence(gain: Gain) -> str:
    if gain.adds_nothing:
        return "validation chose lambda 0, which is probing itself"
    parts = [] if gain.beats else [f"{points(gain.mean, '+')} points"]
    parts += [f"{points(gain.low)} to {points(gain.high)}"]
    scale = scale_text(gain.scale)
    return ", ".join(parts + ([] if scale == MISSING else [f"lambda {scale}"]))


# ---------------------------------------------------------------- what failed


def failures(view: View) -> Iterator[str]:
    """Name what went wrong in one backbone and regime: fine-tuning, its learning rates, a grid that ended too early."""
    yield from _tuning(view)
    diverged = [rate for rate, value in view.learning_rates.items() if value == 0]
    if diverged:
        yield f"training diverged, or learned nothing, at learning rate {', '.join(f'{rate:g}' for rate in diverged)}"
    if view.selected != PROBING and ended_early(view, *view.selected):
        yield "its lambda is the largest that was tried: a wider grid (scales) may give more"


def _tuning(view: View) -> Iterator[str]:
    """Say on which tasks a fine-tuned encoder is worse than its own probe, or answers exactly as it does."""
    tuned, probing = ({task: view.result(m, task=task).mean for task in view.tasks} for m in ("fine_tuned", "probing"))
    gains = {task: tuned[task] - probing[task] for task in view.tasks}
    below = [one_line(task) for task, gain in gains.items() if gain < 0]
    if len(below) > len(gains) / 2:
        levels = (
            ""
            if view.mixed
            else f" ({percent(view.overall('fine_tuned'))} against {percent(view.overall('probing'))} %)"
        )
        which = "all tasks" if len(below) == len(gains) else f"{len(below)} of {len(gains)} tasks"
        advice = "its learning rate or steps do not suit" if len(gains) > 1 else "learning rate or steps do not suit"
        yield f"fine-tuning itself failed: it ends below its own probe on {which}{levels}; {advice}"
    elif below:
        yield f"fine-tuning itself failed on {_some(below)}: it ends below its own probe there"
    unchanged = [one_line(task) for task, gain in gains.items() if gain == 0 and view.unchanged(task)]
    if unchanged:
        yield f"fine-tuning changed no result on {_some(unchanged)}: its task vector may be zero"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 5 else ""
    return ", ".join(names[: 4 if more else 5]) + more


def ended_early(view: View, method: Method, heads: str) -> bool:
    """Say whether a merge chose, in some seed, the largest of several scales."""
    rows = view.of(method, heads)
    scales = rows.loc[(rows["split"] == "validation") & (rows["task"] == ""), "scale"]
    return scales.nunique() > 1 and view.cell(method, heads, view.normalised).high >= scales.max()


# ---------------------------------------------------------------- many backbones and regimes


def _summed_up(all_views: list[View]) -> list[str]:
    """Write one sentence for each regime, one on all other methods, and one on what failed."""
    regimes = dict.fromkeys(view.regime for view in all_views)
    lines = [_of_regime([view for view in all_views if view.regime == regime]) for regime in regimes]
    several = [view for view in all_views if view.methods[1:]]
    best = [max(view.methods[1:], key=lambda method: view.validation.get(method, -1.0)) for view in several]
    lines += [_of_others(best)] if best else []
    failed = {(view.backbone, view.regime): said for view in all_views if (said := list(_tuning(view)))}
    named = [f"{short_backbone(backbone)} ({one_line(regime)})" for backbone, regime in failed]
    return lines + ([f"Fine-tuning ends below its own probe on some tasks: {_some(named)}."] if named else [])


def _of_regime(all_views: list[View]) -> str:
    """Count on how many backbones of one regime the first method beat probing, with its gains and the best backbone."""
    place = f"in the {one_line(all_views[0].regime)} regime, "
    merged = [view for view in all_views if view.methods]
    parts = [part for heads in HEADS if (part := _count(merged, heads))]
    if not parts:
        return _sentence(f"{place}merging was not compared with linear probing")
    first, several = merged[0], f"beat linear probing {', and '.join(parts)}"
    outcome_text = several if len(merged) > 1 else outcome(first, first.methods[0], first.heads)
    return _sentence(f"{place}{_merging(first, first.methods[0])} {outcome_text}; {_highest(merged)}")


def _highest(merged: list[View]) -> str:
    """Name the backbone that the first method brings highest on validation, and what it reaches on the test split."""
    places = [(view, heads) for view in merged for heads in view.heads]
    view, heads = max(places, key=lambda place: place[0].validation_level(place[0].methods[0], place[1]))
    probing, reached = percent(view.overall("probing")), level(view, view.methods[0], heads)
    share = view.cell(view.methods[0], heads, view.normalised)
    of = "" if view.mixed or math.isnan(share.mean) else f", {percent(share)} % of separate fine-tuned encoders"
    name = short_backbone(view.backbone) + (" is the best on validation and" if len(merged) > 1 else "")
    return f"{name} reaches {reached}{of} (probing {probing}, {HEADS[heads]})"


def _count(all_views: list[View], heads: str) -> str:
    """Write the part of the sentence on one kind of heads; empty where nothing was compared."""
    gains = {view.backbone: view.gain(view.methods[0], heads) for view in all_views}
    gains = {backbone: gain for backbone, gain in gains.items() if not math.isnan(gain.mean)}
    if not gains:
        return ""
    beat = sum(gain.beats for gain in gains.values())
    ends = sorted(gains, key=lambda backbone: gains[backbone].mean)
    named = [f"{points(gains[name].mean, '+')} ({short_backbone(name)})" for name in (ends[0], ends[-1])]
    run = f"gains from {' to '.join(named)} points" if len(gains) > 1 else f"{named[0]} points"
    return f"on {beat} of {len(gains)} backbone{'s' * (len(gains) > 1)} with {HEADS[heads]}, {run}"


def _of_others(best: list[Variant]) -> str:
    """Say which other method was the best on validation most often."""
    (method, times), *_ = Counter(best).most_common()
    lead = f"of the other methods, {method_label(method)} was the best on validation most often"
    return _sentence(f"{lead}, in {times} of {len(best)} pairs of a backbone and a regime")
