"""Metric rows as a run would write them, from closed formulas, to test tables, figures and page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

COLUMNS = (
    "study", "backbone", "regime", "seed", "tasks", "method", "config", "heads", "scale", "task", "split", "metric",
    "value", "artifact",
)  # fmt: skip
EIGHT = ("cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn")
SCALES = tuple(step / 20 for step in range(21))
Key = dict[str, object]


def _probing(position: int, shift: float) -> float:
    return 0.62 + 0.31 * ((position * 7 + 3) % 8) / 8 + shift


def _tuned(position: int, shift: float) -> float:
    return _probing(position, shift) + 0.35 * (0.99 - _probing(position, shift))


def _merged(position: int, shift: float, heads: str, scale: float, boost: float) -> float:
    """Rise by ``boost`` of the way to fine-tuned at scale 0.1 (kept) or 0.3 (re-probed), then fall."""
    low, high = _probing(position, shift), _tuned(position, shift)
    peak, fall = (0.1, 0.62) if heads == "kept" else (0.3, 0.12)
    share = boost * (1 if heads == "kept" else 4) * max(0.0, 1 - ((scale - peak) / peak) ** 2)
    drop = fall * max(0.0, scale - peak) ** 1.3
    return max(0.01, low + share * (high - low) - drop)


def _rows(key: Key, values: dict[str, float], tuned: dict[str, float]) -> list[Key]:
    """Accuracy and normalised accuracy of every task and, with an empty task, their means."""
    metrics = {
        "accuracy": values,
        "normalised_accuracy": {task: value / tuned[task] for task, value in values.items()},
    }
    out: list[Key] = []
    for metric, numbers in metrics.items():
        shown = {**numbers, "": sum(numbers.values()) / len(numbers)}
        out += [{**key, "metric": metric, "task": task, "value": value} for task, value in shown.items()]
    return out


def _gains(key: Key, values: dict[str, float], probing: dict[str, float], width: float) -> list[Key]:
    gains = {task: value - probing[task] for task, value in values.items()}
    gains[""] = sum(gains.values()) / len(gains)
    ends = {"": 0.0, "_low": -width, "_high": width}
    return [
        {**key, "metric": f"gain_over_probing{end}", "task": task, "value": gain + by * (1 if task == "" else 2)}
        for task, gain in gains.items()
        for end, by in ends.items()
    ]


def _setting(key: Key, tasks: Sequence[str], methods: dict[str, float], heads: Sequence[str], width: float,
             scales: Sequence[float], shift: float) -> list[Key]:  # fmt: skip
    """All rows of one backbone, regime and seed: baselines, the line search on validation, the choice on test."""
    out: list[Key] = []
    for split, by in (("validation", shift + 0.004), ("test", shift)):
        probing = {task: _probing(i, by) for i, task in enumerate(tasks)}
        tuned = {task: _tuned(i, by) for i, task in enumerate(tasks)}
        out += _rows({**key, "method": "probing", "heads": "kept", "scale": 0.0, "split": split}, probing, tuned)
        out += _rows({**key, "method": "fine_tuned", "heads": "kept", "scale": 1.0, "split": split}, tuned, tuned)
        for method, boost in methods.items():
            for head in heads:
                best = max(scales, key=lambda s: (_mean(tasks, by, head, s, boost), -s))
                for scale in scales if split == "validation" else (best,):
                    at: Key = {**key, "method": method, "heads": head, "scale": scale, "split": split}
                    values = {task: _merged(i, by, head, scale, boost) for i, task in enumerate(tasks)}
                    out += _rows(at, values, tuned)
                    out += _gains(at, values, probing, width) if split == "test" else []
    return out


def _mean(tasks: Sequence[str], by: float, heads: str, scale: float, boost: float) -> float:
    return sum(_merged(i, by, heads, scale, boost) / _tuned(i, by) for i in range(len(tasks))) / len(tasks)


def results(
    *,
    backbones: Sequence[str] = ("lab:supervised",),
    regimes: Sequence[str] = ("aligned",),
    seeds: Sequence[int] = (0,),
    tasks: Sequence[str] = EIGHT,
    methods: dict[str, float] | None = None,
    heads: Sequence[str] = ("kept", "reprobed"),
    width: float = 0.007,
    scales: Sequence[float] = SCALES,
) -> pd.DataFrame:
    """Make the rows of a whole run; ``methods`` gives each its rise at the best scale, ``width`` half an interval."""
    out: list[Key] = []
    for b, backbone in enumerate(backbones):
        for r, regime in enumerate(regimes):
            for seed in seeds:
                key: Key = {"study": "fixture", "backbone": backbone, "regime": regime, "seed": seed}
                key |= {"tasks": "+".join(tasks), "config": "{}", "artifact": f"evaluate-{b}{r}{seed}"}
                shift = -0.04 * b - 0.1 * r + 0.003 * seed
                chosen = {"task_arithmetic": 0.15} if methods is None else methods
                out += _setting(key, tasks, chosen, heads, width, scales, shift)
    return pd.DataFrame(out)[list(COLUMNS)]


def heatmap(
    *,
    backbones: Sequence[str] = ("lab:supervised",),
    regimes: Sequence[str] = ("aligned",),
    seeds: Sequence[int] = (0,),
    pairs: Sequence[tuple[str, str]] = (("cars", "dtd"), ("mnist", "svhn")),
    points: int = 11,
    reach: float = 3.0,
) -> pd.DataFrame:
    """Make disentanglement errors that are zero where they must be and grow with both coefficients."""
    grid = [reach * (2 * i / (points - 1) - 1) for i in range(points)]
    columns = ["backbone", "regime", "seed", "task_1", "task_2", "scale_1", "scale_2", "error_1", "error_2", "n"]
    rows = [
        (backbone, regime, seed, one, two, x, y, _error(x, y, b + p), _error(y, x, b + 2 * p), 128)
        for b, backbone in enumerate(backbones)
        for regime in regimes
        for seed in seeds
        for p, (one, two) in enumerate(pairs)
        for x in grid
        for y in grid
    ]
    return pd.DataFrame(rows, columns=columns)


def _error(own: float, other: float, hardness: int) -> float:
    return min(0.95, (0.06 + 0.02 * hardness) * other**2 * (1 + 0.15 * abs(own))) if other else 0.0


LOCK: dict[str, object] = {
    "study": "fixture",
    "versions": {"python": "3.12.3", "taskvec": "0.1.0", "torch": "2.9.0", "numpy": "2.3.4"},
    "seeds": [0],
    "threads": 1,
    "fingerprints": {"probe-cars": "6f1e", "merge-task_arithmetic": "a09c"},
}
STUDY = "name: fixture\nbackbones: [lab:supervised]\ntasks: [lab:greek, lab:street]  # <8 & more>\n"


def run_folder(folder: Path, rows: pd.DataFrame, errors: pd.DataFrame | None) -> Path:
    """Write the two CSV files as a run does."""
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_csv(folder / "results.csv", index=False)
    if errors is not None:
        errors.to_csv(folder / "disentanglement.csv", index=False)
    return folder
