"""Merging methods, alone and joined, in memory and over files; what plugins need is here by name."""

from __future__ import annotations

import importlib
from typing import Any

_REGISTRY = ("ADDITION", "METHODS", "Method", "Recipe", "apply", "find_method", "find_recipe", "register")


def __getattr__(name: str) -> Any:
    """Import the registry when one of its names is first used."""
    if name not in _REGISTRY:
        raise AttributeError(f"module 'taskvec.merging' has no attribute '{name}'")
    return getattr(importlib.import_module("taskvec.merging.registry"), name)
