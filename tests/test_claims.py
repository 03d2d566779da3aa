"""Every claim is decided by its numbers and interval, and says what is missing where it cannot be."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from helpers import report_rows as fixture

from taskvec.core.errors import TaskvecError
from taskvec.report import tables
from taskvec.report.claims.claims import claims
from taskvec.report.claims.data import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Estimate,
    Measure,
    against_threshold,
    of_gain,
    paired_difference,
    t_interval,
)
from taskvec.report.claims.rows import COLUMNS
from taskvec.report.disentanglement import box_error
from taskvec.report.views import Gain, find_view

Run = tuple[pd.DataFrame, pd.DataFrame]


@pytest.fixture(scope="module")
def run() -> Run:
    return fixture.full_run(seeds=(0,))


def _claim(found: pd.DataFrame, words: str) -> pd.Series:
    own = found[found["Claim"].str.contains(words, regex=False)]
    assert len(own) == 1, words
    return own.iloc[0]


def _shifted(run: Run, backbone: str, regime: str, by: float) -> pd.DataFrame:
    """Move addition's accuracy, and its gain, of one cell by some points."""
    rows = run[0].copy()
    own = (rows["backbone"] == backbone) & (rows["regime"] == regime) & (rows["method"] == "task_arithmetic")
    own &= (rows["split"] == "test") & (rows["metric"].str.startswith("gain") | (rows["metric"] == "accuracy"))
    rows.loc[own, "value"] += by / 100
    return rows


# ---------------------------------------------------------------- estimates


@pytest.mark.parametrize(
    ("low", "high", "strict", "verdict"),
    [
        (0.1, 1.0, True, HOLDS),
        (0.04, 1.0, True, UNDECIDED),  # is printed as +0.0
        (0.0, 1.0, True, UNDECIDED),
        (0.0, 1.0, False, HOLDS),
        (-1.0, 1.0, True, UNDECIDED),
        (-1.0, 0.0, True, FAILS),
        (-1.0, 0.0, False, UNDECIDED),
        (-1.0, -0.2, False, FAILS),
        (math.nan, math.nan, True, UNDECIDED),
    ],
)
def test_the_interval_decides(low: float, high: float, strict: bool, verdict: str) -> None:
    assert Estimate("", 0.5, low, high, "8 tasks").verdict(strict) == verdict


@pytest.mark.parametrize("count", [3, 4, 8])
def test_the_interval_covers_the_mean_95_times_in_100(count: int) -> None:
    drawn = np.random.default_rng(count).normal(2.0, 5.0, (2000, count))
    ends = np.array([t_interval(values) for values in drawn])
    assert np.mean((ends[:, 0] < 2.0) & (ends[:, 1] > 2.0)) == pytest.approx(0.95, abs=0.015)


def test_an_interval_needs_three_units() -> None:
    assert all(map(math.isnan, t_interval(np.arange(2.0))))
    assert t_interval(np.ones(5)) == (1.0, 1.0)


def test_measures_are_compared_on_what_both_have() -> None:
    first = Measure("a", pd.Series({"x": 5.0, "y": 7.0, "z": 9.0, "w": 100.0}))
    second = Measure("b", pd.Series({"z": 5.0, "y": 6.0, "x": 3.0}))
    (estimate,) = paired_difference(first, second, "tasks", 1.0)
    assert estimate.words == "a 7.0, b 4.7"
    assert (estimate.margin, estimate.over) == (pytest.approx((2 + 1 + 4) / 3 - 1), "3 tasks")
    assert paired_difference(first, Measure("b", pd.Series({"q": 1.0})), "tasks") == []
    assert against_threshold(second, 6.0, "tasks", sign=-1)[0].margin == pytest.approx(6 - 14 / 3)


def test_a_gain_turned_round_keeps_its_interval_in_order() -> None:
    rows = fixture.results(heads=("kept",))
    gain = find_view(rows, "lab:supervised", "aligned").gain("task_arithmetic")
    estimate = of_gain("", gain, sign=-1, offset=3.0)
    assert estimate.low == pytest.approx(3 - 100 * gain.high)
    assert estimate.high == pytest.approx(3 - 100 * gain.low)
    nothing = Gain("kept", 0.0, math.nan, -0.01, 0.01, gain.scale._replace(low=0.0, high=0.0))
    assert of_gain("", nothing)[1:4] == (0.0, 0.0, 0.0)
    unknown = of_gain("", gain._replace(low=math.nan, high=math.nan))
    assert unknown.verdict(strict=True) == UNDECIDED


# ---------------------------------------------------------------- claims


def test_open_and_closed_regimes_compare_on_the_same_tasks(run: Run) -> None:
    rows = run[0]
    open_regime = rows["regime"].isin(fixture.OPEN_REGIMES)
    fewer = rows.assign(tasks=rows["tasks"].where(~open_regime, "+".join(fixture.EIGHT[:6])))
    fewer = fewer[~(open_regime & fewer["task"].isin(fixture.EIGHT[6:]))]
    words = "open-full is far above full"
    assert _claim(claims(fewer, run[1], fixture.ROLES), words)["Verdict"] == "not measured"
    own = rows[
        (rows["regime"] == "full") & rows["task"].isin(fixture.EIGHT[:6]) & rows["backbone"].str.contains("clip")
    ]
    lower = own.assign(tasks="+".join(fixture.EIGHT[:6]), value=0.25)
    found = _claim(claims(pd.concat([fewer, lower]), run[1], fixture.ROLES), words)
    assert found["Verdict"] == HOLDS
    assert "full 25.0" in found["Measured"]
    assert "(6 tasks)" in found["Interval"]


def test_without_roles_there_are_no_claims(run: Run) -> None:
    assert claims(*run, {}).empty
    assert "claims" not in tables.markdown(*run)
    assert "## The paper's claims" in tables.markdown(*run, fixture.ROLES)
    with pytest.raises(TaskvecError, match="vit-b16-dino"):
        claims(*run, {"masked": "vit-b16-dinov2"})


def test_every_claim_is_decided_on_a_whole_run(run: Run) -> None:
    found = claims(*run, fixture.ROLES)
    assert list(found.columns) == COLUMNS
    assert set(found["Verdict"]) == {HOLDS, UNDECIDED}
    assert found.map(lambda text: isinstance(text, str) and text != "").all(axis=None)
    assert found["Claim"].is_unique


def test_a_gain_is_read_from_its_rows(run: Run) -> None:
    gain = find_view(run[0], "clip-large", "aligned").gain("task_arithmetic")
    row = _claim(claims(*run, fixture.ROLES), "Addition beats probing on CLIP (LAION-2B)")
    assert row["Paper"] == "+3.6 at λ = 0.15"
    assert row["Measured"] == f"clip-large {100 * gain.mean:+.1f} at λ = 0.10"
    assert row["Margin"] == f"{100 * gain.mean:+.1f}"
    assert row["Interval"] == f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f} (test images)"


def test_dino_s_claim_is_that_nothing_is_gained(run: Run) -> None:
    words = "Addition gains nothing over probing on DINO (IN1k)"
    assert _claim(claims(*run, fixture.ROLES), words)["Verdict"] == HOLDS
    roles = fixture.ROLES | {"self-distilled": "", "clip-small": "vit-b16-dino"}
    row = _claim(claims(*run, roles), words)
    assert (row["Margin"], row["Verdict"]) == ("-2.5", FAILS)


def test_one_backbone_that_fails_makes_a_claim_on_all_fail(run: Run) -> None:
    words = "Addition after full is far below aligned"
    assert _claim(claims(*run, fixture.ROLES), words)["Measured"].endswith("(the closest of 7; 7 hold)")
    row = _claim(claims(_shifted(run, "masked", "full", 50), run[1], fixture.ROLES), words)
    assert row["Measured"].startswith("masked aligned ")
    assert row["Measured"].endswith("(the farthest of 7; 6 hold)")
    assert row["Verdict"] == FAILS
    both = _shifted((_shifted(run, "masked", "full", 50), run[1]), "sup-1k", "full", 70)
    row = _claim(claims(both, run[1], fixture.ROLES), words)
    assert row["Measured"].startswith("sup-1k aligned ")
    assert row["Measured"].endswith("(the farthest of 7; 5 hold)")


def test_regimes_are_compared_on_the_seeds_that_both_have(run: Run) -> None:
    words = "Addition after full is far below aligned"
    rows = run[0]
    more = rows[rows["regime"] == "aligned"].assign(seed=1, value=0.0)
    once, twice = (_claim(claims(one, run[1], fixture.ROLES), words) for one in (rows, pd.concat([rows, more])))
    assert once.equals(twice)


def test_probing_competes_only_up_to_three_points(run: Run) -> None:
    words = "gains 3 points or less"
    rows = _shifted(run, "sup-21k", "aligned", 5)
    row = _claim(claims(rows, run[1], fixture.ROLES), words)
    gain = 100 * find_view(rows, "sup-21k", "aligned").gain("task_arithmetic").mean
    assert row["Margin"] == f"{3 - gain:+.1f}"
    assert (row["Paper"], row["Verdict"]) == ("0.0 to 3.6", FAILS)


def test_small_scales_and_the_fall_past_the_best(run: Run) -> None:
    rows = run[0].copy()
    added = (rows["method"] == "task_arithmetic") & (rows["regime"] == "aligned") & (rows["backbone"] == "sup-1k")
    rows.loc[added & (rows["split"] == "test"), "scale"] = 0.2
    row = _claim(claims(rows, run[1], fixture.ROLES), "The best λ is small")
    assert (row["Measured"], row["Margin"], row["Interval"], row["Verdict"]) == (
        "sup-1k λ = 0.20 (the farthest of 7; 6 hold)", "-0.05", "–", FAILS,
    )  # fmt: skip
    curve = added & (rows["split"] == "validation") & (rows["task"] == "") & (rows["metric"] == "normalised_accuracy")
    rows.loc[curve & (rows["scale"] == 0.9), "value"] = 0.5
    row = _claim(claims(rows, run[1], fixture.ROLES), "Past the best λ")
    assert row["Measured"].startswith("sup-1k rises by 16.")
    assert row["Verdict"] == FAILS


def test_errors_are_compared_over_pairs_in_the_box(run: Run) -> None:
    names = ("masked", "sup-1k", "random-init")
    xi = {name: 100 * box_error(run[1], name, "aligned").mean for name in names}
    row = _claim(claims(*run, fixture.ROLES), "ξ in the box is higher for MAE (IN1k)")
    assert row["Measured"] == f"masked {xi['masked']:.1f}, sup-1k {xi['sup-1k']:.1f}"
    assert row["Margin"] == f"{xi['masked'] - xi['sup-1k']:+.1f}"
    assert row["Interval"].endswith("(3 pairs)")
    random = _claim(claims(*run, fixture.ROLES), "Disentanglement comes with pre-training")
    assert random["Measured"].startswith(f"random-init {xi['random-init']:.1f}, masked {xi['masked']:.1f}")


def test_too_few_pairs_leave_a_claim_undecided(run: Run) -> None:
    row = _claim(claims(run[0], run[1][run[1]["task_1"] != "gtsrb"], fixture.ROLES), "CLIP is the most disentangled")
    assert (row["Interval"], row["Verdict"]) == ("none (2 pairs)", UNDECIDED)


def test_errors_from_some_images_are_not_compared_below_their_half_width(run: Run) -> None:
    words = "CLIP is the most disentangled"
    exact = _claim(claims(*run, fixture.ROLES), words)
    assert exact["Verdict"] == HOLDS
    margin = float(exact["Margin"])
    for width, verdict in ((0.001, HOLDS), (margin / 100, UNDECIDED)):  # of both backbones: hypot is larger than it
        sampled = run[1].assign(half_width=width, images=64)
        row = _claim(claims(run[0], sampled, fixture.ROLES), words)
        assert (row["Verdict"], row["Margin"]) == (verdict, exact["Margin"])


def test_few_tasks_and_linear_decay(run: Run) -> None:
    found = claims(*run, fixture.ROLES)
    assert _claim(found, "MAE keeps less than 80 %")["Interval"].endswith("(12 sets)")
    row = _claim(found, "falls about linearly")
    assert row["Measured"].endswith("(the closest of 7; 7 hold)")
    rows = run[0].copy()
    size = rows["tasks"].str.count(r"\+") + 1
    sets = (rows["metric"] == "normalised_accuracy") & (rows["split"] == "test") & (rows["regime"] == "full")
    rows.loc[sets & (rows["backbone"] == "sup-1k"), "value"] = 0.1 * size
    row = _claim(claims(rows, run[1], fixture.ROLES), "falls about linearly")
    assert (row["Measured"], row["Margin"]) == ("sup-1k R² 0.00, +10.0 a task (the farthest of 7; 6 hold)", "-0.90")
    assert row["Verdict"] == FAILS


def test_what_is_missing_is_said(run: Run) -> None:
    rows = fixture.results(backbones=("one",), regimes=("aligned",), tasks=fixture.EIGHT[:2])
    found = claims(rows, None, {"one": "vit-b16-in21k", "absent": "vit-b16-mae"})
    measured = found[found["Verdict"] != "not measured"]
    assert list(measured["Claim"].str.split(":").str[0]) == [
        "Addition beats probing on Supervised (IN21k)",
        "Probing is competitive (contribution 4)",
        "The best λ is small",
        "Past the best λ accuracy only falls",
        "Addition performs well (contribution 3)",
    ]
    assert _claim(found, "Addition performs well")["Interval"] == "none (2 tasks)"
    missing = _claim(found, "Probing beats open-vocabulary addition")
    assert missing["Measured"] == "needs a CLIP backbone in the open regime"
    assert missing["Paper"] == "probing 86.0, addition 72.4"
    assert (missing["Margin"], missing["Interval"]) == ("–", "–")
    assert not any(word in " ".join(found.to_numpy().ravel()) for word in ("nan", "None"))


def test_nan_and_a_regime_without_addition_are_not_measured(run: Run) -> None:
    rows = run[0].copy()
    rows.loc[(rows["regime"] == "full") & (rows["method"] == "task_arithmetic"), "value"] = math.nan
    found = claims(rows, run[1], fixture.ROLES)
    assert _claim(found, "MAE has the worst addition accuracy (full)")["Verdict"] == "not measured"
    assert _claim(found, "falls about linearly")["Verdict"] == "not measured"
    only = claims(rows[rows["method"] != "task_arithmetic"], run[1], fixture.ROLES)
    assert _claim(only, "Addition beats probing")["Measured"].startswith("needs addition with kept heads")
    assert "nan" not in " ".join(found.to_numpy().ravel())


def test_the_larger_clip_is_compared_only_where_it_is(run: Run) -> None:
    assert not claims(*run, fixture.ROLES)["Claim"].str.contains("CLIP (LAION-2B), ViT-L", regex=False).any()
    roles = fixture.ROLES | {"sup-21k-L": "vit-l14-clip-2b"}
    own = claims(*run, roles)["Claim"].str.contains("CLIP (LAION-2B), ViT-L-14/16 over", regex=False)
    assert own.sum() == 3
