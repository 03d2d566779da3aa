"""Batch norm estimated anew after a merge: a slow reference in float64, laws, and a study with and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.reporters import Quiet
from helpers.tasks import colour_task, write_folder_task
from helpers.timm_files import timm_file

from taskvec.command import runs
from taskvec.core.errors import TaskvecError
from taskvec.data.tasks import Task
from taskvec.deploy.model import load
from taskvec.encoders import batch_norm
from taskvec.encoders.backbone import Backbone, load_backbone
from taskvec.engine.store import Store
from taskvec.study.files import parse_study
from taskvec.study.schema import StudyFile


def slow_statistics(backbone: Backbone, images: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Follow the tiny encoder's first two layers in float64: the mean over batches of their means and variances."""
    weight = backbone.module.first.weight.detach().numpy().astype(np.float64)
    bias = backbone.module.first.bias.detach().numpy().astype(np.float64)
    pixels = (images.astype(np.float64) / 255 - 0.5) / 0.5
    means, variances = [], []
    for start in range(0, len(images) - batch + 1, batch):
        blocks = pixels[start : start + batch].reshape(batch, 3, 2, 4, 2, 4).transpose(0, 2, 4, 1, 3, 5)
        hidden = blocks.reshape(-1, 48) @ weight.reshape(6, 48).T + bias
        means.append(hidden.mean(0))
        variances.append(hidden.var(0, ddof=1))
    return np.mean(means, 0), np.mean(variances, 0)


@pytest.mark.parametrize(("count", "batch"), [(24, 8), (27, 8), (5, 8)])
def test_statistics_equal_a_slow_float64_reference(
    backbone: Backbone, tasks: list[Task], count: int, batch: int
) -> None:
    weights = backbone.pretrained.with_flat(backbone.pretrained.flat * 1.3 + 0.01)
    images = np.asarray(tasks[0].train.images[:count])
    found = batch_norm.reestimate(backbone, weights, images, batch)
    backbone.use(weights)
    mean, variance = slow_statistics(backbone, images, min(batch, count))
    assert np.allclose(found["norm.running_mean"], mean, rtol=1e-5, atol=1e-6)
    assert np.allclose(found["norm.running_var"], variance, rtol=1e-5)


def test_only_statistics_change_and_the_backbone_is_as_before(backbone: Backbone, tasks: list[Task]) -> None:
    momentum = backbone.module.norm.momentum
    found = batch_norm.reestimate(backbone, backbone.pretrained, tasks[0].train.images)
    changed = {e.name for e in found.layout if not torch.equal(found[e.name], backbone.pretrained[e.name])}
    assert changed == {"norm.running_mean", "norm.running_var"}
    assert torch.equal(backbone.bound.flat, backbone.pretrained.flat)
    assert int(backbone.module.norm.num_batches_tracked) == 0
    assert backbone.module.norm.momentum == momentum and not backbone.module.norm.training
    again = batch_norm.with_statistics(backbone.pretrained, batch_norm.statistics(found))
    assert torch.equal(again.flat, found.flat)
    assert torch.equal(found.flat, batch_norm.reestimate(backbone, found, tasks[0].train.images).flat)


def test_a_deep_network_is_estimated_layer_on_layer(tmp_path: Path) -> None:
    path, model = timm_file(tmp_path, "resnet10t")
    backbone = load_backbone(f"timm:resnet10t@{path}", size=32)
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    found = batch_norm.reestimate(backbone, backbone.pretrained, images, batch_size=4)
    model.reset_classifier(0)
    pixels = (torch.from_numpy(images) / 255 - torch.tensor(backbone.preprocessing.mean).view(3, 1, 1)) / torch.tensor(
        backbone.preprocessing.std
    ).view(3, 1, 1)
    torch.optim.swa_utils.update_bn([pixels[:4], pixels[4:]], model)  # torch's own, which needs a whole module
    for name, value in model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5), name


def test_images_are_shared_evenly_and_mixed(tasks: list[Task]) -> None:
    images = batch_norm.mixed(tasks, 40)
    assert images.shape == (40, 3, 8, 8)
    assert np.array_equal(images, batch_norm.mixed(tasks, 40))
    warm = {image.tobytes() for image in tasks[0].train.images}
    from_first = [image.tobytes() in warm for image in images]
    assert sum(from_first) == 20 and 0 < sum(from_first[:20]) < 20
    assert len(batch_norm.mixed([*tasks, colour_task("few", 2, 3, (6, 2, 2))], 40)) == 18


def test_without_batch_norm_it_is_refused() -> None:
    with pytest.raises(TaskvecError, match="'random' has no batch norm"):
        batch_norm.check(load_backbone("lab:random"))


STUDY = """
name: cnn
backbones: [{address: "timm:test_resnet@test_resnet.safetensors", size: 32, batch_norm: reestimated}]
tasks: ["folder:one", "folder:two"]
methods: [{name: task_arithmetic, scales: "0:1:0.5"}, {name: ties, scales: [0.0, 1.0], config: {keep: [0.3, 0.9]}}]
heads: [kept]
heatmap: {pairs: 0}
probe: {steps: 5, batch_size: 8, warmup: 0, learning_rates: [0.01]}
finetune: {steps: 2, batch_size: 8, warmup: 0, learning_rate: 0.001}
"""


def test_a_study_measures_merges_with_and_without(tmp_path: Path) -> None:
    timm_file(tmp_path, "test_resnet")
    write_folder_task(tmp_path / "one")
    write_folder_task(tmp_path / "two", ("red", "blue"), train=15, test=6)
    file, out = StudyFile(parse_study(STUDY, "cnn"), STUDY, tmp_path), tmp_path / "out"
    runs.run_study(file, out, Store(tmp_path / "store"), 1, Quiet(), "taskvec run cnn")
    rows = pd.read_csv(out / "results.csv", keep_default_na=False)
    for statistics in ("", "reestimated"):
        own = rows[(rows.method == "task_arithmetic") & (rows.statistics == statistics)]
        own = own[(own.metric == "accuracy") & (own.task == "")]
        assert sorted(own[own.split == "validation"].scale) == [0, 0.5, 1]
        assert len(own[own.split == "test"]) == 1
    tested = rows[(rows.split == "test") & (rows.metric == "accuracy") & (rows.task == "")]
    tested = tested.set_index(["method", "statistics"]).config
    assert tested["ties", "reestimated"] == tested["ties", ""] in ('{"keep":0.3}', '{"keep":0.9}')
    assert set(rows[(rows.method == "ties") & (rows.statistics == "reestimated")].config) == {tested["ties", ""]}
    assert "batch norm re-estimated" in (out / "tables.md").read_text("utf-8")
    assert load(out).predict([next((tmp_path / "one" / "test" / "ant").iterdir())])


def test_it_is_refused_without_kept_heads() -> None:
    with pytest.raises(TaskvecError, match="re-estimated batch norm is measured with kept heads; add kept"):
        parse_study(STUDY.replace("heads: [kept]", "heads: [reprobed]"), "cnn")
