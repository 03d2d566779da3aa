"""Devices of workers: GPUs are listed by their driver, each worker sees one, and the parent opens no CUDA context."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import noisy_steps
from helpers.noisy_steps import Telling
from helpers.reporters import Quiet

from taskvec.core import machine
from taskvec.core.compute import processor, resolve_precision, study_device
from taskvec.core.errors import TaskvecError
from taskvec.core.machine import SHARING, VISIBLE, Gpu, gpu, gpus, gpus_of, workers_of_gpu
from taskvec.engine import pipeline
from taskvec.engine.executors import Inline, Processes, environment, explained, open_executor
from taskvec.engine.pipeline import Step
from taskvec.engine.store import Store
from taskvec.study.files import open_study
from taskvec.study.forecast import workers as default
from taskvec.study.forecast.workers import cpu_workers, gpu_workers
from taskvec.study.plan.experiments import plan

ROWS = """1, GPU-bbbb-2, NVIDIA H100 80GB HBM3, 81559, 9.0, Disabled
0, GPU-aaaa-1, Tesla V100-SXM2-16GB, 16384, 7.0, [N/A]
"""
PATHS = f"{Path(__file__).parent}:{Path(__file__).parent.parent / 'src'}"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that puts a nvidia-smi on the path which prints some rows; CUDA itself must not be touched."""
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for name in ("_lazy_init", "is_available", "get_device_name", "get_device_capability", "device_count"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: pytest.fail("CUDA was touched"))

    def write(rows: str) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        script = tmp_path / "bin" / "nvidia-smi"
        script.write_text(f"#!/bin/sh\nprintf '%s' '{rows}'\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
        machine._gpus.cache_clear()

    yield write
    machine._gpus.cache_clear()


def test_gpus_are_those_that_the_driver_lists_in_its_order(driver) -> None:
    driver(ROWS)
    assert gpus() == (
        Gpu("GPU-aaaa-1", "Tesla V100-SXM2-16GB", 16384 * 2**20, (7, 0)),
        Gpu("GPU-bbbb-2", "NVIDIA H100 80GB HBM3", 81559 * 2**20, (9, 0)),
    )
    assert study_device() == "cuda"
    assert [processor(device) for device in ("cuda", "cuda:1")] == [chip.name for chip in gpus()]
    assert [resolve_precision("auto", device) for device in ("cuda", "cuda:1")] == ["float32", "bfloat16"]
    assert gpus_of("cuda") == gpus()
    assert gpus_of("cuda:1") == gpus()[1:]
    assert gpus_of("cpu") == ()
    with pytest.raises(TaskvecError, match=r"device 'cuda:2' cannot be used: the GPUs here are Tesla V100.*, NVIDIA"):
        study_device("cuda:2")


@pytest.mark.parametrize(
    ("chosen", "shown"),
    [
        ("1", ["1"]),
        ("1,0", ["1", "0"]),
        ("GPU-bbbb", ["GPU-bbbb"]),
        (" 0 , GPU-bbbb-2", ["0", "GPU-bbbb-2"]),
        ("", []),
        ("-1", []),
        ("1,7,0", ["1"]),
        ("1,GPU-b", []),
        ("GPU-", []),
    ],
)
def test_a_list_of_the_users_is_divided(driver, monkeypatch: pytest.MonkeyPatch, chosen: str, shown: list[str]) -> None:
    """As CUDA reads it: an entry that is none ends the list, a GPU twice empties it."""
    driver(ROWS)
    monkeypatch.setenv(VISIBLE, chosen)
    assert [chip.id for chip in gpus()] == shown
    assert study_device() == ("cuda" if shown else "cpu")
    names = ["NVIDIA H100 80GB HBM3" if "1" in name or "b" in name else "Tesla V100-SXM2-16GB" for name in shown]
    assert [chip.name for chip in gpus()] == names


def child(rows: object, patch: pytest.MonkeyPatch) -> None:
    """Let a child process answer what CUDA would."""
    answer = machine.answer
    patch.setattr(machine, "NODES", ["/"])
    patch.setattr(machine, "answer", lambda line: json.dumps(rows) if line[1:2] == ["-P"] else answer(line))


def test_divided_gpus_and_silent_drivers_are_asked_for_by_a_child(driver, monkeypatch: pytest.MonkeyPatch) -> None:
    child([["NVIDIA H100 MIG 1g.10gb", 10e9, [9, 0]]], monkeypatch)
    small = Gpu("0", "NVIDIA H100 MIG 1g.10gb", 10e9, (9, 0))
    for rows in ("0, GPU-a, NVIDIA H100, 81559, 9.0, Enabled\n", "0, GPU-a, Old, 4096, [N/A], [N/A]\n", "Failed\n"):
        driver(rows)
        assert gpus() == (small,)
    driver(ROWS)
    monkeypatch.setenv(VISIBLE, "MIG-1234")
    assert [chip.id for chip in gpus()] == ["MIG-1234"]


def test_no_gpu_is_the_cpu(driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver("")
    assert (gpus(), gpu("cuda"), study_device()) == ((), None, "cpu")
    with pytest.raises(TaskvecError, match="device 'cuda' cannot be used: the GPUs here are none"):
        study_device("cuda")
    assert isinstance(open_executor(1), Inline)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    driver(ROWS)
    assert study_device() == "cpu"
    with pytest.raises(TaskvecError, match="built without CUDA"):
        study_device("cuda:0")


def test_each_worker_sees_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PATHS)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    executor = open_executor(2, ["GPU-a", "1"])
    steps = [Step(name, noisy_steps.surroundings, Telling(value=name)) for name in ("one", "two")]
    done = pipeline.run(steps, Store(tmp_path), executor, Quiet())
    told = [done[step].json("environment.json") for step in steps]
    assert told == [["GPU-a", ":4096:8", "1"], ["1", ":4096:8", "1"]]


def test_one_worker_of_a_gpu_is_a_process_and_settings_of_the_users_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_executor(1, ["0"]), Processes)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert environment("GPU-a", 3)["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert environment("GPU-a", 3)[SHARING] == "3"
    assert SHARING not in environment(None, 3)
    assert workers_of_gpu() == 1


def test_lack_of_memory_on_a_shared_gpu_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.cuda.OutOfMemoryError("CUDA out of memory.")
    assert "workers" not in str(explained("probe", error))
    monkeypatch.setenv(SHARING, "4")
    monkeypatch.setenv(VISIBLE, "GPU-bbbb-2")
    told = explained("probe", error)
    assert isinstance(told, TaskvecError)
    assert told.problem == "no memory left in step 'probe': 4 workers share its GPU (GPU-bbbb-2)"
    assert "--workers" in told.fix


def test_small_encoders_share_a_gpu_by_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "cores", lambda: 16)
    large, small = Gpu("0", "one", 80e9, (9, 0)), Gpu("0", "one", 6e9, (9, 0))

    def steps(name: str) -> list[Step]:
        return [step for cell in plan(open_study(name), Store(tmp_path), estimate=True) for step in cell.steps()]

    lab, paper = steps("quickstart"), steps("paper-table4")
    assert gpu_workers(lab, [large]) == default.MOST
    assert gpu_workers(lab, [large] * 4) == 16  # cores
    assert gpu_workers(lab, [large, small]) == 2 * 2  # the memory of the smallest
    assert gpu_workers(paper, [large] * 4) == 4
    assert cpu_workers(4) == 4
    assert cpu_workers(64) == 1
