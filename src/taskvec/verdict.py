"""The verdict of a run in a few sentences: whether merging beat linear probing, by how much, and where."""

from __future__ import annotations

import math
from collections import Counter

import pandas as pd

from taskvec.merging import ADDITION
from taskvec.texts import MISSING, method_label, one_line, percent, points, scale_text, short_backbone
from taskvec.views import HEADS, Gained, View, views

COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
FEW = 4  # backbones and regimes that get a sentence of their own; more are summed up


def headline(results: pd.DataFrame) -> str:
    """Say in one line for each backbone and regime, or for each regime where they are many, what merging gained."""
    found = views(results)
    if len(found) > FEW:
        return "\n".join(_summed_up(found))
    several = len({one.backbone for one in found}) > 1, len({one.regime for one in found}) > 1
    return "\n".join(_verdict(one, *several) for one in found)


# ---------------------------------------------------------------- one backbone in one regime


def _verdict(one: View, name_backbone: bool, name_regime: bool) -> str:
    """Write the sentence on the first method, and one on the best of the others by validation."""
    place = [f"on {short_backbone(one.backbone)}"] if name_backbone else []
    place += [f"in the {one_line(one.regime)} regime"] if name_regime else []
    place += [f"over {one.seeds} seeds"] if one.seeds > 1 else []
    if not one.methods:
        return _sentence(place, f"linear probing reaches {_level(one, 'probing')} and nothing was merged")
    first, *others = one.methods
    text = _sentence(place, f"{_subject(one, first)} {_outcome(one, first)}")
    if not others:
        return text
    best = _best(one, others)
    lead = method_label(best)
    lead += f", the best of {len(others)} other methods on validation," if others[1:] else ""
    return text + " " + _sentence([], f"{lead} {_outcome(one, best)}", capital=False)


def _level(one: View, method: str, heads: str = "kept") -> str:
    """Write the mean over tasks, of metrics that differ in kind as a share of what fine-tuned encoders reach."""
    return f"{percent(one.overall(method, heads))} %{' of fine-tuned' if one.mixed else ''}"


def _best(one: View, methods: list[str]) -> str:
    return max(methods, key=lambda method: one.validation.get(method, -1.0))


def _sentence(place: list[str], text: str, capital: bool = True) -> str:
    whole = ", ".join([" ".join(place), text]) if place else text
    return (whole[0].upper() + whole[1:] if capital else whole) + "."


def _subject(one: View, method: str) -> str:
    count = len(one.tasks)
    vectors = f"the {COUNTS[count] if count < len(COUNTS) else count} task vector{'s' if count != 1 else ''}"
    return f"adding {vectors}" if method == ADDITION else f"merging {vectors} with {method_label(method)}"


def _outcome(one: View, method: str) -> str:
    """Compare a method with probing, kept heads first."""
    gains = [one.gain(method, heads) for heads in one.heads]
    gains = [gain for gain in gains if not math.isnan(gain.mean)]
    if not gains:
        return "was not compared with linear probing"
    mean, unit = "mean " if one.seeds > 1 else "", "normalised points" if one.mixed else "points"
    first = f"gained {points(gains[0].mean)} {unit} over" if gains[0].beats else "did not beat"
    text = f"{first} linear probing with {HEADS[gains[0].heads]} ({_evidence(gains[0], f'{mean}95 % interval ')})"
    return text + "".join(_and_then(gains[0], gain) for gain in gains[1:])


def _and_then(before: Gained, gain: Gained) -> str:
    """Join the second kind of heads so that the sentence stays grammatical in all four cases."""
    words = {
        (True, True): f" and {points(gain.mean)} points with",
        (True, False): " but did not beat it with",
        (False, True): f" but gained {points(gain.mean)} points with",
        (False, False): ", nor with",
    }[before.beats, gain.beats]
    return f"{words} {HEADS[gain.heads]} ({_evidence(gain, '')})"


def _evidence(gain: Gained, interval: str) -> str:
    if gain.stays:
        return "validation chose lambda 0, which is probing itself"
    mean = "" if gain.beats else f"{points(gain.mean, '+')} points, "
    ends = "no interval" if math.isnan(gain.low) else f"{interval}{points(gain.low)} to {points(gain.high)}"
    scale = scale_text(gain.scale)
    return f"{mean}{ends}" + ("" if scale == MISSING else f", lambda {scale}")


# ---------------------------------------------------------------- many backbones and regimes


def _summed_up(found: list[View]) -> list[str]:
    """Write one sentence for each regime, and one on all other methods."""
    regimes = dict.fromkeys(one.regime for one in found)
    lines = [_of_regime([one for one in found if one.regime == regime]) for regime in regimes]
    others = [_best(one, one.methods[1:]) for one in found if one.methods[1:]]
    return lines + ([_of_others(others)] if others else [])


def _of_regime(found: list[View]) -> str:
    """Count on how many backbones of one regime the first method beat probing, with its gains and the best backbone."""
    place = [f"in the {one_line(found[0].regime)} regime"]
    merged = [one for one in found if one.methods]
    parts = [part for heads in HEADS if (part := _count(merged, heads))]
    if not parts:
        return _sentence(place, "merging was not compared with linear probing")
    text = f"{_subject(merged[0], merged[0].methods[0])} beat linear probing {', and '.join(parts)}"
    return _sentence(place, f"{text}; {_highest(merged)}")


def _highest(merged: list[View]) -> str:
    """Name the backbone with the highest mean after merging, over both kinds of heads."""
    found = [(one.overall(one.methods[0], heads).mean, heads, one) for one in merged for heads in one.heads]
    _, heads, one = max(found, key=lambda entry: -1.0 if math.isnan(entry[0]) else entry[0])
    probing = percent(one.overall("probing"))
    level = _level(one, one.methods[0], heads)
    return f"{short_backbone(one.backbone)} ends highest, at {level} (probing {probing}, {HEADS[heads]})"


def _count(found: list[View], heads: str) -> str:
    """Write the part of the sentence on one kind of heads; empty where nothing was compared."""
    gains = {one.backbone: one.gain(one.methods[0], heads) for one in found}
    gains = {backbone: gain for backbone, gain in gains.items() if not math.isnan(gain.mean)}
    if not gains:
        return ""
    beat = sum(gain.beats for gain in gains.values())
    ends = sorted(gains, key=lambda backbone: gains[backbone].mean)
    named = [f"{points(gains[name].mean, '+')} ({short_backbone(name)})" for name in (ends[0], ends[-1])]
    run = f"gains from {' to '.join(named)} points" if len(gains) > 1 else f"{named[0]} points"
    return f"on {beat} of {len(gains)} backbone{'s' * (len(gains) > 1)} with {HEADS[heads]}, {run}"


def _of_others(best: list[str]) -> str:
    """Say which other method was the best on validation most often."""
    (method, times), *_ = Counter(best).most_common()
    lead = f"of the other methods, {method_label(method)} was the best on validation most often"
    return _sentence([], f"{lead}, in {times} of {len(best)} pairs of a backbone and a regime")
