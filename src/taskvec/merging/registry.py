"""All merging methods by name: those of the package, each registered beside its function, and those of plugins."""

from __future__ import annotations

from taskvec.merging.methods import adaptive, averaging, masking, sparsity, spectral  # noqa: F401 (they register methods)
from taskvec.merging.recipes import (
    ADDITION,
    METHODS,
    Method,
    Recipe,
    apply,
    find_method,
    find_recipe,
    register,
)

__all__ = [
    "ADDITION",
    "BUILT_IN",
    "METHODS",
    "Method",
    "Recipe",
    "apply",
    "find_method",
    "find_recipe",
    "register",
]

BUILT_IN = dict(METHODS)
"""The package's own methods, which its version identifies."""
