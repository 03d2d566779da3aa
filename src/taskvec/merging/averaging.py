"""Methods that combine task vectors linearly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command lists methods without loading torch
    from jaxtyping import Float32
    from torch import Tensor


def task_arithmetic(vectors: Sequence[Float32[Tensor, " size"]]) -> Float32[Tensor, " size"]:
    """Return sum_t tau_t, in float32 and in the given order (arXiv 2212.04089, section 2; the paper's section 2)."""
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total += vector
    return total
