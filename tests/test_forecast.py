"""``taskvec plan``: its counts against what the steps really pass, count and write; nothing is loaded or downloaded."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter as Tally
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.reporters import Quiet
from helpers.tasks import write_folder_task
from typer.testing import CliRunner

from taskvec.command.cli import app
from taskvec.core.errors import TaskvecError
from taskvec.core.formatting import bytes_text, duration_text
from taskvec.data.sources import parse
from taskvec.encoders import backbone as backbones
from taskvec.engine import pipeline
from taskvec.engine.executors import open_executor
from taskvec.engine.pipeline import STEP_TYPES, little
from taskvec.engine.store import Store
from taskvec.engine.work import Work, total
from taskvec.lab import encoders
from taskvec.learning import finetuning
from taskvec.paper.numbers import MODELS
from taskvec.paper.tasks import TASKS
from taskvec.study.files import open_study, packaged, parse_study
from taskvec.study.forecast.estimate import Forecast, decoded_bytes, duration, forecast, report
from taskvec.study.forecast.model_cost import PAPER, Transformer, counted, model_cost
from taskvec.study.forecast.rates import DEVICES
from taskvec.study.forecast.sizes import task_size
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile

STUDY = """
name: small
backbones: [{backbone}]
tasks: ["folder:{root}/one", "folder:{root}/two"]
regimes: [{regimes}]
methods: [{{name: task_arithmetic, scales: "0:1:0.1"}}]
heatmap: {{pairs: 1, points: 3, range: 1, samples: 4}}
subsets: {{sizes: all, limit: 3, samples: 3, points: 2}}
probe: {{steps: 6, batch_size: 16, warmup: 1, learning_rates: [0.003, 0.03]}}
finetune: {{steps: 3, batch_size: 8, warmup: 1, learning_rates: [0.001, 0.003]}}
{more}
"""
CHOOSING = {
    "preprocessing",
    "choose_rate",
    "pick_head",
    "choose_learning_rate",
    "choose_option",
    "choose_scale",
    "survivors",
    "choose_precision",
    "heatmap_errors",
    "gains",
}
AT_MOST = {"reprobed_curve", "surgery_curve", "subset", "per_task_scales"}
"""Steps whose searches end early, so that the count is one from above (or a guess, for per_task_scales)."""
PACKAGED = ("paper-table1", "paper-table3", "paper-table4", "paper-figures")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_folder_task(tmp_path / "one", train=20)
    write_folder_task(tmp_path / "two", ("red", "blue"), train=30, test=6)
    return tmp_path


def study_file(root: Path, backbone: str = "lab:random", regimes: str = "aligned", more: str = "") -> StudyFile:
    text = STUDY.format(root=root, backbone=backbone, regimes=regimes, more=more)
    return StudyFile(parse_study(text, "small"), text, root)


def look(file: StudyFile, store: Path) -> Forecast:
    held = Store(store)
    return forecast(file.study.name, plan(file, held, estimate=True), held)


class Watching(Quiet):
    """Counts the images that each step passes, forward and in training."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.forward, self.trained = Tally[pipeline.Step](), Tally[pipeline.Step]()
        self.step: pipeline.Step
        encode = backbones.encode

        def counting(tally: Tally[pipeline.Step]):
            def count(module: torch.nn.Module, images: torch.Tensor, *how: Any) -> torch.Tensor:
                tally[self.step] += len(images)
                return encode(module, images, *how)

            return count

        patch.setattr(backbones, "encode", counting(self.forward))
        patch.setattr(finetuning, "encode", counting(self.trained))

    def started(self, step: pipeline.Step) -> None:
        self.step = step


@pytest.mark.parametrize("regimes", ["aligned, joint", "full", "linearised, lora"])
def test_images_bytes_and_steps_are_those_of_a_run(data: Path, regimes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"full": "scales: per-task", "linearised, lora": "negation: {forget: one, control: two}"}.get(regimes, "")
    file, store = study_file(data, regimes=regimes, more=more), Store(data / "store")
    before, watching = look(file, data / "store"), Watching(monkeypatch)
    assert not before.done
    cells = plan(file, store)
    done = pipeline.run([s for cell in cells for s in cell.steps()], store, open_executor(1), watching)
    passed, trained, kept = (
        {step.label: tally[step] for step in done} for tally in (watching.forward, watching.trained, Tally())
    )
    assert {one.step.label for one in before.planned} == set(passed)
    for one in before.planned:
        label, measured = one.step.label, passed[one.step.label]
        assert one.work.trained == trained[label], label
        if one.kind not in AT_MOST:
            assert one.work.forward == measured, label
        elif one.kind != "per_task_scales":
            assert measured <= one.work.forward, label
    for step, artifact in done.items():
        kept[step.label] = sum(p.stat().st_size for p in artifact.folder.iterdir() if p.name != "record.json")
    for one in before.planned:
        at_most = one.kind == "build_model" and one.step.config.linearised  # probing needs no expansion
        if at_most or one.kind == "decode_training":  # small images are kept as they are
            assert kept[one.step.label] <= one.work.disk
        elif max(one.work.disk, kept[one.step.label]) > 2e4:
            assert one.work.disk == pytest.approx(kept[one.step.label], rel=0.25), one.step.label
    after = look(file, data / "store")
    assert not after.ahead
    assert any(line.startswith("check") for line in report(after, [DEVICES["cpu"]], 2))


def test_what_is_done_is_found_and_a_further_task_is_not(data: Path) -> None:
    store, file = Store(data / "store"), study_file(data)
    cells = plan(file, store)
    heads = [step for cell in cells for step in cell.head.values()]
    pipeline.run(heads, store, open_executor(1), Quiet())
    names = {path: path.stat().st_mtime_ns for path in (data / "store").rglob("*")}
    found = look(file, data / "store")
    assert {one.kind for one in found.done} >= {"load_backbone", "decode_task", "features", "probe_task", "pick_head"}
    assert len(found.done) == len(pipeline.ordered(heads))
    assert names == {path: path.stat().st_mtime_ns for path in (data / "store").rglob("*")}
    write_folder_task(data / "three", ("up", "down"))
    text = file.text.replace("]\nregimes", f', "folder:{data}/three"]\nregimes')
    larger = look(StudyFile(parse_study(text, "small"), text, data), data / "store")
    assert {one.step.label.split(" (")[0] for one in larger.done} >= {"probe one", "probe two", "features of one"}
    assert "probe three (random, seed 0)" in {one.step.label for one in larger.ahead}


def test_every_kind_of_step_is_counted_or_passes_nothing() -> None:
    types = [kind for kind in STEP_TYPES.values() if kind.place.startswith("taskvec.study.steps.")]
    assert {kind.name for kind in types if kind.work is little} == CHOOSING


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("vit_base_patch16_224", 224, PAPER["vit-b16-in1k"]),
        ("vit_tiny_patch16_224", 96, Transformer(192, 12, 16)),
        ("vit_base_patch16_clip_224", 224, Transformer(768, 12, 16)),
    ],
)
def test_the_formula_agrees_with_counted_operations(name: str, size: int, shape: Transformer) -> None:
    want = counted({"family": "timm", "options": {"name": name, "size": size}})
    found = shape.cost(size)
    assert found.flops == want.flops
    assert found.parameters == pytest.approx(want.parameters, rel=1e-4)
    assert found.activations == pytest.approx(want.activations, rel=0.2)
    assert (found.width, found.size) == (want.width, want.size)


@pytest.mark.parametrize("name", ["supervised", "supervised-vit-l", "random"])
def test_the_labs_encoders_are_counted_exactly(name: str) -> None:
    want = counted({"family": "lab", "options": encoders.options(name)})
    found = model_cost(f"lab:{name}", None)
    assert found is not None
    assert (found.flops, found.parameters, found.width, found.size) == (
        want.flops,
        want.parameters,
        want.width,
        want.size,
    )


def test_any_timm_model_is_counted_without_weights() -> None:
    found = model_cost("timm:resnet18", 64)
    assert found is not None
    assert (
        found.parameters == 11_176_512 + 9_600
    )  # timm's own count without the classifier, and batch norm's statistics
    assert found.flops == pytest.approx(2 * 1.814e9 * (64 / 224) ** 2, rel=0.02)
    with pytest.raises(TaskvecError, match="did you mean"):
        look(StudyFile(parse_study("backbones: ['tim:x']\ntasks: ['lab:greek']", "s"), "", Path()), Path("nowhere"))


def paper_lines(name: str) -> list[str]:
    result = CliRunner().invoke(app, ["plan", name, "--store", "nowhere"])
    assert result.exit_code == 0, result.output
    assert not Path("nowhere").exists()
    return result.output.splitlines()


def test_the_papers_studies_are_planned_with_no_data_and_no_network(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "taskvec",
        "plan",
        "paper-table1",
        "--device",
        "h100",
        "--store",
        tmp_path / "none",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    assert rows["finetune"][0] == str(8 * (8 + 6))  # eight tasks, and six rates tried on Cars
    assert rows["finetune"][3] == f"{8 * 14 * 2000 * 128:,}"
    assert rows["decode_task"][0] == "16"  # two views of images: with a crop of 0.9 and whole
    downloads = [line for line in done.stdout.splitlines() if line.startswith("download")]
    assert [any(f"paper:{name}:" in line for line in downloads) for name in (*MODELS, *TASKS)] == [True] * 16
    assert not (tmp_path / "none").exists()


def test_a_data_set_of_the_hub_that_is_not_here_is_a_download_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    text = "name: t\nbackbones: ['lab:supervised']\ntasks: ['hf:ylecun/mnist', 'lab:greek']\nregimes: [aligned]\n"
    (tmp_path / "study.yaml").write_text(text)
    found = look(open_study(str(tmp_path / "study.yaml")), tmp_path / "store")
    assert found.downloads == ("hf:ylecun/mnist: its images (how many is not known here: counted as 10,000)",)
    (decoded,) = [one.work for one in found.ahead if one.step.label == "decode mnist (supervised)"]
    assert decoded.photographs == 10_000


@pytest.mark.parametrize("name", PACKAGED)
def test_the_time_in_a_papers_study_is_what_plan_says(name: str, tmp_path: Path) -> None:
    file = open_study(name)
    (said,) = re.findall(r"about ([\d.,]+) hours on an H100", file.text)
    planned = sum(duration(one, DEVICES["h100"]).total for one in look(file, tmp_path).ahead)
    assert float(said.replace(",", "")) == pytest.approx(planned / 3600, rel=0.1)


@pytest.mark.parametrize("name", PACKAGED)
def test_the_papers_studies_hold_the_papers_runs(name: str) -> None:
    file = open_study(name)
    study = file.study
    rows = ["vit-b16-clip-2b"] if name == "paper-table4" else list(MODELS)
    assert [(choice.address, choice.paper) for choice in study.backbones] == [(f"paper:{row}", row) for row in rows]
    assert [task.address for task in study.tasks] == [f"paper:{task}" for task in TASKS]
    regimes = {
        "paper-table1": ["aligned"],
        "paper-table3": ["full"],
        "paper-table4": ["open", "open-full"],
        "paper-figures": ["aligned", "full"],
    }
    assert [regime.name for regime in study.regimes] == regimes[name]
    assert study.probe.model_dump() == {
        "steps": 2000, "batch_size": 128, "warmup": 200, "weight_decay": 0.1, "rate_per_task": False,
        "learning_rates": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    }  # fmt: skip
    tune = study.finetune
    assert (tune.steps, tune.batch_size, tune.warmup, tune.weight_decay) == (2000, 128, 200, 0.1)
    assert tune.learning_rates == (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    assert study.methods[0].grid() == [round(0.05 * index, 10) for index in range(21)]
    assert (study.heads, study.seeds) == (("kept",), (0,))
    if name == "paper-figures":
        assert (study.heatmap.pairs, study.heatmap.points, study.heatmap.range, study.heatmap.samples) == (
            28,
            21,
            3,
            2048,
        )
        assert (study.subsets.of(8), study.subsets.limit) == (tuple(range(2, 9)), 2**8 - 8 - 1)
    for row in rows:
        (line,) = [line for line in file.text.splitlines() if f'"paper:{row}"' in line]
        said = [float(number) for number in re.findall(r"[\d.]+", line.partition("  #")[2])]
        reported = [value for regime in regimes[name] for value in MODELS[row].numbers(regime) if value == value]
        assert said == reported


def test_sizes_of_tasks_with_and_without_their_data(data: Path) -> None:
    assert task_size(parse("paper:cars"), 0) == (196, 7330, 814, 8041)
    assert task_size(parse(f"folder:{data / 'two'}"), 72) == (2, 54, 6, 12)
    assert task_size(parse("lab:greek"), 5000)[1:] == (3600, 400, 1000)


def test_a_mistake_is_told_and_another_device_needs_not_be_here(data: Path) -> None:
    (data / "s.yaml").write_text(study_file(data, more="device: cuda").text)
    wrong = CliRunner().invoke(app, ["plan", str(data / "s.yaml"), "--device", "h1000"])
    assert wrong.exit_code == 2
    assert "did you mean 'h100'" in wrong.output
    found = CliRunner().invoke(app, ["plan", str(data / "s.yaml"), "--device", "h100", "--store", str(data / "none")])
    assert found.exit_code == 0, found.output
    (data / "s.yaml").write_text(study_file(data / "elsewhere").text)
    missing = CliRunner().invoke(app, ["plan", str(data / "s.yaml")])
    assert (missing.exit_code, "no task folder at" in missing.output) == (2, True)


def test_numbers_are_written_for_people() -> None:
    assert [bytes_text(n) for n in (12, 3456, 2.5e9, 3e12)] == ["12 B", "3.5 kB", "2.5 GB", "3.0 TB"]
    assert [duration_text(n) for n in (3, 150, 7300, 3.6e6)] == ["3 s", "2 min 30 s", "2 h 01 min", "1,000 h"]
    assert total([Work(1, 2), Work(3, 4)]) == Work(4, 6)


@pytest.mark.parametrize(
    ("address", "size", "pixels"),
    [
        ("lab:supervised", None, 32),
        ("lab:supervised", 48, 48),
        ("timm:vit_small_patch14_dinov2@none.safetensors", None, 518),
        ("timm:test_vit@none.safetensors", None, 160),
        ("timm:test_vit@none.safetensors", 64, 64),
        ("paper:vit-b16-in1k", None, 224),
    ],
)
def test_decoded_images_count_at_the_size_that_the_encoder_sees(address: str, size: int | None, pixels: int) -> None:
    cost = model_cost(address, size)
    assert cost is not None
    assert cost.size == pixels


def test_decoded_images_are_not_announced_again_once_they_are_there(tmp_path: Path) -> None:
    text = "name: s\nbackbones: ['lab:random']\ntasks: ['lab:greek']\nlimit: 12\nheatmap: {pairs: 0}\n"
    file, store = StudyFile(parse_study(text, "s"), text, tmp_path).shortened(), Store(tmp_path / "store")
    file = dataclasses.replace(file, study=file.study.model_copy(update={"limit": 4}))
    steps = [step for cell in plan(file, store) for step in cell.steps()]
    assert decoded_bytes(steps, store) == pytest.approx(12 * 3 * 32**2, rel=0.01)
    wanted = [step for step in pipeline.ordered(steps) if step.type.name == "decode_task"]
    pipeline.run(wanted, store, open_executor(1), Quiet())
    assert decoded_bytes(steps, store) == 0


TRUTHS = json.loads((Path(__file__).parent / "plan_truths.json").read_text("utf-8"))
"""What finished packaged studies took on the machine that the defaults of ``cpu`` are of, by kind of step."""


@pytest.mark.parametrize("name", list(TRUTHS["studies"]))
def test_a_plan_is_within_a_factor_of_one_and_a_half_of_what_a_study_took(name: str, tmp_path: Path) -> None:
    truth, estimate = TRUTHS["studies"][name], look(open_study(name), tmp_path)
    seconds, disk = Tally[str](), Tally[str]()
    for item in estimate.planned:
        seconds[item.kind] += duration(item, DEVICES["cpu"]).total  # type: ignore[assignment]
        disk[item.kind] += item.work.disk  # type: ignore[assignment]
    assert Tally(item.kind for item in estimate.planned) == {kind: row["steps"] for kind, row in truth.items()}
    for planned, quantity in ((seconds, "seconds"), (disk, "bytes")):
        whole = sum(row[quantity] for row in truth.values())
        ratios = {kind: planned[kind] / row[quantity] for kind, row in truth.items() if row[quantity] > whole / 10}
        ratios["all"] = sum(planned.values()) / whole
        assert {kind: ratio for kind, ratio in ratios.items() if not 1 / 1.5 < ratio < 1.5} == {}, quantity


@pytest.mark.parametrize("name", [n for n in packaged() if n.startswith("lab-") and n not in TRUTHS["studies"]])
def test_decoded_images_of_a_limited_study_are_those_that_it_decodes(name: str, tmp_path: Path) -> None:
    """The announcement of a run and the plan agree, and both count the images of each task once a view."""
    file, store = open_study(name), Store(tmp_path)
    study = file.study
    estimate = look(file, tmp_path)
    planned = sum(item.work.disk for item in estimate.planned if item.kind == "decode_task")
    steps = [step for cell in plan(file, store, estimate=True) for step in cell.steps()]
    assert decoded_bytes(steps, store) == planned
    sizes = [task_size(parse(task.address), 0)[1:] for task in study.tasks]
    images = sum(min(count, study.limit or count) for counts in sizes for count in counts)
    assert planned == images * (3 * 32**2 + 8)


def test_merges_of_large_encoders_are_planned_to_stream(tmp_path: Path) -> None:
    """A merge by slices takes no more for more or larger encoders; one by whole entries goes by the largest."""
    names = ", ".join(f"'paper:{name}'" for name in list(TASKS)[:8])
    text = f"name: t\nbackbones: ['paper:vit-l14-clip-2b']\ntasks: [{names}]\nmethods: [task_arithmetic, ties, iso_c]\n"
    planned = look(StudyFile(parse_study(text + "device: cpu\n", "s"), "", tmp_path), tmp_path).planned
    held = {one.step.config.method: sum(one.memory) for one in planned if one.kind == "merge"}
    largest = 4 * 1024 * 4096
    assert max(held["task_arithmetic"], held["ties"]) <= 2**28
    assert (2 * 8 + 4) * largest <= held["iso_c"] <= 2**30
