"""What each option of a study costs: numbers to store, and the seconds of the steps that it needs by what they are for.

Seconds are those that the store's records tell of each step where it was run, so the same store gives the same costs.
They stand in a file of their own, because results are the same bits on every run and seconds are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from taskvec.core.files import canonical
from taskvec.engine.pipeline import Step, ordered
from taskvec.engine.store import Artifact
from taskvec.merging.variants import DIFFERENCES, Variant
from taskvec.report.rows import Done, Writer
from taskvec.study.experiment import Experiment, Trial
from taskvec.weights.reader import Checkpoint

HEADINGS = ("probing", "training", "merging", "search")
"""What the seconds of a step are for; loading and decoding, which every option needs alike, are left out."""
UNSEEN = "unseen training"
"""The heading of checkpoints that tasks bring."""
STORED = ("encoders", "parameters", "bytes_per_task")
SECONDS = tuple(f"{heading}_seconds" for heading in HEADINGS)
COLUMNS = ("backbone", "regime", "seed", "tasks", "method", "config", "heads", *STORED, *SECONDS, *DIFFERENCES)
AGREEMENT = "agreement"
"""Stands for heads in rows on what it takes to choose the scale of re-probed heads by the agreement of features."""
Row = dict[str, Any]


def costs(experiments: Iterable[Experiment], done: Done) -> pd.DataFrame:
    """Return a row for every option of a study: the baselines, and each merge with each kind of heads.

    ``parameters`` counts the numbers to store, heads included, ``bytes_per_task`` what a per-task merge needs beside
    them. Training seconds are NaN where a task brings a checkpoint, whose training nothing here has seen.
    """
    return pd.DataFrame([row for exp in experiments for row in rows(exp, done)], columns=COLUMNS)


def rows(exp: Experiment, done: Done) -> Iterator[Row]:
    """Yield the costs of every option of one backbone, regime and seed."""
    baselines = {"probing": (1, exp.head), "zero_shot": (1, exp.zero_shot)}
    baselines |= {"fine_tuned": (len(exp.tasks), exp.finetuned), "joint": (1, {"": exp.joint} if exp.joint else {})}
    for method, (encoders, steps) in baselines.items():
        if steps:
            yield row(exp, done, Variant(method), "kept", {}, stored(exp, done, encoders), steps.values())
    for trial in exp.trials:
        config = Writer("", exp, done).config_of(trial)
        size = stored(exp, done, 1, done[trial.merged] if trial.per_task else None)
        size["parameters"] += corrections(trial, done)
        variant = trial.variant
        yield row(exp, done, variant, trial.read_by, config, size, [trial.selection])
        if compared := trial.measures.get(AGREEMENT):
            yield row(exp, done, variant, AGREEMENT, config, size, compared.values())


def row(
    exp: Experiment,
    done: Done,
    variant: Variant,
    heads: str,
    config: Mapping[str, Any],
    size: Row,
    steps: Iterable[Step],
) -> Row:
    """Return the costs of one option: what it stores, and the seconds of all that its steps need."""
    place = {"backbone": exp.backbone, "regime": exp.regime, "seed": exp.seed, "tasks": "+".join(exp.tasks)}
    option = vars(variant) | {"config": canonical(dict(config)), "heads": heads}
    return place | option | size | seconds(steps, done)


def seconds(steps: Iterable[Step], done: Done) -> dict[str, float]:
    """Return the seconds of everything that some steps need, by what they are for; the same work counts once."""
    headings: dict[Artifact, str] = {done[step]: step.type.heading for step in ordered(steps)}
    spent = dict.fromkeys(SECONDS, 0.0)
    for artifact, heading in headings.items():
        if heading in HEADINGS:
            spent[f"{heading}_seconds"] += artifact.seconds()
    if UNSEEN in headings.values():
        spent["training_seconds"] = float("nan")
    return {name: round(value, 3) for name, value in spent.items()}


def stored(exp: Experiment, done: Done, encoders: int, per_task: Artifact | None = None) -> Row:
    """Return what an option keeps: so many encoders and a head a task; a per-task merge keeps its common vector too."""
    size = numbers(done[exp.encoder], "encoder.safetensors")
    heads = sum(numbers(done[step], "head.safetensors") for step in exp.finetuned.values())
    encoders += per_task is not None
    beside = per_task.json("merge.json")["bytes_per_task"] if per_task else 0
    return {"encoders": encoders, "parameters": encoders * size + heads, "bytes_per_task": beside}


def numbers(artifact: Artifact, name: str) -> int:
    """Count the numbers in a safetensors file of an artifact, by its header."""
    with Checkpoint(artifact.folder / name) as file:
        return sum(tensor.size for tensor in file.tensors.values())


def corrections(trial: Trial, done: Done) -> int:
    """Count the numbers of all tasks' corrections of features, of one scale each; none without surgery."""
    if not trial.variant.correction:
        return 0
    total = 0
    for step in trial.rounds[0].values():
        with Checkpoint(done[step].folder / "heads.safetensors") as file:
            total += 2 * next(tensor.size for name, tensor in file.tensors.items() if name.endswith(".down"))
    return total
