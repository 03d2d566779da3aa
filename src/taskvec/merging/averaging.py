"""Methods that combine task vectors linearly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taskvec.merging.parts import Part
from taskvec.settings import Settings

if TYPE_CHECKING:  # the command lists methods without loading torch
    from jaxtyping import Float32
    from torch import Tensor


def task_arithmetic(
    vectors: Float32[Tensor, " tasks *shape"], part: Part, config: Settings
) -> Float32[Tensor, " *shape"]:
    """Return sum_t tau_t, in float32 and in the given order (arXiv 2212.04089, section 2; the paper's section 2)."""
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total += vector
    return total
