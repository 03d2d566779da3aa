"""Task vectors: differences of weights, and the arithmetic on them (paper, section 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from taskvec.weights.flat import Weights, check_keys, mend_variances


def subtract(fine_tuned: Weights, pretrained: Weights) -> Weights:
    """Return the task vector tau = theta_ft - theta_pre over the encoder's floating-point entries."""
    return pretrained.with_flat(matching(fine_tuned, pretrained).flat - pretrained.flat)


def add(pretrained: Weights, vector: Weights, scale: float = 1.0) -> Weights:
    """Return theta_pre + scale * tau in float32; integer buffers are those of theta_pre, variances stay >= 0."""
    return mend_variances(
        pretrained.with_flat(torch.add(pretrained.flat, matching(vector, pretrained).flat, alpha=scale))
    )


def move(bound: Weights, pretrained: Weights, vectors: Sequence[Weights], scales: Sequence[float]) -> None:
    """Write theta_pre + sum_t scale_t * tau_t into a bound model, always from theta_pre so that no rounding adds up.

    ``vectors`` has at least one; running variances stay >= 0.
    """
    torch.add(pretrained.flat, vectors[0].flat, alpha=scales[0], out=bound.flat)
    for vector, scale in zip(vectors[1:], scales[1:], strict=True):
        bound.flat.add_(vector.flat, alpha=scale)
    mend_variances(bound)


def scale(vector: Weights, factor: float) -> Weights:
    """Return factor * tau; a factor of -1 negates (forgets) a task."""
    return vector.with_flat(vector.flat * factor)


def cosine(first: Weights, second: Weights) -> float:
    """Return the cosine of the angle between two task vectors, computed in float64; 0 where one of them is zero."""
    a, b = first.flat.double(), matching(second, first).flat.double()
    norms = a.norm() * b.norm()
    return float(a @ b / norms) if norms > 0 else 0.0


def matching(weights: Weights, like: Weights) -> Weights:
    """Return ``weights`` if it has the layout of ``like``; raise and name the keys that differ otherwise."""
    if weights.layout != like.layout:
        found = {slot.name: slot.shape for slot in weights.layout}
        wanted = {slot.name: slot.shape for slot in like.layout}
        check_keys(found, wanted, "the weights", "subtract and add weights of one architecture")
        raise ValueError("same keys in another order: pack both from the same module")
    return weights
