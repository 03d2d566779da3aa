"""The architectures of the paper's checkpoints at full size, each written by its own library: `pytest -m slow`.

Weights are seeded and random. What the library computes from its file and what our address gives are the same to 1e-5.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import paper_layouts as layouts
from helpers.paper_checkpoints import write_checkpoint
from safetensors import safe_open

from taskvec.data.images import normalise
from taskvec.encoders.backbone import load_backbone
from taskvec.paper.checkpoints import PAPER

pytestmark = pytest.mark.slow
WIDTHS = {"vit-b16-clip-400m": 512, "vit-b16-clip-2b": 512, "vit-l16-in21k": 1024}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("row", PAPER)
def test_features_are_the_librarys_own_at_full_size(tmp_path: Path, row: str) -> None:
    path, features = write_checkpoint(row, tmp_path)
    backbone = load_backbone(f"paper:{row}@{path}", allow_pickle=True)
    assert (backbone.width, backbone.preprocessing.size) == (WIDTHS.get(row, 768), 224)
    assert (backbone.preprocessing.mean, backbone.preprocessing.std) == (PAPER[row].mean, PAPER[row].std)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8)
    with torch.inference_mode():
        want = features(normalise(torch.from_numpy(images), backbone.preprocessing, "cpu"))
    assert torch.allclose(backbone.features(images), want, atol=1e-5)


def test_a_study_with_a_full_size_encoder_runs_from_probe_to_page(tmp_path: Path) -> None:
    path, _ = write_checkpoint("vit-b16-mae", tmp_path)
    for task in ("eurosat", "dtd"):
        write = next(iter(layouts.VARIANTS[task].values()))
        write(tmp_path / "data")
    (tmp_path / "full.yaml").write_text(
        f"backbones: ['paper:vit-b16-mae@{path}']\ntasks: ['paper:eurosat', 'paper:dtd']\ndata: {tmp_path / 'data'}\n"
        "probe: {steps: 2, warmup: 0}\nfinetune: {steps: 2, batch_size: 8, warmup: 0}\n"
        "heatmap: {pairs: 1, points: 3, samples: 4}\n"
        "methods: [{name: task_arithmetic, scales: [0, 0.5, 1]}]\n"
    )
    run = tmp_path / "run"
    command = ["run", str(tmp_path / "full.yaml"), "--out", str(run), "--store", str(tmp_path / "store")]
    done = subprocess.run([sys.executable, "-m", "taskvec", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(run / "results.csv")
    test = rows[(rows["split"] == "test") & (rows["metric"] == "accuracy")]
    for method in ("probing", "fine_tuned", "task_arithmetic"):
        assert {"eurosat", "dtd"} <= set(test[test["method"] == method]["task"])
    with (
        safe_open(path, "pt") as before,
        safe_open(run / "models" / "vit-b16-mae" / "encoder.safetensors", "pt") as after,
    ):
        assert set(after.keys()) == set(before.keys())
    assert (run / "report.html").stat().st_size > 0
