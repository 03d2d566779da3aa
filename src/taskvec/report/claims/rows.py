"""A claim as a row of a table: what was measured, its margin, the interval and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence

from taskvec.report.claims.data import FAILS, HOLDS, UNDECIDED, Estimate
from taskvec.report.texts import MISSING

COLUMNS = ["Claim", "Paper", "Measured", "Margin", "Interval", "Verdict"]
ABSENT = "not measured"


def row(claim: str, printed: str, estimates: Sequence[Estimate], needs: str, strict: bool = True) -> dict[str, str]:
    """Write a claim with one estimate; it holds if all do, and does not if one does not.

    Of the estimates that decide the one with the smallest margin is shown: what nearly fails, or fails by most.
    """
    if not estimates:
        return dict(zip(COLUMNS, (claim, printed, f"needs {needs}", MISSING, MISSING, ABSENT), strict=True))
    verdicts = [estimate.verdict(strict) for estimate in estimates]
    decides = _joint(verdicts)
    shown = min(
        (estimate for estimate, verdict in zip(estimates, verdicts, strict=True) if verdict == decides),
        key=lambda estimate: estimate.margin,
    )
    cells = (printed, _measured(shown, verdicts, decides), _margin(shown), _interval(shown), decides)
    return dict(zip(COLUMNS, (claim, *cells), strict=True))


def _joint(verdicts: list[str]) -> str:
    return FAILS if FAILS in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS


def _measured(shown: Estimate, verdicts: list[str], decides: str) -> str:
    place = "farthest" if decides == FAILS else "closest"
    count = f" (the {place} of {len(verdicts)}; {verdicts.count(HOLDS)} hold)" if len(verdicts) > 1 else ""
    return shown.words + count


def _margin(estimate: Estimate) -> str:
    return f"{round(estimate.margin, estimate.digits) + 0.0:+.{estimate.digits}f}"


def _interval(estimate: Estimate) -> str:
    if not estimate.over:
        return MISSING
    if math.isnan(estimate.low):
        return f"none ({estimate.over})"
    low, high = (f"{round(end, 1) + 0.0:+.1f}" for end in (estimate.low, estimate.high))
    return f"{low} to {high} ({estimate.over})"
