"""The weight disentanglement error of heatmaps: by point, and its mean over the box."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from taskvec.report.views import NOTHING, Spread

BOX = 1.0  # half the width of the red box of the paper's Figure 1


def with_errors(heatmap: pd.DataFrame) -> pd.DataFrame:
    """Add to the rows of a heatmap the error 0..2, whether a point is in the box, and its share of the box's mean.

    Rows of an earlier release have no half-width of their mean over pairs: they are of whole samples (0).
    """
    inside = (heatmap["scale_1"].abs() <= BOX + 1e-9) & (heatmap["scale_2"].abs() <= BOX + 1e-9)
    share = heatmap["scale_1"].map(box_shares(heatmap["scale_1"])) * heatmap["scale_2"].map(
        box_shares(heatmap["scale_2"])
    )
    error, width = heatmap["error_1"] + heatmap["error_2"], heatmap.get("half_width", 0.0)
    return heatmap.assign(error=error, inside=inside, share=share, half_width=width)


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


def box_mean(rows: pd.DataFrame, by: list[str], column: str = "error") -> pd.Series[float]:
    """Average the error, or another column, over the area of the box for every group of whole heatmaps.

    Between points it is bilinear.
    """
    weighted = rows.assign(value=rows[column] * rows["share"]).groupby(by)[["value", "share"]].sum()
    means: pd.Series[float] = weighted["value"] / weighted["share"]
    return means


def sampling_text(heatmap: pd.DataFrame | None) -> str:
    """Say how sure the means over pairs are, where they are of some images of the samples; else nothing."""
    most = 0.0 if heatmap is None else 100 * float(with_errors(heatmap)["half_width"].max())
    return f"95 % half-width of the mean over pairs: at most {most:.1f} points" if most > 0 else ""


def box_error(heatmap: pd.DataFrame | None, backbone: str, regime: str) -> Spread:
    """Average the disentanglement error (0..2) over the area of the box and the pairs; its spread is over seeds."""
    if heatmap is None:
        return NOTHING
    rows = error_rows(heatmap, backbone, regime)
    means = box_mean(rows, ["seed"])
    if means.empty:
        return NOTHING
    return Spread(float(means.mean()), float(means.std()) if len(means) > 1 else math.nan)
