"""How large are the things that steps read: backbones, tasks and heads, by their configurations; nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from taskvec.core.settings import Probe
from taskvec.data import tasks
from taskvec.data.addresses import TaskAddress
from taskvec.data.sources import parse
from taskvec.data.splits import SPLITS
from taskvec.engine.pipeline import Step, leaves
from taskvec.engine.work import Work
from taskvec.study.forecast.model_cost import ModelCost, model_cost
from taskvec.study.inputs import UNKNOWN_CLASSES

NUMBER = 4
"""Bytes of a float32."""
BACKWARD = 3
"""Forward passes that a training pass is worth: one forward, and two for the gradients of inputs and of weights."""
TANGENT = 3
"""Forward passes that one of a linearised encoder is worth: for y = W x the derivative is W dx + dW x."""
UNKNOWN = ModelCost(85_800_000, 35.1e9, 32.7e6, 768, 224)
"""A ViT-B/16 at 224 px, which stands for a backbone whose architecture nothing here tells."""


Key = tuple[str, int | None, bool | None]
"""What names a backbone: its address, its input size in pixels, and whether features are projected."""


class TaskSize(NamedTuple):
    """How large a task is: classes, and images to train, to validate and to test."""

    classes: int
    train: int
    validation: int
    test: int


@dataclass
class Sizes:
    """The sizes of what steps read, each looked up once."""

    listed: dict[str, TaskSize] = field(default_factory=dict)
    costs: dict[Key, ModelCost | None] = field(default_factory=dict)

    def key(self, step: Step) -> Key:
        """Return which backbone a step reads, directly or through what it reads."""
        while step.type.name != "load_backbone":
            step = step.inputs.get("backbone") or step.dependencies()[0]
        config = step.config
        return config.address, config.size, config.projection

    def backbone(self, step: Step) -> ModelCost:
        """Return the cost of the backbone that a step reads."""
        key = self.key(step)
        if key not in self.costs:
            self.costs[key] = model_cost(*key)
        return self.costs[key] or UNKNOWN

    def decoded(self, decode: Step) -> TaskSize:
        """Return the size of a decoded task, at most the study's limit a split."""
        config = decode.config
        if config.address not in self.listed:
            self.listed[config.address] = task_size(parse(config.address), config.source["images"])
        classes, *counts = self.listed[config.address]
        return TaskSize(classes, *(min(count, config.limit or count) for count in counts))

    def task(self, step: Step) -> TaskSize:
        """Return the size of the decoded task that a step reads."""
        return self.decoded(step.inputs["task"])

    def tasks(self, step: Step) -> list[TaskSize]:
        """Return the sizes of all decoded tasks that a step reads."""
        return [self.decoded(decode) for role in ("task", "tasks") for decode in leaves(step.inputs.get(role))]

    def passes(self, step: Step, forward: float, trained: float = 0, disk: float = 0, updates: float = 0) -> Work:
        """Return so many images forward and trained on by a step's backbone, in so many updates, and bytes written."""
        flops = self.backbone(step).flops * (TANGENT if step.config.linearised else 1)
        return Work(forward, trained, forward * flops, BACKWARD * trained * flops, updates, disk=disk)

    def weights(self, step: Step) -> float:
        """Return the bytes of an encoder's weights."""
        return float(NUMBER * self.backbone(step).parameters)

    def heads(self, step: Step, settings: Probe, size: TaskSize, count: int) -> Work:
        """Return the fitting of ``count`` linear heads on cached features."""
        width, batch = self.backbone(step).width, min(settings.batch_size, size.train)
        steps = count * settings.steps
        flops = steps * batch * 2 * BACKWARD * width * size.classes
        return Work(head_steps=steps, head_flops=flops, disk=NUMBER * count * (width + 1) * size.classes)


def validating(step: Step, sizes: Sizes) -> Work:
    """The validation images of every task pass once."""
    return sizes.passes(step, sum(size.validation for size in sizes.tasks(step)))


def encoder(step: Step, sizes: Sizes) -> Work:
    """No image passes; weights, or a vector of their size, are written."""
    return Work(disk=sizes.weights(step))


def along(step: Step, scales: int) -> int:
    """Return the passes that so many scales along a vector take: two serve all of a linearised encoder's."""
    return min(scales, 2) if step.config.linearised else scales


def small_side(address: TaskAddress) -> int | None:
    """Return the short side of a task's images where they are known to be small."""
    return address.paper.side if address.paper else None


def task_size(address: TaskAddress, images: int) -> TaskSize:
    """Return the size of a task by the protocol's table, by what it lists, or from its number of images."""
    if address.paper is not None:
        return TaskSize(address.paper.classes, *address.paper.sizes)
    if (counts := address.source.counts) is not None:
        return TaskSize(UNKNOWN_CLASSES, *held_out(counts["train"]), counts["test"])
    if address.dataset is None:
        listing = tasks.list_task(address)
        return TaskSize(len(listing.classes), *(listing.sizes()[split] for split in SPLITS))
    return TaskSize(UNKNOWN_CLASSES, *held_out(images - images // 6), images // 6)


def held_out(train: int) -> tuple[int, int]:
    """Return how many of so many training images are trained and validated on."""
    validation = min(int(0.1 * train), 5000)
    return train - validation, validation
