"""Result rows of a study out of its artifacts, in the columns of results.csv and disentanglement.csv."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from taskvec.pipeline import Step
from taskvec.plan import Candidate, Cell
from taskvec.store import Artifact, canonical

COLUMNS = (
    "study backbone regime seed tasks method config heads scale task split metric value artifact".split()  # noqa: SIM905
)
HEATMAP_COLUMNS = "backbone regime seed task_1 task_2 scale_1 scale_2 error_1 error_2 n".split()  # noqa: SIM905
Done = Mapping[Step, Artifact]
Row = dict[str, Any]


@dataclass(frozen=True)
class Writer:
    """Writes the rows of one cell: backbone, regime and seed."""

    study: str
    cell: Cell
    done: Done

    def rows(self) -> Iterator[Row]:
        """Yield all rows: validation for every scale tried, test for what was chosen."""
        cell = self.cell
        single = {"probing": (0.0, cell.head), "fine_tuned": (1.0, cell.finetuned)}
        tuned = {t: self.done[s].json("metrics.json")["validation"] for t, s in cell.finetuned.items()}
        for method, (scale, steps) in single.items():
            values = {t: self.done[s].json("metrics.json")["validation"] for t, s in steps.items()}
            made_by = {t: self.done[s].id for t, s in steps.items()} | {"": self._id(cell.model)}
            yield from self.measured(method, "kept", scale, "validation", values, tuned, made_by)
        for candidate in cell.candidates:
            yield from self.curve(candidate, tuned)
        yield from self.test_rows()

    def curve(self, candidate: Candidate, tuned: Mapping[str, float]) -> Iterator[Row]:
        """Yield the validation rows of every scale that a candidate tried, in rising order."""
        found: dict[float, tuple[dict[str, float], dict[str, str]]] = {}
        for steps in candidate.rounds:
            for task, step in steps.items():
                curve = self.done[step].json("curve.json")
                for scale, value in zip(curve["scales"], curve["validation"], strict=True):
                    values, made_by = found.setdefault(scale, ({}, {"": self._id(candidate.choice)}))
                    values[task], made_by[task] = value, self.done[step].id
        for scale, (values, made_by) in sorted(found.items()):
            yield from self.measured(
                candidate.method.name, candidate.heads, scale, "validation", values, tuned, made_by
            )

    def test_rows(self) -> Iterator[Row]:
        """Yield the test rows: probing, fine-tuned, and the chosen scale of every candidate with its gain."""
        cell = self.cell
        measured = {t: self.done[s].json("test.json") for t, s in cell.test.items()}
        tuned = {t: values["fine_tuned"] for t, values in measured.items()}
        made_by = {t: self.done[s].id for t, s in cell.test.items()} | {"": self._id(cell.gains)}
        for method, scale in (("probing", 0.0), ("fine_tuned", 1.0)):
            values = {t: found[method] for t, found in measured.items()}
            yield from self.measured(method, "kept", scale, "test", values, tuned, made_by)
        gains = self.done[cell.gains].json("gains.json") if cell.gains else {}
        for index, candidate in enumerate(cell.candidates):
            scale = self.done[candidate.choice].json("choice.json")["scale"]
            values = {t: found[str(index)] for t, found in measured.items()}
            name, heads = candidate.method.name, candidate.heads
            yield from self.measured(name, heads, scale, "test", values, tuned, made_by)
            for task, gain in gains[str(index)].items():
                for part, metric in GAINS.items():
                    yield self.row(name, heads, scale, task, "test", metric, gain[part], made_by[task])

    def measured(
        self,
        method: str,
        heads: str,
        scale: float,
        split: str,
        values: Mapping[str, float],
        tuned: Mapping[str, float],
        made_by: Mapping[str, str],
    ) -> Iterator[Row]:
        """Yield accuracy and normalised accuracy of every task and their means; nothing is normalised by zero."""
        ordered = {t: values[t] for t in self.cell.tasks}
        columns = {"accuracy": ordered}
        if all(tuned[t] > 0 for t in ordered):
            columns["normalised_accuracy"] = {t: value / tuned[t] for t, value in ordered.items()}
        for metric, column in columns.items():
            for task, value in column.items():
                yield self.row(method, heads, scale, task, split, metric, value, made_by[task])
            yield self.row(method, heads, scale, "", split, metric, sum(column.values()) / len(column), made_by[""])

    def row(
        self, method: str, heads: str, scale: float, task: str, split: str, metric: str, value: float, artifact: str
    ) -> Row:
        """Return one row of results.csv."""
        cell = self.cell
        place = (self.study, cell.backbone, cell.regime, cell.seed, "+".join(cell.tasks))
        return dict(
            zip(
                COLUMNS,
                (*place, method, canonical({}), heads, scale, task, split, metric, value, artifact),
                strict=True,
            )
        )

    def _id(self, step: Step | None) -> str:
        return self.done[step].id if step is not None else ""


GAINS = {"mean": "gain_over_probing", "low": "gain_over_probing_low", "high": "gain_over_probing_high"}


def results(study: str, cells: list[Cell], done: Done) -> pd.DataFrame:
    """Return all rows of a study in the columns of results.csv."""
    return pd.DataFrame([row for cell in cells for row in Writer(study, cell, done).rows()], columns=COLUMNS)


def heatmaps(cells: list[Cell], done: Done) -> pd.DataFrame | None:
    """Return the rows of disentanglement.csv, or None where a study measured no heatmap."""
    rows = [
        row for cell in cells for pair, step in cell.heatmaps.items() for row in heatmap_rows(cell, pair, done[step])
    ]
    return pd.DataFrame(rows, columns=HEATMAP_COLUMNS) if rows else None


def heatmap_rows(cell: Cell, pair: tuple[str, str], artifact: Artifact) -> Iterator[Row]:
    """Yield a row for every point of one heatmap; ``n`` is the smaller number of images of the two tasks."""
    errors = artifact.json("errors.json")
    place = (cell.backbone, cell.regime, cell.seed, *pair)
    for i, one in enumerate(errors["scales"]):
        for j, two in enumerate(errors["scales"]):
            values = (one, two, errors["first"][i][j], errors["second"][i][j], min(errors["n"]))
            yield dict(zip(HEATMAP_COLUMNS, (*place, *values), strict=True))
