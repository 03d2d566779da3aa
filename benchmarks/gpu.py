"""What a GPU does against the least that it could, as ratios within one run: the bars of docs/performance.md.

python benchmarks/gpu.py [--device cuda|cpu] [--skip ROW ...] [--json FILE]

Under five minutes on one GPU. Without one the same rows run on a CPU with a small encoder, to try the code; their
ratios are no measurement of a GPU. Encoders have random weights and images are noise: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from table import Row, about, save, show
from timing import clock, device_seconds, step_seconds

import taskvec as tv
from taskvec.core.compute import autocast, choose_device
from taskvec.core.files import write_json
from taskvec.data.images import normalise
from taskvec.data.tasks import Split
from taskvec.encoders import records
from taskvec.encoders.backbone import assemble
from taskvec.encoders.loaders.families import build
from taskvec.engine.store import Store
from taskvec.learning.finetuning import training_precision
from taskvec.learning.heads import random_head
from taskvec.study import artifacts
from taskvec.study.files import open_study
from taskvec.study.forecast.estimate import duration, forecast
from taskvec.study.forecast.model_cost import architecture, model_cost
from taskvec.study.forecast.rates import DEVICES
from taskvec.study.forecast.sizes import BACKWARD
from taskvec.study.plan.experiments import plan
from taskvec.study.steps import searching
from taskvec.weights import flat

CLASSES = 10
PAPER = ("paper-table1", "paper-table3", "paper-table4", "paper-figures")
STEPS = 2000
"""Steps of a training, of which some are timed."""
SCALES = [round(0.05 * place, 10) for place in range(1, 21)]


@dataclass(frozen=True)
class Sizes:
    """How much is measured on a kind of device: the encoder, images of a pass, a batch, and which steps are timed."""

    address: str
    images: int
    batches: tuple[int, ...]
    batch: int
    steps: tuple[int, int]
    tasks: int
    validation: int


GPU = Sizes("timm:vit_base_patch16_224", 4096, (128, 256, 512, 1024), 128, (30, 130), 8, 512)
CPU = Sizes("timm:test_vit", 64, (32, 64), 8, (2, 6), 2, 16)


class Bench:
    """What rows share: the device, sizes, an encoder with random weights in the precision of its passes, images."""

    def __init__(self, device: str, folder: Path) -> None:
        """Make the encoder and the images."""
        self.device, self.folder = device, folder
        self.sizes = GPU if device.startswith("cuda") else CPU
        record, view = architecture(self.sizes.address, None)
        module = build(record)
        self.backbone = assemble("bench", module, view(module), record, device)
        self.backbone.precision = "float16" if self.on_gpu else "float32"
        self.head = random_head(self.backbone.width, CLASSES, 0)
        self.task = self.noise("noise", self.sizes.images)
        self.rates: dict[str, float] = {}

    @property
    def on_gpu(self) -> bool:
        """Say whether the device is a GPU."""
        return self.device.startswith("cuda")

    def noise(self, name: str, count: int) -> tv.Task:
        """Return a task of noise."""
        draw, size = np.random.default_rng(0), self.backbone.preprocessing.size
        images = draw.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
        split = Split(images, draw.integers(0, CLASSES, count))
        return tv.Task(name, tuple(map(str, range(CLASSES))), split, split, split)

    # ------------------------------------------------------------ evaluation

    def evaluation(self) -> Iterator[Row]:
        """Yield the rate of predictions from pixels on the device, over a raw forward pass at its best batch."""
        images, head = self.backbone.resident(self.task.test.images), self.head.on(self.device)
        ours = device_seconds(lambda: head.predict(self.backbone.features(images)), self.device)
        raw = {batch: self.raw_seconds(batch) for batch in self.sizes.batches}
        best = min(raw, key=raw.__getitem__)
        note, count = f"floor: autocast float16, batch {best}" if self.on_gpu else "floor: float32", self.sizes.images
        yield Row("evaluation", count / ours, ">= 0.85", note, "images/s", 1 / raw[best])
        self.rates["forward"] = count / ours

    def raw_seconds(self, batch: int) -> float:
        """Return the seconds an image of the module alone, on ready batches."""
        module, size = self.backbone.module.eval(), self.backbone.preprocessing.size
        pixels = torch.randn(batch, 3, size, size, device=self.device)
        count = max(1, self.sizes.images // batch)

        def forward() -> None:
            with torch.no_grad(), torch.autocast("cuda", torch.float16, enabled=self.on_gpu):
                for _ in range(count):
                    module(pixels)

        return device_seconds(forward, self.device) / (count * batch)

    # ------------------------------------------------------------ training

    def training(self) -> Iterator[Row]:
        """Yield the rate of fine-tuning when it runs, over a bare loop, of views and of crops from class folders."""
        floor, note = self.training_floor()
        self.rates["trained"] = self.trained(self.task)
        yield Row("fine-tuning", self.rates["trained"], ">= 0.90", note, "images/s", floor)
        task = tv.load_task(f"folder:{self.photographs()}", self.backbone.preprocessing)
        yield Row("fine-tuning, folders", self.trained(task), ">= 0.80", "256 JPEG images, crops", "images/s", floor)

    def trained(self, task: tv.Task) -> float:
        """Return the images a second of our fine-tuning; its first steps, where it compiles, are not counted."""
        batch, steps = self.sizes.batch, self.sizes.steps
        settings = tv.Finetune(steps=STEPS, batch_size=batch, learning_rate=1e-5)
        head = random_head(self.backbone.width, len(task.classes), 0)
        tune: Callable[..., object] = lambda progress: tv.finetune(  # noqa: E731
            self.backbone, task, head, settings, progress=progress
        )
        return batch / step_seconds(tune, STEPS, *steps, self.device)

    def training_floor(self) -> tuple[float, str]:
        """Return the images a second of a bare loop, eager or compiled, whichever is faster, and which it was."""
        rates = {"eager": self.bare(compiled=False)}
        if self.on_gpu:
            try:
                rates["compiled"] = self.bare(compiled=True)
            except Exception as error:  # compilers fail in many ways
                print(f"the bare loop cannot be compiled: {error}".splitlines()[0], file=sys.stderr)
        best = max(rates, key=rates.__getitem__)
        return rates[best], f"floor: bare loop, {training_precision(self.backbone, 'auto')}, {best}"

    def bare(self, compiled: bool) -> float:
        """Return the images a second of plain PyTorch on one ready batch: no crops, no schedule, losses left there."""
        module, batch, head = copy.deepcopy(self.backbone.module).train(), self.sizes.batch, self.head.on(self.device)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, weight_decay=0.1, fused=self.on_gpu)
        split = self.task.train
        pixels = normalise(torch.from_numpy(split.images[:batch]), self.backbone.preprocessing, self.device)
        labels = torch.from_numpy(split.labels[:batch]).to(self.device)
        encoder: Any = torch.compile(module) if compiled else module
        precision = training_precision(self.backbone, "auto")

        def train(progress: Callable[[float], None]) -> None:
            for step in range(STEPS):
                with autocast(precision, self.device):
                    features = encoder(pixels)
                F.cross_entropy(head.logits(features), labels).backward()
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                progress((step + 1) / STEPS)

        return batch / step_seconds(train, STEPS, *self.sizes.steps, self.device)

    def photographs(self) -> Path:
        """Write class folders of 256 training images, 500 x 375, and a few to validate and test; return their root."""
        draw, root = np.random.default_rng(0), self.folder / "photographs"
        count = 256 if self.on_gpu else 32
        for split, images in {"train": count, "val": CLASSES, "test": CLASSES}.items():
            for place in range(images):
                path = root / split / f"c{place % CLASSES}" / f"{place}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                low = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
                low.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        return root

    def lab_training(self) -> Iterator[Row]:
        """Yield the milliseconds of a step of the lab's encoder, batch 64, whose operations are short."""
        backbone = tv.load_backbone("lab:supervised", device=self.device)
        task = tv.load_task("lab:greek", backbone.preprocessing, limit=512)
        head, settings = random_head(backbone.width, len(task.classes), 0), tv.Finetune(steps=STEPS, batch_size=64)
        tune: Callable[..., object] = lambda progress: tv.finetune(  # noqa: E731
            backbone, task, head, settings, progress=progress
        )
        took = 1000 * step_seconds(tune, STEPS, 30, 230 if self.on_gpu else 40, self.device)
        yield Row("lab training", took, unit="ms/step")

    # ------------------------------------------------------------ steps of a study

    def line_search(self) -> Iterator[Row]:
        """Yield the share of a line search in which the GPU was busy: the steps of a study, opening included."""
        inputs = self.search_inputs()
        on = {"device": self.device, "backbone_name": "bench"}
        config = searching.CurveConfig(scales=SCALES, **on)

        def search() -> None:
            for place in range(self.sizes.tasks):
                out = self.folder / f"curve{place}"
                out.mkdir(exist_ok=True)
                searching.kept_curve.function(config, inputs | {"task": inputs["task"][place]}, out, lambda _: None)

        search()
        with sampled_use() if self.on_gpu else contextlib.nullcontext([]) as samples:
            begin = clock(self.device)
            search()
            took = clock(self.device) - begin
        passes = len(SCALES) * self.sizes.tasks * self.sizes.validation
        about = f"{self.sizes.tasks} tasks, {len(SCALES)} scales"
        yield Row("line search", passes / took, note=about, unit="images/s")
        if samples:
            share, count = float(np.mean(samples)), f"{len(samples)} samples"
            yield Row("line search, GPU busy", share, ">= 0.80", count, "share")

    def search_inputs(self) -> dict[str, Any]:
        """Write what a step of a line search reads: encoder, precision, tasks, a vector of seeded noise, a head."""
        places = {name: self.folder / name for name in ("backbone", "precision", "merged", "head")}
        for place in places.values():
            place.mkdir(exist_ok=True)
        records.write_backbone(self.backbone, places["backbone"])
        write_json(places["precision"] / artifacts.PRECISION, {"precision": self.backbone.precision})
        vector = 1e-3 * torch.randn_like(self.backbone.pretrained.flat)
        flat.save(self.backbone.pretrained.with_flat(vector), places["merged"] / artifacts.DIRECTION)
        artifacts.save_head(self.head, places["head"])
        return places | {"task": [self.written(f"task{n}") for n in range(self.sizes.tasks)], "start": None}

    def written(self, name: str) -> Path:
        """Write a decoded task with validation images alone, and return its folder."""
        folder, split = self.folder / name, self.noise(name, self.sizes.validation).validation
        folder.mkdir()
        for part, count in {"train": 1, "validation": len(split), "test": 1}.items():
            np.save(folder / f"{part}.npy", split.images[:count])
            np.save(folder / f"{part}-labels.npy", split.labels[:count])
        write_json(folder / "classes.json", list(self.task.classes))
        return folder

    def opening(self) -> Iterator[Row]:
        """Yield the seconds to open the encoder from pages that are in memory."""
        folder = self.folder / "opened"
        folder.mkdir()
        records.write_backbone(self.backbone, folder)
        took = device_seconds(lambda: records.read_backbone(folder, self.device), self.device, 2)
        yield Row("opening", took, note=self.sizes.address, unit="s")

    def quickstart(self) -> Iterator[Row]:
        """Yield the seconds of the packaged study quickstart, in a process of its own; on a CPU of a trial run."""
        name = ["quickstart"] if self.on_gpu else ["quickstart", "--smoke"]
        places = ["--out", str(self.folder / "run"), "--store", str(self.folder / "store")]
        begin = time.perf_counter()
        command = [sys.executable, "-m", "taskvec", "run", *name, *places]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        yield Row(" ".join(name), time.perf_counter() - begin, "<= 90" if self.on_gpu else "", unit="s")

    # ------------------------------------------------------------ plans

    def plans(self) -> Iterator[Row]:
        """Yield the hours of Table 1 and of the whole paper on this GPU, by plan with the rates of the rows before."""
        if not (self.on_gpu and {"forward", "trained"} <= self.rates.keys()):
            return
        flops, store = model_cost(self.sizes.address, None).flops, Store(self.folder / "empty")  # type: ignore[union-attr]
        speed = {"forward": self.rates["forward"] * flops, "training": self.rates["trained"] * BACKWARD * flops}
        device = replace(DEVICES["h200"], **speed, batch=0.0, update=0.0)
        for name, studies, bar in (("paper-table1", PAPER[:1], "<= 3"), ("the whole paper", PAPER, "<= 24")):
            every = [exp for study in studies for exp in plan(open_study(study), store, estimate=True)]
            estimate = forecast(name, every, store)  # steps that studies share count once
            hours = sum(duration(item, device).total for item in estimate.ahead) / 3600
            yield Row(f"{name}, by plan", hours, bar, "with the rates above", "hours")


@contextlib.contextmanager
def sampled_use() -> Iterator[list[float]]:
    """Sample, during a block, the share of the time in which a kernel ran on the GPU, ten times a second.

    Where nvidia-smi is not there nothing is sampled.
    """
    chip, samples = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0], list[float]()
    query = ["nvidia-smi", "-i", chip, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    try:
        process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield samples
        return
    try:
        yield samples
    finally:
        process.terminate()
        text = process.communicate()[0]
        samples += [float(line) / 100 for line in text.splitlines() if line.strip().isdecimal()]


ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "evaluation": Bench.evaluation,
    "training": Bench.training,
    "lab": Bench.lab_training,
    "search": Bench.line_search,
    "opening": Bench.opening,
    "quickstart": Bench.quickstart,
    "plans": Bench.plans,
}


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--skip", nargs="*", default=[], choices=ROWS, help="rows to leave out")
    parser.add_argument("--json", type=Path, help="a file to write")
    options = parser.parse_args()
    device, rows = choose_device(options.device), list[Row]()
    if device == "cpu":
        torch.set_num_threads(1)
    machine = about(device)
    print(f"{machine['processor']}, torch {machine['torch']}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, Path(folder))
        for name, measure in ROWS.items():
            rows += show(measure(bench) if name not in options.skip else ())
    if options.json:
        save(rows, options.json, device)


if __name__ == "__main__":
    main()
