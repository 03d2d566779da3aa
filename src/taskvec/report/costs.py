"""What each option of a study costs: numbers to store, and the seconds of the steps that it needs by what they are for.

Seconds are those that the store's records tell of each step where it was run, so the same store gives the same costs.
They stand in a file of their own, because results are the same bits on every run and seconds are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pandas as pd

from taskvec.core.files import canonical
from taskvec.engine.pipeline import Step, ordered
from taskvec.engine.store import Artifact
from taskvec.merging.variants import DIFFERENCES, Variant
from taskvec.report.rows import Done, Writer
from taskvec.study.experiment import Candidate, Cell
from taskvec.weights.reader import Checkpoint

PARTS: Mapping[str, str] = MappingProxyType(
    {
        "features": "probing",
        "probe_task": "probing",
        "choose_rate": "probing",
        "pick_head": "probing",
        "zero_shot": "probing",
        "finetune": "training",
        "finetune_joint": "training",
        "choose_learning_rate": "training",
        "merge": "merging",
        "kept_curve": "search",
        "reprobed_curve": "search",
        "reestimate": "search",
        "reestimated_curve": "search",
        "per_task_scales": "search",
        "surgery_curve": "search",
        "agreement": "search",
        "choose_scale": "search",
        "choose_option": "search",
        "pick_merge": "search",
    }
)
"""What the seconds of each kind of step are for; loading and decoding, which every option needs alike, are left out."""
STORED = ("encoders", "parameters", "bytes_per_task")
SECONDS = tuple(f"{part}_seconds" for part in dict.fromkeys(PARTS.values()))
COLUMNS = ("backbone", "regime", "seed", "tasks", "method", "config", "heads", *STORED, *SECONDS, *DIFFERENCES)
AGREEMENT = "agreement"
"""Stands for heads in rows on what it takes to choose the scale of re-probed heads by the agreement of features."""
Row = dict[str, Any]


def costs(cells: Iterable[Cell], done: Done) -> pd.DataFrame:
    """Return a row for every option of a study: the baselines, and each merge with each kind of heads.

    ``parameters`` counts the numbers to store, heads included, ``bytes_per_task`` what a per-task merge needs beside
    them. Training seconds are NaN where a task brings a checkpoint, whose training nothing here has seen.
    """
    return pd.DataFrame([row for cell in cells for row in rows(cell, done)], columns=COLUMNS)


def rows(cell: Cell, done: Done) -> Iterator[Row]:
    """Yield the costs of every option of one backbone, regime and seed."""
    own = {"probing": (1, cell.head), "zero_shot": (1, cell.zero_shot)}
    own |= {"fine_tuned": (len(cell.tasks), cell.finetuned), "joint": (1, {"": cell.joint} if cell.joint else {})}
    for method, (encoders, steps) in own.items():
        if steps:
            yield row(cell, done, Variant(method), "kept", {}, stored(cell, done, encoders), steps.values())
    for candidate in cell.candidates:
        config = Writer("", cell, done).config_of(candidate)
        size = stored(cell, done, 1, done[candidate.merged] if candidate.per_task else None)
        size["parameters"] += corrections(candidate, done)
        variant = candidate.variant
        yield row(cell, done, variant, candidate.read_by, config, size, [candidate.choice])
        if compared := candidate.measures.get(AGREEMENT):
            yield row(cell, done, variant, AGREEMENT, config, size, compared.values())


def row(
    cell: Cell, done: Done, variant: Variant, heads: str, config: Mapping[str, Any], size: Row, steps: Iterable[Step]
) -> Row:
    """Return the costs of one option: what it stores, and the seconds of all that its steps need."""
    place = {"backbone": cell.backbone, "regime": cell.regime, "seed": cell.seed, "tasks": "+".join(cell.tasks)}
    own = vars(variant) | {"config": canonical(dict(config)), "heads": heads}
    return place | own | size | seconds(steps, done)


def seconds(steps: Iterable[Step], done: Done) -> dict[str, float]:
    """Return the seconds of everything that some steps need, by what they are for; the same work counts once."""
    kinds: dict[Artifact, str] = {done[step]: step.type.name for step in ordered(steps)}
    found = dict.fromkeys(SECONDS, 0.0)
    for artifact, kind in kinds.items():
        if kind in PARTS:
            found[f"{PARTS[kind]}_seconds"] += artifact.seconds()
        elif kind == "import_finetuned":
            found["training_seconds"] = float("nan")
    return {name: round(value, 3) for name, value in found.items()}


def stored(cell: Cell, done: Done, encoders: int, per_task: Artifact | None = None) -> Row:
    """Return what an option keeps: so many encoders and a head a task; a per-task merge keeps its common vector too."""
    size = numbers(done[cell.encoder], "encoder.safetensors")
    heads = sum(numbers(done[step], "head.safetensors") for step in cell.finetuned.values())
    encoders += per_task is not None
    beside = per_task.json("merge.json")["bytes_per_task"] if per_task else 0
    return {"encoders": encoders, "parameters": encoders * size + heads, "bytes_per_task": beside}


def numbers(artifact: Artifact, name: str) -> int:
    """Count the numbers in a safetensors file of an artifact, by its header."""
    with Checkpoint(artifact.folder / name) as held:
        return sum(tensor.size for tensor in held.tensors.values())


def corrections(candidate: Candidate, done: Done) -> int:
    """Count the numbers of all tasks' corrections of features, of one scale each; none without surgery."""
    if not candidate.variant.correction:
        return 0
    total = 0
    for step in candidate.rounds[0].values():
        with Checkpoint(done[step].folder / "heads.safetensors") as held:
            total += 2 * next(tensor.size for name, tensor in held.tensors.items() if name.endswith(".down"))
    return total
