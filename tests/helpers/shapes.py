"""Shapes in annotations, checked at every call while a sample of the tests runs."""

from __future__ import annotations

import inspect
import os
import sys
import typing
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray, config, install_import_hook

WINGS = "core engine weights lab data encoders learning merging evaluation deploy study".split()  # noqa: SIM905
"""The wings whose shapes are checked; the others have none."""
MODULES = [f"taskvec.{wing}" for wing in WINGS]
SAMPLE = 1 if os.environ.get("TASKVEC_SHAPES") == "all" else 8
"""Shapes are checked in one test of so many: they take a third of the time of the tests that merge."""


class Typing(ModuleType):
    """The module `typing`, in which the modules that are checked import the types of their annotations too."""

    @property
    def TYPE_CHECKING(self) -> bool:
        name = str(sys._getframe(1).f_globals.get("__name__"))
        return any(name == module or name.startswith(f"{module}.") for module in MODULES)


def install() -> None:
    """Check the shapes of what is imported from now on."""
    assert not set(MODULES) & set(sys.modules), "imported before it could be checked"
    typing.__class__ = Typing
    install_import_hook(MODULES, f"{__name__}.check_shapes")


def check_sample(test: str) -> None:
    """Check shapes in the test to come if it is one of the sample, by the checksum of its name."""
    chosen = zlib.crc32(test.encode()) % SAMPLE == 0 or "test_shapes" in test
    config.update("jaxtyping_disable", not chosen)


def shapes_in(annotation: Any) -> list[type[AbstractArray]]:
    """Return the shapes that an annotation is or holds."""
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return [annotation]
    parts = annotation if isinstance(annotation, list) else typing.get_args(annotation)
    return [shape for part in parts for shape in shapes_in(part)]


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its shapes checked; mypy sees to the other annotations.

    What merges tensors of torch merges arrays of NumPy too, so there the library does not count.
    """
    annotations = {name: hint for name, hint in function.__annotations__.items() if shapes_in(hint)}
    if not annotations:
        return function
    if function.__module__.startswith("taskvec.merging"):
        for shape in [shape for hint in annotations.values() for shape in shapes_in(hint)]:
            shape.array_type = Any
    function.__annotations__ = annotations
    return beartype(function)
