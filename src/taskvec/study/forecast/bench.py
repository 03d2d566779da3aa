"""How fast this machine is, measured in a worker process as a study's steps run: passes, training, opening, heads, CPU.

No weights are needed: encoders have random ones, and images are noise.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image

from taskvec.core.compute import choose_device
from taskvec.core.files import file_digest, read_json, write_json
from taskvec.core.progress import Progress
from taskvec.core.settings import Finetune, Probe
from taskvec.data.decoding import Whole
from taskvec.data.images import Preprocessing, opened, resize_and_crop
from taskvec.data.tasks import Split, Task
from taskvec.encoders import records
from taskvec.encoders.backbone import Backbone, assemble
from taskvec.encoders.loaders.families import build
from taskvec.engine.executors import open_executor
from taskvec.engine.pipeline import Config, Executor, Inputs, Job, Step, step_type
from taskvec.engine.store import Store
from taskvec.engine.work import LITTLE
from taskvec.lab.drawing import worlds
from taskvec.learning.finetuning import finetune_tasks, training_precision
from taskvec.learning.heads import probe, random_head
from taskvec.study.forecast.model_cost import architecture

RATES = "rates.json"
CLASSES = 10
IMAGES = 64
"""Different images of noise; larger splits repeat them."""
MOST = 2048
"""Images of one measured pass at most."""
UPDATES = 1024
"""Steps of one measured training at most."""
HEAD_STEPS = 20, 200
"""Steps of fitting heads before the clock runs, and while it runs."""
PHOTOGRAPHS = 64
"""Pixels from which an encoder is taken to be trained on crops of photographs."""
DRAWN = 256
"""Images that are drawn to measure it."""
PHOTOGRAPH = (500, 375)
"""Pixels of a photograph, of ImageNet's usual size."""
WRITTEN = 2**26
"""Bytes that are written and hashed to measure a disk."""
FAST = {"cuda": "float16"}
"""The precision of passes by device, where it is not float32: what evaluation uses where its check allows."""


class BenchConfig(Config):
    """What is measured: a backbone, on which device, with batches of how many images, about how long each time."""

    address: str
    size: int | None = None
    projection: bool | None = None
    device: str = "cpu"
    batch: int = 64
    seconds: float = 3.0


@step_type(1, ("torch", "numpy", "pillow"), writes=[RATES], work=lambda step, sizes: LITTLE)
def bench(config: BenchConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Measure a backbone and the CPU beside the device."""
    backbone = random_backbone(config)
    task = noise_task(backbone)
    seen = forward_rate(backbone, task, config.seconds)
    trained, beginning = training_rate(backbone, task, config, seen)
    rates: dict[str, Any] = {"forward": seen, "trained": trained, "beginning": beginning}
    rates |= {"opening": opening_seconds(backbone, out / "encoder"), "passes": backbone.precision}
    rates["training"] = training_precision(backbone, "auto")
    host = {"head_step": head_seconds(backbone.device), "drawing": drawing_seconds()}
    host |= {"photograph": photograph_seconds(out / "photograph.jpg"), "disk": disk_rate(out / "bytes")}
    write_json(out / RATES, {"backbone": rates, "host": host})


def random_backbone(config: BenchConfig) -> Backbone:
    """Return an encoder of an address with random weights, on the device, in the precision of its evaluation."""
    record, view = architecture(config.address, config.size, config.projection)
    module, device = build(record), choose_device(config.device)
    backbone = assemble(config.address, module, view(module), record, device)
    backbone.precision = FAST.get(device, "float32")  # type: ignore[assignment]
    return backbone


def noise_task(backbone: Backbone) -> Task:
    """Return a task of noise, with whole images to crop where the encoder is made for photographs."""
    generator, view = np.random.default_rng(0), backbone.preprocessing
    images = generator.integers(0, 256, (IMAGES, 3, view.size, view.size), dtype=np.uint8)
    short, labels = round(view.size / view.crop), generator.integers(0, CLASSES, IMAGES)
    shapes = np.full((IMAGES, 2), (short, short * 4 // 3), np.int64)
    pixels = generator.integers(0, 256, int(3 * shapes.prod(axis=1).sum()), dtype=np.uint8)
    train = Split(images, labels, Whole(pixels, shapes) if view.size >= PHOTOGRAPHS else None)
    return Task("noise", tuple(map(str, range(CLASSES))), train, train, train)


def clock(function: Callable[[], Any], device: str = "cpu") -> float:
    """Return the seconds that a call takes, until the device is done with it; on a CPU those of its cores.

    So what else runs on the machine does not count.
    """
    if device == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def forward_rate(backbone: Backbone, task: Task, seconds: float) -> float:
    """Return the images a second that pass an encoder, of images that are where passes find them fastest."""
    backbone.features(task.test.images[:1])
    count, took = 1, 0.0
    while took < seconds / 2 and count < MOST:
        count *= 2
        images = backbone.resident(np.resize(task.test.images, (count, *task.test.images.shape[1:])))
        took = clock(lambda: backbone.features(images), backbone.device)  # noqa: B023
    return count / min(took, clock(lambda: backbone.features(images), backbone.device))


def training_rate(backbone: Backbone, task: Task, config: BenchConfig, seen: float) -> tuple[float, float]:
    """Return the images a second that training passes when it runs, and the seconds that it takes to begin.

    Both come from a short and a long training. A slow device gets smaller batches.
    """
    batch = max(2, min(config.batch, round(seen * config.seconds / 6)))
    head = random_head(backbone.width, CLASSES, 0)

    def trained(steps: int) -> float:
        settings = Finetune(steps=steps, batch_size=batch, warmup=0)
        return clock(lambda: finetune_tasks(backbone, [task], [head], settings), backbone.device)

    growth = 8 if backbone.device.startswith("cuda") else 2
    trained(1)  # compiles, where something is compiled
    steps, short = 2, min(trained(2), trained(2))
    longer = short
    while longer - short < config.seconds / 2 and steps < UPDATES:
        steps *= growth
        longer = trained(steps)
    each = max(longer - short, 1e-9) / (steps - 2)
    return batch / each, max(0.0, short - 2 * each)


def opening_seconds(backbone: Backbone, folder: Path) -> float:
    """Return the seconds that a step takes to open an encoder, from pages that are in memory."""
    folder.mkdir()
    records.write_backbone(backbone, folder)
    return min(clock(lambda: records.read_backbone(folder, backbone.device), backbone.device) for _ in range(2))


def head_seconds(device: str) -> float:
    """Return the seconds that one step of one head takes when heads of all rates are fitted on features."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1024, 256, generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (1024,), generator=generator).to(device)
    few, many = (Probe(steps=steps, warmup=0) for steps in HEAD_STEPS)
    for settings in (few, many):
        took = clock(lambda: probe(features, labels, features, labels, CLASSES, settings), device)  # noqa: B023
    return took / (many.steps * len(many.learning_rates))


def drawing_seconds() -> float:
    """Return the seconds of a core to draw one of the lab's images."""
    worlds.draw("greek", "test", 1)  # reads the fonts
    return clock(lambda: worlds.draw("greek", "test", DRAWN)) / DRAWN


def photograph_seconds(path: Path) -> float:
    """Return the seconds of a core to decode a photograph and resize it to 224 pixels."""
    low = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    low.resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(path, quality=90)
    view = Preprocessing(224)

    def decode() -> None:
        for _ in range(20):
            with opened(path, view) as image:
                resize_and_crop(image, view)

    return clock(decode) / 20


def disk_rate(path: Path) -> float:
    """Return the bytes a second that are written and hashed."""
    content = np.random.default_rng(0).bytes(WRITTEN)
    took = clock(lambda: path.write_bytes(content)) + clock(lambda: file_digest(path))
    path.unlink()
    return WRITTEN / took


def measured(configs: Sequence[BenchConfig], store: Store, workers: int, gpu: str | None) -> Generator[dict[str, Any]]:
    """Yield what was measured of every backbone, in worker processes: on a CPU with as many at once as a study has.

    The rates are means over the workers, which share caches and memory.
    """
    executor = open_executor(workers, [] if gpu is None else [gpu])
    try:
        for config in configs:
            folders = run(config, store, executor)
            results = [read_json(folder / RATES) for folder in folders]
            for folder in folders:
                shutil.rmtree(folder)
            yield average(results)
    finally:
        executor.close()


def run(config: BenchConfig, store: Store, executor: Executor) -> list[Path]:
    """Measure a backbone in all workers of an executor at once, and return the folders with what each has measured."""
    step = Step(f"bench of {config.address}", bench, config)
    jobs = [Job(step, "", {}, store.begin()) for _ in range(executor.slots)]
    for job in jobs:
        executor.start(job, lambda share: None, lambda text: None)
    ended = 0
    while ended < len(jobs):
        ended += len(executor.wait())
    return [job.folder for job in jobs]


def average(every: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of each number over several measurements; what is no number is the same in all."""
    first = every[0]
    return {
        name: average([each[name] for each in every])
        if isinstance(value, dict)
        else (mean(each[name] for each in every) if isinstance(value, float) else value)
        for name, value in first.items()
    }
