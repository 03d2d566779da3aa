"""Which tests a mark chooses: those of a CUDA device, or all others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from helpers.cuda import is_chosen


@pytest.mark.parametrize(
    ("marks", "chosen"),
    [
        *[("cuda", True), ("cuda and not slow", True), ("slow or cuda", True), ("not slow", False), ("", False)],
        *[("not cuda", False), ("not slow and not cuda", False), ("not (slow or cuda)", False)],
    ],
)
def test_tests_of_a_device_are_chosen_by_their_mark_alone(marks: str, chosen: bool) -> None:
    config: Any = SimpleNamespace(option=SimpleNamespace(markexpr=marks))
    assert is_chosen(config) == chosen
