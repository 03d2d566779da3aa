"""Losses of fine-tuning in the store, in training.csv and on the page."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import report_rows as fixture
from hypothesis import given
from hypothesis import strategies as st

from taskvec.core.files import read_json, write_json
from taskvec.core.settings import Finetune
from taskvec.report.figures.drawing import plan
from taskvec.report.figures.training import training_curves
from taskvec.report.training import COLUMNS, POINTS, training
from taskvec.study.steps.learning import save_losses

SETTINGS = Finetune(steps=6, warmup=2, learning_rate=0.5)


def trained(folder: Path, losses: list[float], settings: Finetune = SETTINGS) -> Any:
    """Write what a step of fine-tuning keeps, and return its artifact."""
    folder.mkdir(parents=True)
    save_losses(losses, settings, folder)
    write_json(folder / "metrics.json", {"learning_rate": settings.learning_rate})
    return SimpleNamespace(folder=folder, json=lambda name: read_json(folder / name))


def experiment(finetuned: list[str], joint: str | None = None, rate: Any = None) -> Any:
    place = {"backbone": "lab:random", "regime": "aligned", "seed": 3, "joint": joint, "rate": rate}
    return SimpleNamespace(finetuned={name: name for name in finetuned}, **place)


def test_every_training_has_its_rows(tmp_path: Path) -> None:
    slow = SETTINGS.model_copy(update={"learning_rate": 0.1})
    done = {name: trained(tmp_path / name, [3.0, 2.0, 1.0]) for name in ("greek", "all")}
    done |= {"slow": trained(tmp_path / "slow", [3.0, np.nan], slow), "brought": trained(tmp_path / "brought", [])}
    (tmp_path / "brought" / "losses.npy").unlink()
    rows = training([experiment(["greek", "brought"], "all", ("greek", {0.1: "slow"}))], done)  # type: ignore[arg-type]
    assert rows is not None
    assert tuple(rows.columns) == COLUMNS
    assert rows["task"].tolist() == ["greek"] * 3 + [""] * 3 + ["greek"] * 2
    assert rows["trial"].tolist() == [False] * 6 + [True] * 2
    assert rows["step"].tolist() == [1, 2, 3, 1, 2, 3, 1, 2]
    assert rows["loss"].tolist()[:7] == [3, 2, 1, 3, 2, 1, 3]
    assert rows["loss"].isna().tolist() == [False] * 7 + [True]
    assert rows["learning_rate"].tolist() == pytest.approx([0.25, 0.5, 0.5] * 2 + [0.05, 0.1])
    assert rows["peak"].tolist() == [0.5] * 6 + [0.1] * 2
    assert training([experiment(["brought"])], done) is None  # type: ignore[arg-type]


@given(st.integers(1, 3000))
def test_long_trainings_are_thinned_to_means_of_equal_spans(tmp_path_factory: Any, steps: int) -> None:
    losses = np.random.default_rng(steps).random(steps)
    folder = tmp_path_factory.mktemp("trained") / "greek"
    done = {"greek": trained(folder, losses.tolist(), Finetune(steps=steps))}
    rows = training([experiment(["greek"])], done)  # type: ignore[arg-type]
    assert rows is not None
    assert len(rows) == min(steps, POINTS)
    assert rows["step"].is_monotonic_increasing
    spans = np.diff([0, *rows["step"]])
    assert spans.max() - spans.min() <= 1
    assert float((rows["loss"] * spans).sum()) == pytest.approx(losses.sum())
    assert rows["step"].iloc[-1] == steps


def curves(regimes: tuple[str, ...] = ("aligned", "full")) -> pd.DataFrame:
    """Make curves of two tasks and of joint training, with two seeds, and a trial that diverged."""
    rows = [
        ("lab:supervised", regime, seed, task, step, 3.0 / step + seed, 1e-5, 1e-5, False)
        for task in ("dtd", "svhn", "")
        for regime in (regimes if task else regimes[:1])
        for seed in (0, 1)
        for step in range(1, 31)
    ]
    rows += [("lab:supervised", "aligned", 0, "dtd", s, 9.0 if s < 9 else np.nan, 1.0, 1.0, True) for s in range(1, 10)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def test_a_panel_a_task_and_a_line_a_regime() -> None:
    figure = training_curves(curves(), "lab:supervised")
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.axison]
    assert titles == ["dtd", "svhn", "all tasks, joint"]
    labels = [[str(line.get_label()) for line in ax.get_lines() if line.get_label()[0] != "_"] for ax in figure.axes]
    assert labels == [["trials of learning rates", "aligned", "full"], ["aligned", "full"], ["aligned"]]
    faint = next(line for line in figure.axes[1].get_lines() if line.get_label()[0] == "_")
    assert np.asarray(faint.get_ydata()) == pytest.approx(3 / np.arange(1, 31) + 0.5)  # the mean over seeds
    assert figure.axes[0].get_ylim()[0] == 0
    assert figure.axes[0].get_ylim()[1] < 5  # a trial that left does not squeeze the others


@pytest.mark.parametrize("steps", [1, 2])
def test_a_smoke_run_of_few_steps_is_drawn_too(steps: int) -> None:
    rows = curves()
    figure = training_curves(rows[rows["step"] <= steps], "lab:supervised")
    assert all(line.get_marker() == "o" for line in figure.axes[1].get_lines() if line.get_label()[0] != "_")


def test_all_regimes_of_a_backbone_share_one_figure_beside_the_first() -> None:
    results = fixture.results(regimes=("aligned", "full"))
    figures = [figure for figure in plan(results, training=curves()) if figure.kind == "training"]
    assert [(figure.backbone, figure.regime) for figure in figures] == [("lab:supervised", "aligned")]
    assert not [figure for figure in plan(results) if figure.kind == "training"]
    other = curves().assign(backbone="lab:random")
    assert not [figure for figure in plan(results, training=other) if figure.kind == "training"]
