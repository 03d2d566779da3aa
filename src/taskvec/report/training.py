"""The losses of every fine-tuning of a study, out of its artifacts: the rows of training.csv."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from taskvec.engine.pipeline import Step
from taskvec.report.rows import Done
from taskvec.study.experiment import Experiment

COLUMNS = ("backbone", "regime", "seed", "task", "step", "loss", "learning_rate", "peak", "trial")
POINTS = 200
"""Rows a training at most: each is the mean loss of as many steps, up to ``step``. The store has every step."""
Row = dict[str, Any]


def training(experiments: Iterable[Experiment], done: Done) -> pd.DataFrame | None:
    """Return the rows of training.csv, or None where a study trained nothing that kept its losses.

    ``learning_rate`` is that of the step and ``peak`` the highest of the schedule; a ``trial`` only tried a learning
    rate. The task of joint training is empty.
    """
    rows = [row for exp in experiments for row in training_rows(exp, done)]
    return pd.DataFrame(rows, columns=COLUMNS) if rows else None


def training_rows(exp: Experiment, done: Done) -> Iterator[Row]:
    """Yield the rows of one backbone, regime and seed: each task, joint training, trials of learning rates."""
    for task, step in (exp.finetuned | ({"": exp.joint} if exp.joint else {})).items():
        yield from curve(exp, task, step, done, trial=False)
    for step in exp.rate[1].values() if exp.rate else ():
        yield from curve(exp, exp.rate[0] if exp.rate else "", step, done, trial=True)


def curve(exp: Experiment, task: str, step: Step, done: Done, trial: bool) -> Iterator[Row]:
    """Yield the rows of one training; a checkpoint that a task brings has none."""
    path = done[step].folder / "losses.npy"
    if not path.exists():
        return
    losses, rates = np.load(path).T
    place = {"backbone": exp.backbone, "regime": exp.regime, "seed": exp.seed, "task": task}
    peak = done[step].json("metrics.json")["learning_rate"]
    for steps in np.array_split(np.arange(len(losses)), min(POINTS, len(losses))):
        last = int(steps[-1])
        values = {"step": last + 1, "loss": float(losses[steps].mean()), "learning_rate": float(rates[last])}
        yield place | values | {"peak": peak, "trial": trial}
