"""The choice of the precision of passes: close predictions are taken, planted faults are not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.encoders import Planted

from taskvec.command.runs import evaluation_precisions
from taskvec.core.compute import PassPrecision
from taskvec.core.errors import TaskvecError
from taskvec.data.images import Preprocessing
from taskvec.data.tasks import Task
from taskvec.encoders.backbone import Backbone, assemble, linearised
from taskvec.engine import pipeline
from taskvec.engine.pipeline import Step
from taskvec.engine.store import Store
from taskvec.evaluation import precision
from taskvec.evaluation.precision import (
    Agreement,
    PrecisionChoice,
    choose_precision,
    class_mean_head,
    decide,
    random_direction,
)
from taskvec.learning.heads import features_of
from taskvec.report import page
from taskvec.study.files import parse_study
from taskvec.study.plan.experiments import plan
from taskvec.study.plan.planner import check_precision
from taskvec.study.schema import StudyFile
from taskvec.study.steps.loading import PrecisionConfig, compare_precisions

SCALES = (0.0, 0.05, 0.5)


def agreements(name: PassPrecision, *rows: tuple[float, int]) -> list[Agreement]:
    return [Agreement(name, scale, *row) for scale, row in zip(SCALES, rows, strict=False)]


CLOSE = ((0.0, 0), (0.005, 0), (0.004, 0))


@pytest.mark.parametrize(
    ("rows", "wanted", "chosen"),
    [
        (agreements("float16", *CLOSE), "auto", "float16"),
        ([*agreements("float16", *CLOSE[:2], (0.006, 0)), *agreements("tf32", *CLOSE)], "auto", "tf32"),
        ([*agreements("float16", (0.0, 1)), *agreements("tf32", *CLOSE)], "auto", "tf32"),
        ([*agreements("float16", (0.5, 0)), *agreements("tf32", (0.0, 3))], "auto", "float32"),
        (agreements("float16", (0.5, 9)), "float16", "float16"),
        (agreements("tf32", (0.5, 0)), "tf32", "tf32"),
        ([], "auto", "float32"),
        ([], "float32", "float32"),
    ],
)
def test_the_fastest_close_precision_is_taken(rows: list[Agreement], wanted: str, chosen: str) -> None:
    assert decide(wanted, rows) == chosen


def planted(factor: float, offset: float = 0.0) -> Backbone:
    torch.manual_seed(0)
    return assemble("planted", Planted(factor, offset), Preprocessing(size=8), {"family": "tiny", "options": {}}, "cpu")


def test_a_sound_encoder_passes_in_float16(backbone: Backbone, tasks: list[Task]) -> None:
    choice = choose_precision(backbone, tasks, SCALES)
    assert choice.precision == "float16"
    assert choice.explanation() == ""
    assert [row.scale for row in choice.agreements] == list(SCALES)
    assert choice.images == sum(len(task.validation) for task in tasks)


def test_an_overflow_falls_back(tasks: list[Task]) -> None:
    choice = choose_precision(planted(1e6), tasks, SCALES)
    assert choice.precision == "tf32"  # which a CPU computes as float32
    assert choice.agreements[0].nans > 0
    assert "are no class" in choice.explanation()
    assert {row.precision for row in choice.agreements} == {"float16", "tf32"}


def test_a_disagreement_falls_back(tasks: list[Task]) -> None:
    choice = choose_precision(planted(1.0, 30_000.0), tasks, SCALES)  # float16 has steps of 16 there
    assert choice.precision == "tf32"
    assert choice.agreements[0].differing > 0.1
    assert not choice.agreements[0].nans
    assert "predictions differ" in choice.explanation()


def test_one_that_is_asked_for_is_taken_and_compared(tasks: list[Task]) -> None:
    backbone = planted(1e6)
    choice = choose_precision(backbone, tasks, SCALES, "float16")
    assert choice.precision == choice.wanted == "float16"
    assert choice.explanation().startswith("passes are computed in float16: in float16, at scale")
    assert backbone.precision == "float32"
    assert torch.equal(backbone.bound.flat, backbone.pretrained.flat)


def test_a_class_mean_head_finds_the_nearest_mean(backbone: Backbone, tasks: list[Task]) -> None:
    features, labels = features_of(backbone, tasks[0].train)
    means = torch.stack([features[labels == label].double().mean(0) for label in labels.unique()])
    nearest = torch.cdist(features.double(), means).argmin(1)
    agreeing = class_mean_head(backbone, tasks[0]).predict(features) == nearest
    assert agreeing.double().mean() > 0.98  # ties in float32 may break


def test_the_direction_has_the_length_of_task_vectors(backbone: Backbone) -> None:
    direction = random_direction(backbone.pretrained, seed=1)
    length = direction.flat.norm() / backbone.pretrained.flat.norm()
    assert abs(float(length) - precision.LENGTH) < 0.03
    assert torch.equal(direction.flat, random_direction(backbone.pretrained, seed=1).flat)


def test_a_linearised_encoder_stays_float32(backbone: Backbone) -> None:
    backbone.precision = "float16"
    assert backbone.pass_precision == "float16"
    assert linearised(backbone).pass_precision == "float32"


@pytest.mark.parametrize("setting", ["tf32", "float16"])
def test_a_cpu_has_no_other_precision(setting: str) -> None:
    check_precision("auto", "cpu")
    check_precision(setting, "cuda:1")
    with pytest.raises(TaskvecError, match=f"evaluation_precision '{setting}' needs a CUDA GPU, .* runs on 'cpu'"):
        check_precision(setting, "cpu")


def test_the_record_holds_both_switches_and_every_comparison(backbone: Backbone, tasks: list[Task]) -> None:
    record = json.loads(json.dumps(choose_precision(backbone, tasks, SCALES).to_json()))
    assert record["tf32"] == {"matmul": False, "convolutions": False}
    assert [row["scale"] for row in record["agreements"]] == list(SCALES)
    assert set(record["agreements"][0]) == {"precision", "scale", "differing", "nans"}


STUDY = """
name: small
backbones: ["lab:random"]
tasks: ["lab:greek", "lab:digits"]
methods: [{name: task_arithmetic, scales: "0:1:0.05"}, {name: ties, scales: [0, 2]}]
limit: 12
"""


def steps_of(folder: Path, more: str) -> list[Step]:
    text = STUDY + more
    experiments = plan(StudyFile(parse_study(text, "small"), text, folder), Store(folder), estimate=True)
    return pipeline.ordered(step for exp in experiments for step in exp.steps())


def test_on_a_gpu_every_step_that_looks_reads_the_choice(tmp_path: Path) -> None:
    steps = steps_of(tmp_path, "device: cuda")
    (choice,) = (step for step in steps if step.type.name == "choose_precision")
    assert choice.inputs["comparison"].config.wanted == "auto"
    assert choice.inputs["comparison"].config.scales == (0.0, 0.05, 2.0)
    looking = [step for step in steps if "precision" in step.type.reads]
    assert {"features", "kept_curve", "test_task", "build_model"} <= {step.type.name for step in looking}
    assert all(step.inputs["precision"] is choice for step in looking)


@pytest.mark.parametrize("more", ["device: cpu", "device: cuda\nevaluation_precision: float32"])
def test_where_all_is_float32_nothing_is_chosen(tmp_path: Path, more: str) -> None:
    steps = steps_of(tmp_path, more)
    assert "choose_precision" not in {step.type.name for step in steps}
    assert not any(step.inputs.get("precision") for step in steps)


def test_a_study_on_a_cpu_that_wants_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskvecError, match="evaluation_precision 'float16' needs a CUDA GPU"):
        steps_of(tmp_path, "device: cpu\nevaluation_precision: float16")


def test_the_lock_says_in_what_numbers_a_gpu_computed() -> None:
    record = PrecisionChoice("tf32", "auto", 9, ()).to_json()
    config = PrecisionConfig(wanted="auto", scales=SCALES, device="cuda", backbone_name="net")
    done: Any = {Step("compare", compare_precisions, config, {}): SimpleNamespace(json=lambda name: record)}
    on, off = ({"matmul": switch, "convolutions": switch} for switch in (True, False))
    every: Any = [SimpleNamespace(backbone=name) for name in ("net", "net", "plain")]
    lock = evaluation_precisions(every, done, "cuda:1")
    assert lock["evaluation_precision"] == {"net": "tf32", "plain": "float32"}
    assert lock["tf32"] == {"evaluation": {"net": on, "plain": off}, "else": off}
    assert page._facts(lock) == {"evaluation_precision": "net tf32, plain float32"}
    assert evaluation_precisions(every, done, "cpu") == {}
