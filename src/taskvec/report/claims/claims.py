"""The paper's claims as inequalities between measured numbers, each with a margin, an interval and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product

import numpy as np
import pandas as pd

from taskvec.merging.registry import ADDITION
from taskvec.paper import numbers as paper
from taskvec.report.claims.data import (
    FEWEST,
    ClaimData,
    Estimate,
    Measure,
    against_threshold,
    exact,
    of_gain,
    paired_difference,
)
from taskvec.report.claims.rows import COLUMNS, row
from taskvec.report.texts import points, scale_text, short_backbone
from taskvec.report.views import View, line_search

SMALL_SCALE = 0.15  # the largest best lambda of the paper's Table 1
COST = 3.0  # points of accuracy that probing may lose and still compete
FAR = 10.0  # points
HIGH = 80.0  # % of normalised accuracy
STEADY = 0.5  # points that a falling curve may rise from one scale to the next
STRAIGHT = 0.9  # share of the variance that a line explains
HOW_CLAIMS_ARE_DECIDED = (
    "Each claim is an inequality, and its margin says how far the measured numbers lie on the claimed side, in points "
    "(in λ or R² where the claim is on one of them). It holds "
    "if the whole 95 % interval of the margin lies on that side, does not hold if it lies on the other, and is "
    "undecided between; where no interval is given the margin alone decides. Of several backbones the claim holds only "
    "if it does for each; shown is the one with the smallest margin of those that decide. Intervals of gains are "
    "paired bootstraps over test images, all others Student's over tasks, pairs or sets of tasks, none for fewer than "
    f"{FEWEST}; pairs and sets share tasks, so that theirs are somewhat narrow, and none covers the spread over seeds. "
    "Regimes are compared on the seeds that both have. The paper's numbers are those of its own checkpoints and tasks."
)


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{found[0]:.1f} to {found[-1]:.1f}"


def _printed(keys: Iterable[str], regime: str) -> dict[str, paper.Numbers]:
    return {key: paper.MODELS[key].numbers(regime) for key in keys}


# ---------------------------------------------------------------- addition and probing


def addition_gains(data: ClaimData) -> list[dict[str, str]]:
    """Addition beats probing: the gain is above zero; on DINO it is not."""
    needs = "addition with kept heads and its gain over probing in the aligned regime"
    found = {key: one for key, one in data.merged(paper.MODELS, "aligned").items() if not _no_gain(one)}
    rows = [_beats(key, one, needs) for key, one in found.items()]
    return rows or [row("Addition beats probing", "Table 1", [], needs)]


def _no_gain(one: View) -> bool:
    return math.isnan(one.gain(ADDITION).mean)


def _beats(key: str, one: View, needs: str) -> dict[str, str]:
    """Write the gain of one backbone; DINO's claim is the opposite and allows zero."""
    model, gain = paper.MODELS[key], one.gain(ADDITION)
    words = f"{short_backbone(one.backbone)} {points(gain.mean, '+')} at λ = {scale_text(gain.scale)}"
    printed = f"{model.numbers('aligned').gain + 0.0:+.1f} at λ = {model.numbers('aligned').scale:.2f}"
    if key == paper.DINO:
        claim = f"Addition gains nothing over probing on {model.name}"
        return row(claim, printed, [of_gain(words, gain, sign=-1)], needs, strict=False)
    return row(f"Addition beats probing on {model.name}", printed, [of_gain(words, gain)], needs)


def probing_competes(data: ClaimData) -> dict[str, str]:
    """Probing is competitive: addition gains three points or less on every backbone."""
    found = [one for one in data.merged(paper.MODELS, "aligned").values() if not _no_gain(one)]
    gains = {short_backbone(one.backbone): one.gain(ADDITION) for one in found}
    estimates = [of_gain(f"{name} {points(gain.mean, '+')}", gain, -1, COST) for name, gain in gains.items()]
    printed = _range(numbers.gain for numbers in _printed(paper.MODELS, "aligned").values())
    claim = f"Probing is competitive (contribution 4): addition gains {COST:.0f} points or less"
    return row(claim, printed, estimates, "addition and probing in the aligned regime", strict=False)


def small_scales(data: ClaimData) -> dict[str, str]:
    """The best lambda is small: at most 0.15 on every backbone and seed."""
    found = data.merged(paper.MODELS, "aligned").values()
    cells = {short_backbone(one.backbone): one.cell(ADDITION) for one in found}
    estimates = [exact(f"{name} λ = {scale_text(cell)}", SMALL_SCALE - cell.high) for name, cell in cells.items()]
    claim = f"The best λ is small: {SMALL_SCALE:.2f} or less"
    return row(claim, "0.00 to 0.15", estimates, "addition in the aligned regime", strict=False)


def falls_past_the_best(data: ClaimData) -> dict[str, str]:
    """Past the best lambda normalised accuracy on validation falls: no step up of more than half a point."""
    found = data.merged(paper.MODELS, "aligned").values()
    estimates = [estimate for one in found for estimate in _fall(one)]
    claim = f"Past the best λ accuracy only falls: no step of λ gains more than {STEADY} points"
    return row(claim, "Figure 2", estimates, "a line search in the aligned regime", strict=False)


def _fall(one: View) -> list[Estimate]:
    """Measure the largest rise from one scale to the next past the best; nothing where the best is the last."""
    curve = line_search(one, ADDITION, "kept")["mean"].to_numpy(float)
    past = curve[int(np.argmax(curve)) :] if curve.size else curve
    if past.size < 2:
        return []
    rise = float(max(0.0, np.diff(past).max()))
    words = f"{short_backbone(one.backbone)} rises by {rise:.1f} at most and loses {past[0] - past[-1]:.1f} in all"
    return [exact(words, STEADY - rise)]


def high_addition(data: ClaimData) -> dict[str, str]:
    """Addition performs well: normalised accuracy of 80 % or more on every backbone but MAE."""
    keys = [key for key in paper.MODELS if key != paper.MAE]
    measures = [data.addition(one, "aligned", "normalised_accuracy") for one in data.of(keys)]
    estimates = [estimate for measure in measures for estimate in against_threshold(measure, HIGH, "tasks")]
    printed = _range(numbers.normalised for numbers in _printed(keys, "aligned").values())
    claim = f"Addition performs well (contribution 3): {HIGH:.0f} % normalised or more, but for MAE"
    return row(claim, printed, estimates, "normalised accuracy in the aligned regime", strict=False)


def contrastive_adds_best(data: ClaimData) -> dict[str, str]:
    """Contrastive pre-training is best: every CLIP of the base size is above every other backbone of that size."""
    others = [key for key in paper.BASES if key not in paper.CONTRASTIVE]
    best = [key for key in paper.BASES if key in paper.CONTRASTIVE]
    pairs = product(data.of(best), data.of(others))
    compared = [paired_difference(data.addition(a, "aligned"), data.addition(b, "aligned"), "tasks") for a, b in pairs]
    printed = f"{_printed(best, 'aligned')[best[1]].absolute}, DINO {_printed(others, 'aligned')[paper.DINO].absolute}"
    needs = f"CLIP and another {paper.BASE} in the aligned regime"
    return row("CLIP has the best addition accuracy (aligned)", f"CLIP {printed}", _flat(compared), needs)


def mae_adds_worst(data: ClaimData, regime: str) -> dict[str, str]:
    """MAE is worst: every other backbone of its size is above it."""
    others = [key for key in paper.BASES if key != paper.MAE]
    pairs = product(data.of(others), data.of([paper.MAE]))
    compared = [paired_difference(data.addition(a, regime), data.addition(b, regime), "tasks") for a, b in pairs]
    numbers = _printed(others, regime).values()
    printed = f"MAE {paper.MODELS[paper.MAE].numbers(regime).absolute}, others {_range(n.absolute for n in numbers)}"
    needs = f"MAE and another {paper.BASE} in the {regime} regime"
    return row(f"MAE has the worst addition accuracy ({regime})", printed, _flat(compared), needs)


def _flat(estimates: Iterable[list[Estimate]]) -> list[Estimate]:
    return [estimate for some in estimates for estimate in some]


# ---------------------------------------------------------------- data size and model scale


def more_is_better(data: ClaimData, what: str, less: str, more: str) -> list[dict[str, str]]:
    """More data, or a larger model: higher addition accuracy in both regimes, and a lower error in the box."""
    pair = f"{paper.MODELS[more].name} over {paper.MODELS[less].name}"
    found = []
    for regime in ("aligned", "full"):
        compared = [
            paired_difference(data.addition(b, regime), data.addition(a, regime), "tasks")
            for a, b in _both(data, less, more)
        ]
        printed = ", ".join(str(paper.MODELS[key].numbers(regime).absolute) for key in (more, less))
        needs = f"addition of both backbones, {regime}"
        found.append(row(f"{what} adds better: {pair} ({regime})", printed, _flat(compared), needs))
    compared = [
        paired_difference(data.error(a, "aligned"), data.error(b, "aligned"), "pairs")
        for a, b in _both(data, less, more)
    ]
    figure = "Figure 4" if paper.MODELS[less].size != paper.MODELS[more].size else "Figure 3"
    claim = f"{what} has a lower ξ: {pair} (aligned)"
    return [*found, row(claim, figure, _flat(compared), "heatmaps of both backbones, aligned")]


def _both(data: ClaimData, first: str, second: str) -> list[tuple[str, str]]:
    return list(product(data.of([first]), data.of([second])))


def more_data(data: ClaimData) -> list[dict[str, str]]:
    """More pre-training data is better, for supervised and for contrastive backbones."""
    return [found for less, more in paper.MORE_DATA for found in more_is_better(data, "More data", less, more)]


def larger_models(data: ClaimData) -> list[dict[str, str]]:
    """A larger model is better: the supervised pair of the paper's figures, and CLIP's where both are there."""
    first, *others = paper.LARGER
    pairs = [first, *(pair for pair in others if len(data.of(pair)) == 2)]
    return [found for less, more in pairs for found in more_is_better(data, "A larger model", less, more)]


# ---------------------------------------------------------------- regimes


def probing_beats_open(data: ClaimData) -> dict[str, str]:
    """Probing a closed model beats open addition: on the same CLIP the open gain over probing is below zero."""
    found = [one for one in data.merged(paper.CONTRASTIVE, "open").values() if not _no_gain(one)]
    estimates = [of_gain(_against_probing(one), one.gain(ADDITION), sign=-1) for one in found]
    numbers = paper.MODELS[paper.CLIP]
    printed = f"probing {numbers.numbers('aligned').start}, addition {numbers.numbers('open').absolute:.1f}"
    claim = "Probing beats open-vocabulary addition on the same CLIP (contribution 4)"
    return row(claim, printed, estimates, "a CLIP backbone in the open regime")


def _against_probing(one: View) -> str:
    probing, added = (points(one.cell(method).mean) for method in ("probing", ADDITION))
    return f"{short_backbone(one.backbone)} probing {probing}, addition {added}"


def open_full_above_closed_full(data: ClaimData) -> dict[str, str]:
    """Open full fine-tuning is far above closed: ten points or more on the same CLIP."""
    found = [_far_above(data, one, "open-full", "full") for one in data.of(paper.CONTRASTIVE)]
    numbers = paper.MODELS[paper.CLIP]
    printed = f"{numbers.numbers('open-full').absolute:.1f}, {numbers.numbers('full').absolute}"
    claim = f"Addition after open-full is far above full on the same CLIP: by {FAR:.0f} points or more"
    needs = "a CLIP backbone in open-full, and in full on the same tasks"
    return row(claim, printed, _flat(found), needs, strict=False)


def _far_above(data: ClaimData, backbone: str, higher: str, lower: str) -> list[Estimate]:
    """Compare two regimes of one backbone, each merging the tasks that the first one has."""
    among, same = data.tasks(backbone, higher), data.paired(backbone, (higher, lower))
    first, second = (same.addition(backbone, regime, among=among).called(regime) for regime in (higher, lower))
    return paired_difference(first, second, "tasks", FAR)


def full_below_aligned(data: ClaimData) -> dict[str, str]:
    """Full fine-tuning adds far worse than aligned: by ten points or more on every backbone."""
    found = [_far_above(data, one, "aligned", "full") for one in data.of(paper.MODELS)]
    models = paper.MODELS.values()
    lost = _range(model.numbers("aligned").absolute - model.numbers("full").absolute for model in models)
    claim = f"Addition after full is far below aligned: by {FAR:.0f} points or more"
    return row(claim, f"by {lost}", _flat(found), "a backbone in both regimes, aligned and full", strict=False)


# ---------------------------------------------------------------- weight disentanglement


def disentangled_near_the_origin(data: ClaimData, regime: str) -> dict[str, str]:
    """There is a disentangled region around the origin: the error is lower inside the box than outside it."""
    found = [
        paired_difference(
            data.error(one, regime, inside=False).called("outside"), data.error(one, regime).called("inside"), "pairs"
        )
        for one in data.of(paper.MODELS)
    ]
    claim = f"Weights are disentangled around the pre-trained encoder ({regime}): ξ is lower in the box than outside"
    near, far = (data.error(data.control, regime, inside=inside).values for inside in (True, False))
    claim += (
        f" (so it is with random weights, {near.mean():.1f} and {far.mean():.1f})" if len(near) and len(far) else ""
    )
    needs = f"heatmaps in the {regime} regime that reach beyond the box"
    return row(claim, "Figure 1" if regime == "aligned" else "Figure 5", _flat(found), needs)


def disentangled_by_pretraining(data: ClaimData) -> dict[str, str]:
    """Disentanglement comes from pre-training: every backbone has a lower error in the box than a random one."""
    random = data.error(data.control, "aligned")
    found = [paired_difference(random, data.error(one, "aligned"), "pairs") for one in data.of(paper.MODELS)]
    claim = "Disentanglement comes with pre-training (contribution 2): ξ in the box is lower than without any"
    needs = "heatmaps of a backbone without pre-training, called random, in the aligned regime"
    return row(claim, "not shown", _flat(found), needs)


def self_supervised_less(data: ClaimData, key: str) -> dict[str, str]:
    """Self-supervised pre-training disentangles less than supervised on the same data: a higher error in the box."""
    supervised = paper.SUPERVISED[0]
    found = [
        paired_difference(data.error(a, "aligned"), data.error(b, "aligned"), "pairs")
        for a, b in _both(data, key, supervised)
    ]
    names = f"{paper.MODELS[key].name} than {paper.MODELS[supervised].name}"
    claim = f"Self-supervised is less disentangled: ξ in the box is higher for {names}"
    return row(claim, "Figure 1", _flat(found), "heatmaps of both backbones, aligned")


def contrastive_most(data: ClaimData) -> dict[str, str]:
    """Contrastive pre-training disentangles most: every CLIP has a lower error than all others of its size."""
    others = [key for key in paper.BASES if key not in paper.CONTRASTIVE]
    best = [key for key in paper.BASES if key in paper.CONTRASTIVE]
    pairs = product(data.of(others), data.of(best))
    found = [paired_difference(data.error(a, "aligned"), data.error(b, "aligned"), "pairs") for a, b in pairs]
    needs = f"heatmaps of CLIP and another {paper.BASE}, aligned"
    return row("CLIP is the most disentangled: ξ in the box is lowest", "Figure 1", _flat(found), needs)


# ---------------------------------------------------------------- number of tasks


def few_tasks(data: ClaimData) -> dict[str, str]:
    """Two or three tasks keep 80 % of normalised accuracy or more after full fine-tuning, on every backbone but MAE."""
    keys = [key for key in paper.MODELS if key != paper.MAE]
    estimates = _flat(against_threshold(_few(data, one), HIGH, "sets") for one in data.of(keys))
    claim = f"Two or three tasks keep {HIGH:.0f} % normalised or more after full fine-tuning, but for MAE"
    return row(claim, "Figure 7", estimates, "sets of two or three tasks in the full regime", strict=False)


def mae_few_tasks(data: ClaimData) -> dict[str, str]:
    """MAE keeps less than 80 % already for two or three tasks."""
    estimates = _flat(against_threshold(_few(data, one), HIGH, "sets", sign=-1) for one in data.of([paper.MAE]))
    claim = f"MAE keeps less than {HIGH:.0f} % for two or three tasks"
    return row(claim, "Figure 7", estimates, "MAE on sets of two or three tasks in the full regime")


def _few(data: ClaimData, backbone: str) -> Measure:
    sets = data.sets(backbone, "full")
    return Measure(short_backbone(backbone), sets.loc[sets["size"].isin([2, 3]), "value"])


def linear_decay(data: ClaimData) -> dict[str, str]:
    """Normalised accuracy then falls in a line: R² of a falling line through the means by number of tasks."""
    estimates = [estimate for one in data.of(paper.MODELS) for estimate in _line(data, one)]
    claim = f"Accuracy then falls about linearly with the number of tasks (full): R² of {STRAIGHT} or more"
    return row(claim, "Figure 6", estimates, "sets of at least three sizes in the full regime", strict=False)


def _line(data: ClaimData, backbone: str) -> list[Estimate]:
    """Fit a line through three means or more; one that does not fall explains nothing."""
    means = data.sets(backbone, "full").groupby("size")["value"].mean()
    if len(means) < 3:
        return []
    sizes, values = means.index.to_numpy(float), means.to_numpy(float)
    slope, start = np.polyfit(sizes, values, 1)
    spread = float(((values - values.mean()) ** 2).sum())
    rest = float(((values - start - slope * sizes) ** 2).sum())
    explained = 1 - rest / spread if slope < 0 and spread > 0 else 0.0
    return [exact(f"{short_backbone(backbone)} R² {explained:.2f}, {slope:+.1f} a task", explained - STRAIGHT)]


# ---------------------------------------------------------------- all

Found = list[dict[str, str]] | dict[str, str]
CLAIMS: tuple[Callable[[ClaimData], Found], ...] = (
    addition_gains,
    probing_competes,
    small_scales,
    falls_past_the_best,
    high_addition,
    contrastive_adds_best,
    partial(mae_adds_worst, regime="aligned"),
    partial(mae_adds_worst, regime="full"),
    more_data,
    larger_models,
    probing_beats_open,
    open_full_above_closed_full,
    full_below_aligned,
    partial(disentangled_near_the_origin, regime="aligned"),
    partial(disentangled_near_the_origin, regime="full"),
    disentangled_by_pretraining,
    partial(self_supervised_less, key=paper.MAE),
    partial(self_supervised_less, key=paper.DINO),
    contrastive_most,
    few_tasks,
    mae_few_tasks,
    linear_decay,
)


def claims(results: pd.DataFrame, heat: pd.DataFrame | None, roles: Mapping[str, str]) -> pd.DataFrame:
    """Check every claim of the paper on a run; without roles nothing can be compared and no row comes out."""
    roles = paper.checked(roles)
    if not roles:
        return pd.DataFrame(columns=COLUMNS)
    data = ClaimData(results, heat, roles)
    found = (claim(data) for claim in CLAIMS)
    rows = [one for some in found for one in (some if isinstance(some, list) else [some])]
    return pd.DataFrame(rows, columns=COLUMNS)
