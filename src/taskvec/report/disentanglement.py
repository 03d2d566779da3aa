"""The weight disentanglement error of heatmaps: by point, and its mean over the box."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from taskvec.report.views import NOTHING, Spread

BOX = 1.0  # half the width of the red box of the paper's Figure 1


def with_errors(heatmap: pd.DataFrame) -> pd.DataFrame:
    """Add to the rows of a heatmap the error 0..2, whether a point is in the box, and its share of the box's mean."""
    inside = (heatmap["scale_1"].abs() <= BOX + 1e-9) & (heatmap["scale_2"].abs() <= BOX + 1e-9)
    share = heatmap["scale_1"].map(box_shares(heatmap["scale_1"])) * heatmap["scale_2"].map(
        box_shares(heatmap["scale_2"])
    )
    return heatmap.assign(error=heatmap["error_1"] + heatmap["error_2"], inside=inside, share=share)


def box_shares(scales: Iterable[float]) -> dict[float, float]:
    """Return each coefficient's share of the box's width, for means of what is linear between coefficients.

    A mean over the points that happen to lie in the box would depend on how many points an axis has.
    """
    axis = np.unique(list(scales))
    knots = np.union1d(axis[np.abs(axis) < BOX], [-BOX, BOX])
    hats = np.array([np.interp(knots, axis, row) for row in np.eye(len(axis))]).reshape(-1, len(knots))
    shares = (hats[:, 1:] + hats[:, :-1]) @ np.diff(knots) / 2 / (2 * BOX)
    return dict(zip(axis.tolist(), shares.tolist(), strict=True))


def error_rows(heatmap: pd.DataFrame, backbone: str, regime: str) -> pd.DataFrame:
    """Take the heatmap rows of one backbone in one regime, with errors."""
    return with_errors(heatmap[(heatmap["backbone"] == backbone) & (heatmap["regime"] == regime)])


def box_mean(rows: pd.DataFrame, by: list[str]) -> pd.Series[float]:
    """Average the error over the area of the box, bilinear between points, for every group of whole heatmaps."""
    weighted = rows.assign(error=rows["error"] * rows["share"]).groupby(by)[["error", "share"]].sum()
    means: pd.Series[float] = weighted["error"] / weighted["share"]
    return means


def box_error(heatmap: pd.DataFrame | None, backbone: str, regime: str) -> Spread:
    """Average the disentanglement error (0..2) over the area of the box and the pairs; its spread is over seeds."""
    if heatmap is None:
        return NOTHING
    rows = error_rows(heatmap, backbone, regime)
    means = box_mean(rows, ["seed"])
    if means.empty:
        return NOTHING
    return Spread(float(means.mean()), float(means.std()) if len(means) > 1 else math.nan)
