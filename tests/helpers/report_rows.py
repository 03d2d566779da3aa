"""Metric rows as a run would write them, from closed formulas, to test tables, figures and page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pandas as pd

COLUMNS = (
    "study", "backbone", "regime", "seed", "tasks", "method", "config", "heads", "scale", "task", "split", "metric",
    "value", "artifact", "scaling",
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


def _gains(
    key: Key, values: dict[str, float], probing: dict[str, float], width: float, of: dict[str, float] | None = None
) -> list[Key]:
    gains = {task: value - probing[task] for task, value in values.items()}
    gains[""] = sum(gain / (of[task] if of else 1) for task, gain in gains.items()) / len(gains)
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
                key: Key = {"study": "fixture", "backbone": backbone, "regime": regime, "seed": seed, "scaling": ""}
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


# ---------------------------------------------------------------- a run with everything the paper shows

ROLES = {
    "sup-1k": "vit-b16-in1k",
    "sup-21k": "vit-b16-in21k",
    "masked": "vit-b16-mae",
    "self-distilled": "vit-b16-dino",
    "clip-small": "vit-b16-clip-400m",
    "clip-large": "vit-b16-clip-2b",
    "sup-21k-L": "vit-l16-in21k",
}
LEVEL = {"sup-1k": -0.06, "sup-21k": -0.02, "masked": -0.2, "self-distilled": -0.03, "clip-small": 0.0,
         "clip-large": 0.02, "sup-21k-L": 0.0, "random-init": -0.4}  # fmt: skip
RISE = {"self-distilled": -0.1, "clip-small": 0.3, "clip-large": 0.3}
HARDNESS = {"clip-small": 1, "clip-large": 0, "sup-21k-L": 2, "sup-21k": 3, "sup-1k": 4, "self-distilled": 6,
            "masked": 8, "random-init": 20}  # fmt: skip
OPEN_REGIMES = ("open", "open-full")


def full_run(
    backbones: Sequence[str] = tuple(LEVEL), tasks: Sequence[str] = EIGHT, seeds: Sequence[int] = (0, 1, 2)
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make results and heatmaps of many backbones in all regimes: sets of tasks, joint, zero-shot, λ per task."""
    cells = [
        (backbone, regime, seed)
        for backbone in backbones
        for regime in ("aligned", "full", *(OPEN_REGIMES if "clip" in backbone else ()))
        for seed in (seeds if regime == "aligned" else seeds[:1])
    ]
    rows = pd.DataFrame([row for cell in cells for row in _whole_cell(*cell, tasks)])[list(COLUMNS)]
    pairs = [("cars", "dtd"), ("mnist", "svhn"), ("gtsrb", "sun397")]
    heat = [
        _harder(heatmap(backbones=(name,), regimes=(regime,), pairs=pairs), HARDNESS[name] * (1 + (regime == "full")))
        for name in backbones
        for regime in ("aligned", "full")
    ]
    return rows, pd.concat(heat, ignore_index=True)


def _harder(rows: pd.DataFrame, hardness: int) -> pd.DataFrame:
    errors = {name: (rows[name] * (1 + 0.3 * hardness)).clip(upper=0.95) for name in ("error_1", "error_2")}
    return rows.assign(**errors)


def _whole_cell(backbone: str, regime: str, seed: int, tasks: Sequence[str]) -> list[Key]:
    """All rows of one cell; full fine-tuning keeps half of what aligned has, open-full more, and open less."""
    key: Key = {"study": "fixture", "backbone": backbone, "regime": regime, "seed": seed, "tasks": "+".join(tasks)}
    key |= {"config": "{}", "artifact": f"{backbone}-{regime}-{seed}", "scaling": ""}
    shift = LEVEL[backbone] + 0.003 * seed
    methods = {"task_arithmetic": RISE.get(backbone, 0.15), "task_arithmetic_per_task": 0.35}
    share = {"aligned": 1.0, "full": 0.3 if backbone == "masked" else 0.5, "open": 0.9, "open-full": 0.85}[regime]
    rows = _setting(key, tasks, methods, ["kept"], 0.007, SCALES, shift)
    rows = [_lowered(row, share, rows) for row in rows]
    for row in rows:
        if row["method"] == "task_arithmetic_per_task":
            row |= {"method": "task_arithmetic", "scaling": "per-task"}
            row["config"] = json.dumps({"scales": {task: round(0.05 * (i % 5), 2) for i, task in enumerate(tasks)}})
    rows += _baselines(key, tasks, shift, "joint" if regime == "aligned" else "zero_shot")
    return rows + (_sets(key, tasks, rows) if seed == 0 and regime in ("aligned", "full") else [])


def _lowered(row: Key, share: float, rows: list[Key]) -> Key:
    """Take a share of a merged accuracy, and take what a gain lost by that."""
    if not str(row["method"]).startswith("task_arithmetic") or share == 1:
        return row
    value = float(str(row["value"]))
    if not str(row["metric"]).startswith("gain"):
        return {**row, "value": share * value}
    same = {name: known for name, known in (row | {"metric": "accuracy"}).items() if name != "value"}
    accuracy = next(float(str(other["value"])) for other in rows if same.items() <= other.items())
    return {**row, "value": value - (1 - share) * accuracy}


def _baselines(key: Key, tasks: Sequence[str], shift: float, method: str) -> list[Key]:
    """Joint training between probing and fine-tuned, or a zero-shot head well below probing, where there is one."""
    if method == "zero_shot" and key["regime"] not in OPEN_REGIMES:
        return []
    tuned = {task: _tuned(i, shift) for i, task in enumerate(tasks)}
    values = {task: value - (0.01 if method == "joint" else 0.35) for task, value in tuned.items()}
    return _rows({**key, "method": method, "heads": "kept", "scale": 0.0, "split": "test"}, values, tuned)


def _sets(key: Key, tasks: Sequence[str], rows: list[Key]) -> list[Key]:
    """Six sets of each size below all, on a line from 0.97 (masked: 0.75) down to the merge of all tasks."""
    wanted = {"method": "task_arithmetic", "split": "test", "metric": "normalised_accuracy", "task": ""}
    end = next(float(str(row["value"])) for row in rows if all(row[name] == value for name, value in wanted.items()))
    top = 0.75 if key["backbone"] == "masked" else 0.97
    base: Key = {**key, "method": "task_arithmetic", "heads": "kept", "scale": 0.1, "split": "test", "task": ""}
    out: list[Key] = []
    for size in range(2, len(tasks) + 1):
        mean = top + (end - top) * (size - 1) / (len(tasks) - 1)
        error = 0.01 * (1 + HARDNESS[str(key["backbone"])]) * size
        for number, some in enumerate(list(combinations(tasks, size))[:6]):
            at: Key = {**base, "tasks": "+".join(some)}
            tuned = sum(_tuned(tasks.index(task), LEVEL[str(key["backbone"])]) for task in some) / size
            value = mean + 0.01 * (number - 2.5)
            if size < len(tasks):
                out += [{**at, "metric": "accuracy", "value": tuned * value}]
                out += [{**at, "metric": "normalised_accuracy", "value": value}]
            out += [{**at, "metric": "disentanglement_error", "value": error}]
    return out


# ---------------------------------------------------------------- tasks of several kinds

KINDS = {"greek": "accuracy", "ink": "patch_accuracy", "angle": "within_15_degrees", "street": "accuracy"}
LEVELS = {
    "probing": (0.5, 0.6, 0.4, 0.7),
    "fine_tuned": (0.8, 0.75, 0.5, 1.0),
    "task_arithmetic": (0.6, 0.6, 0.45, 0.83),
}
OF_SETS = {  # mean rows of three pairs of tasks
    "greek+street": {"accuracy": 0.81, "normalised_accuracy": 0.85},
    "greek+ink": {"accuracy": 0.7, "patch_accuracy": 0.7, "normalised_accuracy": 0.2, "normalised_metric": 0.9},
    "ink+angle": {"patch_accuracy": 0.7, "within_15_degrees": 0.48, "normalised_metric": 0.95},
}


def mixed(backbones: Sequence[str] = ("lab:random",), tasks: Sequence[str] = tuple(KINDS)) -> pd.DataFrame:
    """Make the rows of a study with tasks of several kinds: addition at three scales, 0.2 chosen, and three pairs."""
    out: list[Key] = []
    for backbone in backbones:
        key: Key = {"study": "kinds", "backbone": backbone, "regime": "aligned", "seed": 0, "tasks": "+".join(tasks)}
        key |= {"config": "{}", "scaling": "", "artifact": "made", "heads": "kept"}
        levels = {method: dict(zip(KINDS, values, strict=True)) for method, values in LEVELS.items()}
        tuned = levels["fine_tuned"]
        for method, values in levels.items():
            chosen = {"probing": 0.0, "fine_tuned": 1.0}.get(method, 0.2)
            tried = (0.0, 0.2, 0.4) if method == "task_arithmetic" else (chosen,)
            at: Key = {**key, "method": method, "scale": chosen, "split": "test"}
            out += _of_kinds(at, {task: values[task] for task in tasks}, tuned)
            for scale in tried:
                lower = {task: values[task] - abs(scale - chosen) / 4 for task in tasks}
                out += _of_kinds({**at, "split": "validation", "scale": scale}, lower, tuned)
        own, base = ({t: levels[name][t] for t in tasks} for name in ("task_arithmetic", "probing"))
        out += _gains({**key, "method": "task_arithmetic", "scale": 0.2, "split": "test"}, own, base, 0.01, tuned)
        at = {**key, "method": "task_arithmetic", "scale": 0.2, "split": "test", "task": ""}
        for names, metrics in OF_SETS.items() if len(tasks) == len(KINDS) else ():
            out += [{**at, "tasks": names, "metric": metric, "value": value} for metric, value in metrics.items()]
    return pd.DataFrame(out)[list(COLUMNS)]


def _of_kinds(key: Key, values: dict[str, float], tuned: dict[str, float]) -> list[Key]:
    """Every task's own metric, normalised accuracy of classification, normalised metrics of all, and their means."""
    columns: dict[str, dict[str, float]] = {}
    for task, value in values.items():
        columns.setdefault(KINDS[task], {})[task] = value
    ratios = {task: value / tuned[task] for task, value in values.items()}
    columns["normalised_accuracy"] = {task: ratios[task] for task in columns.get("accuracy", {})}
    columns["normalised_metric"] = ratios
    shown = {metric: {**column, "": sum(column.values()) / len(column)} for metric, column in columns.items() if column}
    return [
        {**key, "metric": metric, "task": task, "value": value}
        for metric, column in shown.items()
        for task, value in column.items()
    ]


# ---------------------------------------------------------------- costs

ENCODER = 1_000_000


def costs(rows: pd.DataFrame, per_task: Sequence[str] = ()) -> pd.DataFrame:
    """Make costs.csv for rows: merging and search take 2 s and half a second more for each row before, re-probing 9.

    Methods in ``per_task`` keep two encoders and 125 000 bytes a task.
    """
    options = rows[rows["split"] == "test"].drop_duplicates(["backbone", "regime", "seed", "method", "heads"])
    order = list(dict.fromkeys(rows["method"]))
    out = []
    for row in options.to_dict("records"):
        tasks, method = len(row["tasks"].split("+")), row["method"]
        merged, reprobed = method not in ("probing", "fine_tuned", "joint"), row["heads"] == "reprobed"
        encoders = tasks if method == "fine_tuned" else 2 if method in per_task else 1
        spent = {"probing_seconds": 10.0, "training_seconds": 0.0 if method == "probing" else 100.0}
        spent |= {"merging_seconds": float(merged), "search_seconds": merged * (10.0 if reprobed else 1.0)}
        spent["search_seconds"] += merged * 0.5 * order.index(method)
        stored = {"encoders": encoders, "parameters": encoders * ENCODER + 1000}
        stored |= {"bytes_per_task": 125_000 if method in per_task else 0}
        names = ("backbone", "regime", "seed", "tasks", "method", "config", "heads")
        out.append({name: row[name] for name in names} | stored | spent)
    return pd.DataFrame(out)


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
