"""Merging methods: short functions over task vectors, in one registry.

A method takes the flat task vectors, one a task, and returns the flat direction along which the scale moves the
encoder: theta = theta_pre + scale * direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from taskvec.errors import unknown
from taskvec.merging.averaging import task_arithmetic

if TYPE_CHECKING:  # the command lists methods without loading torch
    from jaxtyping import Float32
    from torch import Tensor


@dataclass(frozen=True)
class Method:
    """One entry of the registry: what the method does, who proposed it, and its scales by default."""

    name: str
    direction: Callable[[Sequence[Float32[Tensor, " size"]]], Float32[Tensor, " size"]]
    description: str
    reference: str
    scales: str = "0:1:0.05"


METHODS: dict[str, Method] = {}
ADDITION = "task_arithmetic"
"""The paper's method, by its name in the registry and in results."""
PER_TASK = "task_arithmetic_per_task"
"""Addition with one lambda a task, by its name in results."""

REESTIMATED = "_reestimated"
"""What is added to a method's name in results where the statistics of batch norm were estimated anew."""


def register(method: Method) -> None:
    """Add a method to the registry; a second one of the same name raises."""
    if method.name in METHODS:
        raise ValueError(f"a method named '{method.name}' is registered already")
    METHODS[method.name] = method


def find_method(name: str) -> Method:
    """Return a method by name, or raise with the nearest names."""
    if name not in METHODS:
        raise unknown("merging method", name, METHODS)
    return METHODS[name]


register(
    Method(
        name=ADDITION,
        direction=task_arithmetic,
        description="task addition: the sum of the task vectors",
        reference="Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089",
    )
)
