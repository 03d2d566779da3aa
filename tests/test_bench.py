"""``taskvec bench``: what it measures it saves, and ``taskvec plan`` reads it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from taskvec.command import bench as command
from taskvec.command.cli import app
from taskvec.core.compute import processor
from taskvec.engine.work import Work
from taskvec.study.forecast import bench, rates
from taskvec.study.forecast.estimate import Planned, duration
from taskvec.study.forecast.model_cost import model_cost
from taskvec.study.forecast.rates import DEVICES, BackboneRates, Rates, find_device, save_rates, saved

STUDY = """
name: small
backbones: [{names}]
tasks: ["lab:greek"]
limit: 8
finetune: {{steps: 3, batch_size: 8, warmup: 1}}
"""
SMALL = ("lab:random", None, None)


def rates_of(processor: str, device: str, **fields: object) -> Rates:
    """Return rates of one backbone on a processor."""
    one = BackboneRates(
        address="lab:random", size=None, projection=None, flops=2e7, forward=100.0, trained=10.0,
        opening=0.5, beginning=2.0, passes="float32", training="float32",
    )  # fmt: skip
    known = {"processor": processor, "device": device, "torch": "2.0", "workers": 1, "when": "2026-01-01"}
    return Rates(**{**known, "host": rates.CORE, "backbones": [one], **fields})


def plan_lines(study: Path, store: Path, *more: str) -> str:
    result = CliRunner().invoke(app, ["plan", str(study), "--store", str(store), *more], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    return result.output


def test_what_bench_saves_plan_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHORTEST", "LONGEST"):
        monkeypatch.setattr(command, name, 0.02)
    monkeypatch.setattr(bench, "WRITTEN", 2**16)
    monkeypatch.setattr(bench, "DRAWN", 4)
    monkeypatch.setattr(bench, "HEAD_STEPS", (2, 4))
    (tmp_path / "one.yaml").write_text(STUDY.format(names='"lab:random"'))
    (tmp_path / "two.yaml").write_text(STUDY.format(names='"lab:random", "lab:supervised-vit-l"'))
    store = tmp_path / "store"
    arguments = ["bench", str(tmp_path / "one.yaml"), "--save", "--device", "cpu", "--workers", "1"]
    done = CliRunner().invoke(app, [*arguments, "--store", str(store)], env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    assert "[1/1] lab:random on " in done.output
    (kept,) = saved(store)
    (measured,) = kept.backbones
    assert (kept.processor, kept.device, measured.key) == (processor("cpu"), "cpu", SMALL)
    assert min(measured.forward, measured.trained, measured.opening, kept.host.head_step, kept.host.drawing) > 0
    assert list((store / "tmp").iterdir()) == []
    said = plan_lines(tmp_path / "two.yaml", store, "--device", "cpu")
    assert f"measured on {processor('cpu')}, {kept.when}" in said
    assert f"lab:random: {measured.forward:,.0f} images/s forward" in said
    assert "in training (measured)" in said
    assert "in training (by FLOPs from lab:random)" in said
    assert "\nhere " in plan_lines(tmp_path / "one.yaml", store, "--device", "here")


def test_a_machine_that_was_not_measured_says_so(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(STUDY.format(names='"lab:random"'))
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "one.yaml"), "--device", "here", "--store", str(tmp_path)])
    assert (result.exit_code, "run taskvec bench --save" in result.output) == (2, True)


def test_saved_rates_of_a_model_of_gpu_stand_for_its_default(tmp_path: Path) -> None:
    save_rates(rates_of("NVIDIA H100 80GB HBM3", "cuda"), tmp_path)
    save_rates(rates_of("NVIDIA A100-SXM4-80GB", "cuda", torch="2.1"), tmp_path)
    assert find_device("h100", tmp_path).measured == rates_of("NVIDIA H100 80GB HBM3", "cuda")
    assert find_device("a100", tmp_path).measured is not None
    assert find_device("h200", tmp_path).measured is None
    assert find_device("cpu", tmp_path).measured is None


def test_what_was_measured_of_the_cores_is_planned_with(tmp_path: Path) -> None:
    slow = rates.CORE.model_copy(update={"head_step": 1.0, "photograph": 16.0, "disk": 10.0})
    save_rates(rates_of("NVIDIA H100 80GB HBM3", "cuda", host=slow), tmp_path)
    item = Planned(None, Work(head_steps=3, photographs=2, disk=40), (0, 0), None, None, 0.0, False)  # type: ignore[arg-type]
    took = {name: duration(item, find_device(name, tmp_path)).host for name in ("h100", "h200")}
    assert took["h100"] == pytest.approx(3 + 2 * 16 / 16 + 4, abs=0.01)
    assert took["h200"] < 0.01


def test_saving_keeps_what_was_measured_of_other_backbones(tmp_path: Path) -> None:
    first = rates_of("a CPU", "cpu")
    other = [first.backbones[0].model_copy(update={"address": "lab:mae"})]
    save_rates(first, tmp_path)
    path = save_rates(first.model_copy(update={"backbones": other, "when": "2026-02-02"}), tmp_path)
    (kept,) = saved(tmp_path)
    assert [each.address for each in kept.backbones] == ["lab:random", "lab:mae"]
    assert kept.when == "2026-02-02"
    path.write_text(json.dumps(kept.model_dump(mode="json") | {"workers": "two"}))
    result = CliRunner().invoke(app, ["plan", "quickstart", "--device", "cpu", "--store", str(tmp_path)])
    assert "saved rates are left out" in result.output
    assert result.exit_code == 0


def test_a_pace_is_what_was_measured_or_goes_by_flops() -> None:
    cost = model_cost("lab:random", None)
    assert cost is not None
    device = dataclasses.replace(DEVICES["cpu"], measured=rates_of("a CPU", "cpu"))
    work = Work(forward=200, forward_flops=200 * 2e7, trained=30, training_flops=30 * 3 * 2e7, updates=3)
    item = Planned(None, work, (0, 0), None, (SMALL, cost), 0.0, True)  # type: ignore[arg-type]
    took = duration(item, device)
    assert (took.evaluation, took.training, took.opening) == pytest.approx((2.0, 3.0 + 2.0, 0.5))
    larger = dataclasses.replace(cost, flops=4e7)
    pace = device.pace(("timm:other", None, None), larger)
    assert pace.forward / larger.flops == pytest.approx(50)
    assert pace.source == "by FLOPs from lab:random"


def test_defaults_of_gpus_are_the_measured_h200_by_data_sheets(tmp_path: Path) -> None:
    base = model_cost("paper:vit-b16-in1k", None)
    assert base is not None
    seen = {name: DEVICES[name].forward / base.flops for name in ("h200", "h100", "a100")}
    assert seen["h200"] == pytest.approx(0.85 * 8969, rel=0.01)
    assert seen["h200"] > seen["h100"] > seen["a100"] > 0.3 * seen["h200"]
    assert DEVICES["h200"].training / base.flops / 3 == pytest.approx(0.9 * 2610, rel=0.01)
    small = Work(forward=256, trained=64, updates=1)
    item = Planned(None, small, (0, 0), None, (SMALL, base), 0.0, False)  # type: ignore[arg-type]
    took = duration(item, DEVICES["h100"])
    assert (took.evaluation, took.training) == pytest.approx(rates.LAUNCHES)  # launches alone
