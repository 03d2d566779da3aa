"""Workers of a GPU: their number changes no result, and whoever starts them opens no CUDA context."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cuda
STUDY = """
name: small
backbones: ["lab:supervised"]
tasks: ["lab:greek", "lab:digits"]
heads: [kept, reprobed]
heatmap: {pairs: 1, points: 3, samples: 32}
probe: {steps: 20, warmup: 2, learning_rates: [0.01, 0.03]}
finetune: {steps: 8, batch_size: 16, warmup: 1}
limit: 128
device: cuda
"""
RUN = """
import sys, torch
from taskvec.command.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
except SystemExit as end:
    assert not end.code, end.code
assert not torch.cuda.is_initialized(), "the parent has a CUDA context"
"""


def run(tmp_path: Path, workers: int) -> dict[str, list[str]]:
    """Run the study in a process that must not open CUDA, and return the digests of every step's files by label."""
    (tmp_path / "small.yaml").write_text(STUDY)
    out, store = (tmp_path / f"{name}{workers}" for name in ("out", "store"))
    arguments = ["run", tmp_path / "small.yaml", "--out", out, "--store", store, "--workers", str(workers)]
    subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, timeout=300, env=os.environ.copy())
    records = [json.loads(path.read_text("utf-8")) for path in store.rglob("record.json")]
    return {record["about"]["label"]: list(record["files"].values()) for record in records}


def test_two_workers_on_one_gpu_give_what_one_gives_and_the_parent_has_no_context(tmp_path: Path) -> None:
    one, two = run(tmp_path, 1), run(tmp_path, 2)
    assert len(one) > 20
    assert {label for label in one.keys() | two.keys() if one.get(label) != two.get(label)} == set()


def test_gpus_by_the_driver_are_those_of_cuda() -> None:
    from taskvec.core.machine import gpus

    every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    assert [(chip.name, chip.capability) for chip in gpus()] == [
        (each.name, (each.major, each.minor)) for each in every
    ]
    for chip, each in zip(gpus(), every, strict=True):
        assert chip.memory == pytest.approx(each.total_memory, rel=0.1)
