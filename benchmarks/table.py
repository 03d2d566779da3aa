"""A table of what was measured beside the bars that it is held to, printed row by row and kept as JSON."""

from __future__ import annotations

import json
import operator
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from taskvec.core.compute import processor
from taskvec.core.machine import cores

SIGNS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Row:
    """What was measured, its value and unit, and the bar such as ``<= 1.10``; no bar where it only tells.

    Where the same run has measured a ``floor``, the bar is for the ratio of the value to it.
    """

    name: str
    value: float
    bar: str = ""
    note: str = ""
    unit: str = ""
    floor: float | None = None

    @property
    def ratio(self) -> float:
        """Return what the bar is for."""
        return self.value / self.floor if self.floor else self.value

    @property
    def verdict(self) -> str:
        """Return ok or short where there is a bar."""
        if not self.bar:
            return ""
        sign, limit = self.bar.split()
        return "ok" if SIGNS[sign](self.ratio, float(limit)) else "short"

    def line(self) -> str:
        """Return a line of the table."""
        floor, ratio = (number(self.floor), f"{self.ratio:.2f}") if self.floor else ("", "")
        measured = f"{number(self.value):>9} {self.unit:9}{floor:>9}{ratio:>7}"
        return f"{self.name:74}{measured} {self.bar:>9} {self.verdict:6}{self.note}".rstrip()


def number(value: float) -> str:
    """Return a number with three digits at least."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def show(rows: Iterable[Row]) -> list[Row]:
    """Print every row as soon as it is measured, and return all."""
    shown = []
    for row in rows:
        print(row.line(), flush=True)
        shown.append(row)
    return shown


def about(device: str = "cpu") -> dict[str, str | int | None]:
    """Return what rows are measured on."""
    packages = {name: metadata.version(name) for name in ("torch", "numpy", "taskvec")}
    machine = {"processor": processor(device), "cores": cores(), "cuda": torch.version.cuda}
    return machine | {"python": platform.python_version()} | packages


def save(rows: Iterable[Row], path: Path, device: str = "cpu") -> None:
    """Write rows to a JSON file, with what they were measured on."""
    table = [asdict(row) | {"ratio": row.ratio, "verdict": row.verdict} for row in rows]
    path.write_text(json.dumps({"about": about(device), "rows": table}, indent=1) + "\n", encoding="utf-8")
