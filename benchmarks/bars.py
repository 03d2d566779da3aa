"""The numbers to hold, as ratios within one run on one thread: what a step costs against the least it could.

python benchmarks/bars.py [BACKBONE --size PIXELS]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import timm
import torch
import torch.nn.functional as F
from table import Row, show
from timing import seconds

import taskvec as tv
from taskvec.core.training import index_batches
from taskvec.data.images import Preprocessing, normalise
from taskvec.data.tasks import Split
from taskvec.deploy.model import MultiTaskModel
from taskvec.encoders.backbone import assemble
from taskvec.evaluation import scale_search as search
from taskvec.evaluation.disentanglement import disentanglement
from taskvec.learning import heads
from taskvec.weights import vectors


def forward(backbone: tv.Backbone, images: np.ndarray) -> None:
    """Make the bare forward passes: the module on ready float batches."""
    with torch.inference_mode():
        for start in range(0, len(images), 256):
            batch = torch.from_numpy(np.array(images[start : start + 256]))
            backbone.module(normalise(batch, backbone.preprocessing, "cpu"))


def bare_loop(backbone: tv.Backbone, split: Split, head: tv.Head, steps: int) -> None:
    """Fine-tune in plain PyTorch, without augmentation, schedule or progress."""
    import copy

    module = copy.deepcopy(backbone.module).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, weight_decay=0.1)
    batches = index_batches(len(split), 64, 0)
    for _ in range(steps):
        indices = next(batches)
        inputs = normalise(torch.from_numpy(split.images[indices.numpy()]), backbone.preprocessing, "cpu")
        loss = F.cross_entropy(head.logits(module(inputs)), torch.from_numpy(split.labels)[indices])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()


def ratios(backbone: tv.Backbone, task: tv.Task) -> Iterator[Row]:
    """Yield what a step costs over the least that it could."""
    images = task.validation.images
    raw = seconds(lambda: forward(backbone, images)) / len(images)
    features, labels = heads.features_of(backbone, task.validation)
    probing = seconds(
        lambda: heads.fit(features[None], labels, len(task.classes), (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3), tv.Probe(), 0),
        1,
    )
    for count in (17_010, 55_000):
        name = f"probing at six rates, with one forward pass over {count} images, over that pass"
        yield Row(name, 1 + probing / (raw * count), "<= 1.3", "ViT-S and up")
    head = heads.fit(features[None], labels, len(task.classes), [0.01], tv.Probe(steps=50, warmup=5), 0)[0]
    tau = backbone.pretrained.with_flat(torch.randn_like(backbone.pretrained.flat) * 1e-3)
    scales = [round(0.05 * i, 10) for i in range(1, 21)]
    curve = seconds(lambda: search.kept_curve(backbone, tau, task, head, scales), 2)
    yield Row("line search over 20 scales, over its forward passes", curve / (20 * len(images) * raw), "<= 1.10")
    grid = [-3.0, -1.5, 0.0, 1.5, 3.0]
    half = len(images) // 2
    pair = images[:half], images[half : 2 * half]
    heat = seconds(lambda: disentanglement(backbone, (tau, tau), (head, head), pair, grid), 1)
    unavoidable = (2 * 20 + 2 * 5) * half * raw
    yield Row("heatmap of one pair, over merged and single passes", heat / unavoidable, "<= 1.10")
    backbone.use(backbone.pretrained)
    settings = tv.Finetune(steps=6, batch_size=64, warmup=1)
    ours = seconds(lambda: tv.finetune(backbone, task, head, settings, precision="float32"), 2)
    bare = seconds(lambda: bare_loop(backbone, task.train, head, 6), 2)
    yield Row("bare loop over ours, fine-tuning in float32", bare / ours, ">= 0.95")
    model = MultiTaskModel(backbone, {str(i): head for i in range(8)}, {}, {})
    eight = seconds(lambda: model.logits(backbone.features(images)))
    single = seconds(lambda: head.logits(backbone.features(images)))
    yield Row("eight tasks' answers, over one task's", eight / single, "<= 1.05")


def moving(threads: int) -> float:
    """Return the wall seconds to move a ViT-B/16 to another lambda."""
    torch.set_num_threads(threads)
    module = timm.create_model("vit_base_patch16_224", num_classes=0)
    backbone = assemble("vit-b", module, Preprocessing(224), {}, "cpu")
    tau = backbone.pretrained.with_flat(torch.ones_like(backbone.pretrained.flat))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        vectors.move(backbone.bound, backbone.pretrained, [tau], [0.3])
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backbone", nargs="?", default="lab:supervised")
    parser.add_argument("--size", type=int)
    parser.add_argument("--limit", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    backbone = tv.load_backbone(options.backbone, size=options.size, device="cpu")
    task = tv.load_task("lab:signs", backbone.preprocessing, limit=options.limit)
    show(ratios(backbone, task))
    show([Row("moving a ViT-B/16 to another lambda, seconds on 2 threads", moving(2), "<= 0.05")])


if __name__ == "__main__":
    main()
