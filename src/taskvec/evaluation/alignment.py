"""Feature alignment: how alike two encoders see the same images, by linear CKA and without labels.

It is a cheap guess of the scale for re-probed heads; results call this metric ``agreement``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from taskvec.core.progress import Progress, no_progress
from taskvec.encoders.backbone import Backbone
from taskvec.weights import vectors
from taskvec.weights.flat import Weights


def linear_cka(first: Float[Tensor, "count *patches width"], second: Float[Tensor, "count *patches other"]) -> float:
    """Return the linear centred kernel alignment of two sets of features of the same images, 0 to 1.

    It stays the same when features are rotated, shifted or scaled as a whole, which a new linear head undoes (arXiv
    1905.00414, section 3). Features that do not vary align with nothing: 0.
    """
    x, y = (features.double().flatten(0, -2) for features in (first, second))
    x, y = x - x.mean(0), y - y.mean(0)
    within = torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y)
    return float(torch.linalg.norm(x.T @ y) ** 2 / within) if within > 0 else 0.0


COMPARISONS = {"agreement": linear_cka}
"""What a merged encoder's features are compared by with a fine-tuned one's, by the metric's name in results."""


def alignment_curves(
    backbone: Backbone,
    merged: Weights,
    fine_tuned: Weights,
    images: UInt8[ndarray, "count 3 size size"],
    scales: Sequence[float],
    per_patch: bool = False,
    progress: Progress = no_progress,
) -> dict[str, list[float]]:
    """Return every comparison of the features at each scale along a merged vector with a fine-tuned encoder's.

    The mean alignment over tasks is a guess of where re-probed heads do best; related work is arXiv 2604.12935.
    """
    values: dict[str, list[float]] = {name: [] for name in COMPARISONS}
    with backbone.at(fine_tuned):
        target = backbone.features(images, per_patch=per_patch)
        for index, scale in enumerate(scales):
            vectors.move(backbone.bound, backbone.pretrained, [merged], [scale])
            features = backbone.features(images, per_patch=per_patch)
            for name, compare in COMPARISONS.items():
                values[name].append(compare(features, target))
            progress((index + 1) / len(scales))
    return values
