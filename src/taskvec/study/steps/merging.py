"""Steps that merge task vectors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskvec.core.compute import choose_device
from taskvec.core.files import read_json, write_json
from taskvec.core.progress import Progress
from taskvec.encoders import batch_norm, records
from taskvec.engine.pipeline import Config, Inputs, Step, Untracked, step_type
from taskvec.engine.work import Work
from taskvec.evaluation.accuracy import accuracies, fine_tuned_accuracies
from taskvec.evaluation.scale_search import coordinate_search, objective
from taskvec.merging import in_memory, plugins
from taskvec.merging.directions import laid_out, write_direction, write_transformed
from taskvec.merging.entries import Data
from taskvec.merging.in_memory import DIRECTIONS, Collected, save_directions
from taskvec.merging.on_disk import Streams, stream
from taskvec.merging.registry import Recipe, find_recipe
from taskvec.study import artifacts
from taskvec.study.artifacts import CHOICE, DIRECTION, ENCODER, OPTION, STATISTICS, OnDevice
from taskvec.study.forecast.sizes import Sizes, encoder
from taskvec.weights import vectors
from taskvec.weights.flat import Slot, Weights, save, save_tensors
from taskvec.weights.reader import Checkpoint

MERGE = "merge.json"
"""What a per-task merge tells beside its directions."""


class MergeConfig(OnDevice):
    """By which method vectors are merged; ``sources`` has the digests of plugins that it is of."""

    method: str
    config: dict[str, Any] | None = None
    seed: int | None = None
    sources: dict[str, str] | None = None
    plugins: Untracked[tuple[str, ...]] = ()

    def recipe(self) -> Recipe:
        """Return the recipe; methods of plugins must be what they were when it was planned."""
        used = plugins.use(map(Path, self.plugins)) if self.sources else []
        recipe = find_recipe(self.method, self.config)
        plugins.check_same(recipe, used, self.sources or {})
        return recipe


def merged_files(per_task: bool) -> tuple[str, ...]:
    """Return the files of a merge: one vector, or one for each task."""
    return (DIRECTIONS, MERGE) if per_task else (DIRECTION,)


@step_type(
    3,
    ("torch", "numpy"),
    reads=["backbone", "finetuned", "tasks"],
    writes=lambda config: merged_files(config.recipe().per_task),
    work=encoder,
    heading="merging",
)
def merge(config: MergeConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Make a method's merged task vector out of the fine-tuned encoders, or one for each task.

    The encoders are read an entry at a time, and a merged vector is written so. What a method measures is measured
    before, with one task vector in memory where it needs no more.
    """
    recipe = config.recipe()
    with ExitStack() as stack:
        files = [
            stack.enter_context(Checkpoint(folder / ENCODER)) for folder in (inputs["backbone"], *inputs["finetuned"])
        ]
        layout = records.read_layout(inputs["backbone"])
        streams = partial(
            Streams.of,
            base=files[0],
            tuned=files[1:],
            matched=laid_out(layout, files[0], files[1:]),
            seed=config.seed or 0,
            device=choose_device(config.device or "cpu"),
            excludable=False,
        )
        statistics = measure(recipe, streams, config, inputs, out, progress) if recipe.measures else {}
        entries = streams(recipe, statistics=statistics)
        if recipe.per_task:
            write_directions(recipe, entries, layout, out)
        else:
            write_direction(recipe, entries, out / DIRECTION)


def measure(
    recipe: Recipe,
    streams: Callable[[Recipe], Streams],
    config: MergeConfig,
    inputs: Inputs,
    out: Path,
    progress: Progress,
) -> dict[str, Tensor]:
    """Return what the methods of a recipe measure on the tasks' images, by entry."""
    backbone = artifacts.open_backbone(inputs, config)
    heads = [head.on(backbone.device) for head in artifacts.open_heads(inputs["finetuned"])]
    with TemporaryDirectory(dir=out) as folder:
        if len(recipe.stages) > 1:
            paths = write_transformed(recipe.transforms, streams(recipe.transforms), Path(folder))
            tuned = Opened(paths, lambda path: records.read_weights(path, backbone.pretrained))
        else:
            tuned = Opened(inputs["finetuned"], lambda path: artifacts.open_task_vector(path, backbone))
        data = Data(backbone, tuned, artifacts.open_tasks(inputs), heads, config.seed or 0, progress)
        return in_memory.measure(recipe, data)


@dataclass(frozen=True)
class Opened(Sequence[Weights]):
    """Task vectors that are read when they are asked for: who goes over them holds one."""

    paths: Sequence[Path]
    open: Callable[[Path], Weights]

    def __len__(self) -> int:
        """Return their number."""
        return len(self.paths)

    def __getitem__(self, place: Any) -> Any:
        """Return the vector at a place, or vectors in a slice of places."""
        chosen = self.paths[place]
        return self.open(chosen) if isinstance(chosen, Path) else [self.open(path) for path in chosen]


def write_directions(recipe: Recipe, streams: Streams, layout: tuple[Slot, ...], out: Path) -> None:
    """Write the result of a recipe that gives each task its own direction, and what a task's takes."""
    size = max(slot.start + slot.size for slot in layout)
    collected = Collected(Weights(layout, torch.zeros(size)), len(streams.tuned))
    stream(recipe, streams, collected.take)
    directions = collected.directions()
    save_directions(directions, out / DIRECTIONS)
    write_json(out / MERGE, {"bytes_per_task": directions.bytes_per_task})


class PickConfig(Config):
    """Whether the merge has a direction for each task."""

    per_task: bool = False


@step_type(
    1, reads=["merged", "option"], writes=lambda config: merged_files(config.per_task), work=encoder, heading="search"
)
def pick_merge(config: PickConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Keep the merge of the chosen hyperparameters, and nothing else: what was measured of it holds for the copy."""
    index = read_json(inputs["option"] / OPTION)["index"]
    for name in merged_files(config.per_task):
        shutil.copyfile(inputs["merged"][index] / name, out / name)


class ReestimateConfig(OnDevice):
    """At which scales, and from how many images, the statistics of batch norm are estimated."""

    scales: list[float]
    images: int


def reestimate_work(step: Step, sizes: Sizes) -> Work:
    """Training images of all tasks pass at every scale, for the statistics of batch norm."""
    read, config = sizes.tasks(step), step.config
    images = min(config.images // len(read), *(size.train for size in read)) * len(read)
    batches = max(1, images // batch_norm.BATCH)
    return sizes.passes(step, len(config.scales) * min(images, batches * batch_norm.BATCH))


@step_type(
    1,
    ("torch", "numpy"),
    reads=["backbone", "precision", "merged", "tasks"],
    writes=[STATISTICS],
    work=reestimate_work,
    heading="search",
)
def reestimate(config: ReestimateConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Estimate the statistics of batch norm anew at every scale along a merged vector, from training images."""
    backbone = artifacts.open_backbone(inputs, config)
    vector = artifacts.open_vector(inputs["merged"], backbone)
    images, statistics = batch_norm.mixed(artifacts.open_tasks(inputs), config.images), {}
    for index, scale in enumerate(config.scales):
        weights = vectors.add(backbone.pretrained, vector, scale)
        statistics[artifacts.scale_key(scale)] = batch_norm.statistics(batch_norm.reestimate(backbone, weights, images))
        progress((index + 1) / len(config.scales))
    save_tensors(statistics, out / STATISTICS)


class PerTaskConfig(OnDevice):
    """From which scales one a task is searched, by how many validation images of each."""

    grid: list[float]
    samples: int


def per_task_work(step: Step, sizes: Sizes) -> Work:
    """About six settings a task are tried on samples, and two on all images; the search ends when nothing moves."""
    images = [size.validation for size in sizes.tasks(step)]
    sampled = sum(min(count, step.config.samples) for count in images)
    return sizes.passes(step, 6 * len(images) * sampled + 2 * sum(images), disk=sizes.weights(step))


@step_type(
    4,
    ("torch", "numpy"),
    reads=["backbone", "precision", "tasks", "finetuned", "choice"],
    writes=[DIRECTION, CHOICE],
    work=per_task_work,
    heading="search",
)
def per_task_scales(config: PerTaskConfig, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Search one scale a task from the common one, and write the sum as a merged vector whose scale is 1.

    The search looks at a sample of every validation split; on the whole of it what was found must beat the common one.
    """
    backbone, every = artifacts.open_backbone(inputs, config), artifacts.open_tasks(inputs)
    heads = artifacts.open_heads(inputs["finetuned"])
    tuned, normal = artifacts.open_task_vectors(inputs, backbone), artifacts.validations(inputs["finetuned"])
    start = read_json(inputs["choice"] / CHOICE)["scale"]
    few = [replace(task, validation=task.validation.sample(config.samples)) for task in every]
    normal_few = fine_tuned_accuracies(backbone, tuned, few, heads)
    result = coordinate_search(backbone, tuned, few, heads, normal_few, config.grid, start, progress)
    measured = {}
    with backbone.at():
        for scales in ((start,) * len(every), result.scales):
            vectors.move(backbone.bound, backbone.pretrained, tuned, scales)
            measured[scales] = accuracies(backbone, every, heads)
    best = max(measured, key=lambda scales: objective(measured[scales], normal))  # ties keep the common one
    total = torch.zeros_like(backbone.pretrained.flat)
    for vector, scale in zip(tuned, best, strict=True):
        total += vector.flat * scale
    save(backbone.pretrained.with_flat(total), out / DIRECTION)
    choice: dict[str, Any] = {"scale": 1.0, "scales": best, "value": objective(measured[best], normal)}
    choice |= {"accuracy": float(np.mean(measured[best])), "measured": list(measured.items())}
    write_json(out / CHOICE, choice | {"tried": [trial for trial in result.tried if trial[0] not in measured]})
