"""A table of measured ratios beside the bars they are held to, printed and kept as JSON."""

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

SIGNS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Row:
    """What was measured, its value, and the bar such as ``<= 1.10``; no bar where it only tells."""

    name: str
    value: float
    bar: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        """Return whether the bar is held."""
        if not self.bar:
            return ""
        sign, limit = self.bar.split()
        return "ok" if SIGNS[sign](self.value, float(limit)) else "short"


def show(rows: Iterable[Row]) -> list[Row]:
    """Print every row as soon as it is measured, and return all."""
    shown = []
    for row in rows:
        bar = f"bar {row.bar:<9}{row.verdict:<6}" if row.bar else " " * 19
        print(f"{row.name:74} {row.value:10.3f}   {bar} {row.note}".rstrip(), flush=True)
        shown.append(row)
    return shown


def save(rows: Iterable[Row], path: Path, device: str = "cpu") -> None:
    """Write rows to a JSON file, with what they were measured on."""
    about = {"processor": processor(device), "cores": torch.get_num_threads(), "python": platform.python_version()}
    about |= {name: metadata.version(name) for name in ("torch", "numpy", "taskvec")}
    table = [asdict(row) | {"verdict": row.verdict} for row in rows]
    path.write_text(json.dumps({"about": about, "rows": table}, indent=1) + "\n", encoding="utf-8")
