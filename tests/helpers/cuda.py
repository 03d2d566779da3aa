"""Tests of a CUDA device run when they are asked for by their mark; all others do not see one.

The ordinary suite holds numbers of the CPU to those of other libraries, so it is the same on every machine.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

MARK = "cuda"
FOLDER = Path(__file__).parents[1] / MARK
HIDDEN = "CUDA_VISIBLE_DEVICES"


def pytest_configure(config: pytest.Config) -> None:
    """Hide the devices, before CUDA starts, unless the tests that need one are chosen."""
    if not is_chosen(config):
        os.environ[HIDDEN] = ""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the other tests unread where these are chosen: a machine with a GPU may lack what they import."""
    others = collection_path.suffix == ".py" and FOLDER not in collection_path.parents
    return True if is_chosen(config) and others else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a device where there is none; warnings of other versions of torch are no failure there."""
    import torch

    marked = [item for item in items if item.get_closest_marker(MARK)]
    for item in marked:
        item.add_marker(pytest.mark.filterwarnings("default"))
        if not (is_chosen(config) and torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many tests were skipped for want of a device, and how they are run."""
    reports = terminalreporter.getreports("skipped")
    if count := sum("needs a CUDA device" in str(report.longrepr) for report in reports):
        line = f"skipped for want of a CUDA device: {count}; on a machine with one, pytest -m cuda runs them"
        terminalreporter.write_line(line)


def is_chosen(config: pytest.Config) -> bool:
    """Say whether tests were chosen by this mark: ``-m cuda`` takes one that has it and none that has no mark."""
    chosen = Expression.compile(str(config.option.markexpr))
    return chosen.evaluate(lambda name, **_: name == MARK) and not chosen.evaluate(lambda name, **_: False)
