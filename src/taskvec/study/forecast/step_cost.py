"""What each kind of step takes: images passed, FLOPs, linear heads, images decoded, bytes written, memory.

Every count follows what the step of that name does in ``steps``; nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import NamedTuple

from taskvec.data import tasks
from taskvec.data.addresses import TaskAddress
from taskvec.data.sources import parse
from taskvec.data.splits import SPLITS
from taskvec.encoders import batch_norm
from taskvec.engine.pipeline import Step
from taskvec.study.forecast.model_cost import Anatomy, anatomy
from taskvec.study.inputs import UNKNOWN_CLASSES

NUMBER = 4
"""Bytes of a float32."""
BACKWARD = 3
"""Forward passes that a training pass is worth: one forward, and two for the gradients of inputs and of weights."""
TANGENT = 3
"""Forward passes that one of a linearised encoder is worth: for y = W x the derivative is W dx + dW x."""
UNKNOWN = Anatomy(85_800_000, 35.1e9, 32.7e6, 768, 224)
"""A ViT-B/16 at 224 px, which stands for a backbone whose architecture nothing here tells."""


WIDER = 4 / 3
"""How much longer the long side of a photograph is."""
DRAWING, DECODING = 0.4e-3, 10e-3
"""Seconds of a core to draw one of the lab's images, and to decode a photograph and resize it."""


@dataclass(frozen=True)
class Work:
    """What some steps take: images passed forward, images trained on, FLOPs of each, work of the CPU, bytes written.

    ``head_steps`` are optimiser steps of linear heads and ``head_flops`` their FLOPs; ``decoding`` is in core seconds.
    """

    forward: float = 0
    trained: float = 0
    forward_flops: float = 0
    training_flops: float = 0
    head_steps: float = 0
    head_flops: float = 0
    decoding: float = 0
    disk: float = 0

    def __add__(self, other: Work) -> Work:
        """Add up field by field."""
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def flops(self) -> float:
        """Return all FLOPs."""
        return self.forward_flops + self.training_flops + self.head_flops


def total(works: Iterable[Work]) -> Work:
    """Add up."""
    return sum(works, Work())


class TaskSize(NamedTuple):
    """How large a task is: classes, and images to train, to validate and to test."""

    classes: int
    train: int
    validation: int
    test: int


@dataclass
class Counter:
    """Counts what single steps take, from their configurations and the sizes of what they read."""

    sizes: dict[TaskAddress, TaskSize] = field(default_factory=dict)
    anatomies: dict[tuple[str, int | None, bool | None], Anatomy | None] = field(default_factory=dict)

    def backbone(self, step: Step) -> Anatomy:
        """Return the anatomy of the backbone that a step reads, directly or through what it reads."""
        while step.type.name != "load_backbone":
            step = step.inputs["backbone"][0] if "backbone" in step.inputs else step.dependencies()[0]
        key = step.untracked["address"], step.config["size"], step.config.get("projection")
        if key not in self.anatomies:
            self.anatomies[key] = anatomy(*key)
        return self.anatomies[key] or UNKNOWN

    def size(self, decode: Step) -> TaskSize:
        """Return the size of a decoded task, at most the study's limit a split."""
        config, address = decode.config, address_of(decode)
        if address not in self.sizes:
            self.sizes[address] = task_size(address, config["source"]["images"])
        classes, *counts = self.sizes[address]
        return TaskSize(classes, *(min(count, config["limit"] or count) for count in counts))

    def read(self, step: Step, role: str = "task") -> list[TaskSize]:
        """Return the sizes of the decoded tasks that a step reads."""
        return [self.size(decode) for decode in step.inputs.get(role, ())]

    def work(self, step: Step) -> Work:
        """Return what a step takes."""
        name = step.type.name
        return COUNTS[name](self, step) if name in COUNTS else Work(disk=1e3)

    def passes(self, step: Step, forward: float, trained: float = 0, disk: float = 0) -> Work:
        """Return so many images forward and trained on by a step's backbone, and bytes written."""
        flops = self.backbone(step).flops * (TANGENT if step.config.get("linearised") else 1)
        return Work(forward, trained, forward * flops, BACKWARD * trained * flops, disk=disk)

    def weights(self, step: Step) -> float:
        """Return the bytes of an encoder's weights."""
        return float(NUMBER * self.backbone(step).parameters)

    def heads(self, step: Step, settings: Mapping[str, float], size: TaskSize, count: float) -> Work:
        """Return the fitting of ``count`` linear heads on cached features."""
        width, batch = self.backbone(step).width, min(settings["batch_size"], size.train)
        steps = count * settings["steps"]
        flops = steps * batch * 2 * BACKWARD * width * size.classes
        return Work(head_steps=steps, head_flops=flops, disk=NUMBER * count * (width + 1) * size.classes)


def load(count: Counter, step: Step) -> Work:
    """The weights are written once more, as safetensors."""
    return Work(disk=count.weights(step))


def decode(count: Counter, step: Step) -> Work:
    """Every image is decoded once, to uint8."""
    images = sum(count.size(step)[1:])
    return Work(
        decoding=images * image_seconds(address_of(step)), disk=images * (3 * count.backbone(step).size ** 2 + 8)
    )


def decode_training(count: Counter, step: Step) -> Work:
    """Training images are decoded whole: at most to the short side of the view before its crop, 4:3 on average."""
    images, shape = count.size(step).train, count.backbone(step)
    address, short = address_of(step), shape.size / (shape.view.crop if shape.view else 1)
    pixels = WIDER * min(short, small_side(address) or short) ** 2
    return Work(decoding=images * image_seconds(address), disk=images * (3 * pixels + 16))


def image_seconds(address: TaskAddress) -> float:
    """Return the seconds of a core that one image of a task takes."""
    return DRAWING if address.source.counts or small_side(address) else DECODING


def small_side(address: TaskAddress) -> int | None:
    """Return the short side of a task's images where they are known to be small."""
    return address.paper.side if address.paper else None


def address_of(decode: Step) -> TaskAddress:
    """Return the address of the task that a step decodes."""
    return parse(decode.config.get("address") or decode.untracked["address"])


def features(count: Counter, step: Step) -> Work:
    """Training and validation images pass once."""
    (size,) = count.read(step)
    images = size.train + size.validation
    return count.passes(step, images, disk=NUMBER * images * count.backbone(step).width)


def probe(count: Counter, step: Step) -> Work:
    """A head for every learning rate, on cached features."""
    (size,), settings = count.read(step), step.config["probe"]
    return count.heads(step, settings, size, len(settings["learning_rates"]))


def validate(count: Counter, step: Step) -> Work:
    """The validation images of every task pass once."""
    return count.passes(step, sum(size.validation for size in count.read(step)))


def finetune(count: Counter, step: Step) -> Work:
    """So many batches pass forward and back, shared by the tasks, then validation images; trials keep no encoder."""
    settings, sizes = step.config["finetune"], count.read(step)
    share = max(1, settings["batch_size"] // settings["accumulate"] // len(sizes))
    images = settings["steps"] * settings["accumulate"] * sum(min(share, size.train) for size in sizes)
    kept = 0.0 if "trial" in step.config else count.weights(step)
    return validate(count, step) + count.passes(step, 0, images, disk=kept)


def imported(count: Counter, step: Step) -> Work:
    """The validation images pass; the encoder is written once more."""
    return validate(count, step) + Work(disk=count.weights(step))


def merge(count: Counter, step: Step) -> Work:
    """No image passes; the merged vector is written."""
    return Work(disk=count.weights(step))


def kept(count: Counter, step: Step) -> Work:
    """The validation images pass at every scale, but at 0 where that is known."""
    scales = [scale for scale in step.config["scales"] if scale or "start" not in step.inputs]
    return count.passes(step, along(step, len(scales)) * count.read(step)[0].validation)


def along(step: Step, scales: int) -> int:
    """Return the passes that so many scales along a vector take: two serve all of a linearised encoder's."""
    return min(scales, 2) if step.config.get("linearised") else scales


def negate(count: Counter, step: Step) -> Work:
    """The validation images of both tasks pass at every scale and 0, their test images before and after."""
    scales = along(step, len({0.0, *step.config["scales"]}))
    return count.passes(step, sum(scales * size.validation + 2 * size.test for size in count.read(step)))


def reprobed(count: Counter, step: Step) -> Work:
    """Training and validation images pass at every scale but 0; later rounds try at most two."""
    (size,) = count.read(step)
    scales = 2 if "plan" in step.inputs else len([scale for scale in step.config["scales"] if scale])
    fitting = count.heads(step, step.config["probe"], size, scales)
    return count.passes(step, along(step, scales) * (size.train + size.validation)) + fitting


def surgery(count: Counter, step: Step) -> Work:
    """Training images pass once by the fine-tuned encoder, then at every scale with validation images."""
    (size,), settings = count.read(step), step.config["surgery"]
    scales = 2 if "plan" in step.inputs else len(step.config["scales"])
    numbers = 2 * settings["rank"] * count.backbone(step).width
    steps = scales * settings["steps"]
    flops = steps * min(settings["batch_size"], size.train) * 2 * BACKWARD * numbers
    learned = Work(head_steps=2 * steps, head_flops=flops, disk=NUMBER * scales * numbers)
    return count.passes(step, size.train + scales * (size.train + size.validation)) + learned


def agreement(count: Counter, step: Step) -> Work:
    """A sample of training images passes by the fine-tuned encoder and at every scale."""
    (size,) = count.read(step)
    return count.passes(step, (1 + len(step.config["scales"])) * min(step.config["images"], size.train))


def reestimate(count: Counter, step: Step) -> Work:
    """Training images of all tasks pass at every scale, for the statistics of batch norm."""
    share = min(step.config["images"] // len(step.inputs["task"]), *(size.train for size in count.read(step)))
    images = share * len(step.inputs["task"])
    batches = max(1, images // batch_norm.BATCH)
    passed = min(images, batches * batch_norm.BATCH)
    return count.passes(step, len(step.config["scales"]) * passed)


def per_task(count: Counter, step: Step) -> Work:
    """About six settings a task are tried on samples, and two on all images; the search ends when nothing moves."""
    validation = [size.validation for size in count.read(step)]
    sampled = sum(min(images, step.config["samples"]) for images in validation)
    images = 6 * len(validation) * sampled + 2 * sum(validation)
    return count.passes(step, images, disk=count.weights(step))


def test(count: Counter, step: Step) -> Work:
    """The test images pass for probing, fine-tuned, other baselines and each candidate."""
    passes = 2 + len(step.config["candidates"]) + ("zero_shot" in step.inputs) + ("joint" in step.inputs)
    return count.passes(step, passes * count.read(step)[0].test)


def own_accuracy(count: Counter, step: Step) -> Work:
    """A sample of the validation images passes by the task's own encoder."""
    return count.passes(step, min(step.config["samples"], count.read(step)[0].validation))


def subset(count: Counter, step: Step) -> Work:
    """About nine scales on few validation images, a set's test images, and points of the box."""
    config, sizes = step.config, count.read(step)
    few = sum(min(config["samples"], size.validation) for size in sizes)
    merged = config["merge"] * (few * min(9, len(config["grid"])) + sum(size.test for size in sizes))
    samples = [min(s.config["samples"], count.read(s)[0].test) for s in step.inputs.get("singles", ())]
    return count.passes(step, merged + config["points"] * sum(samples))


def axis(count: Counter, step: Step) -> Work:
    """A sample of test images passes at every coefficient, and is kept."""
    samples, scales = min(step.config["samples"], count.read(step)[0].test), len(step.config["scales"])
    disk = samples * (3 * count.backbone(step).size ** 2 + 8 * scales)
    return count.passes(step, samples * scales, disk=disk)


def heatmap(count: Counter, step: Step) -> Work:
    """Both samples pass at every point where the other coefficient is not 0."""
    scales = step.config["scales"]
    points = len(scales) * len([scale for scale in scales if scale])
    samples = [min(s.config["samples"], count.read(s)[0].test) for s in step.inputs["singles"]]
    return count.passes(step, points * sum(samples))


def model(count: Counter, step: Step) -> Work:
    """The best encoder is written, and copied into the run folder once a backbone; a linearised one has two at most."""
    return Work(disk=count.weights(step) * (2 if step.config.get("linearised") else 1))


COUNTS: Mapping[str, Callable[[Counter, Step], Work]] = MappingProxyType(
    {
        "load_backbone": load,
        "decode_task": decode,
        "decode_training": decode_training,
        "features": features,
        "probe_task": probe,
        "zero_shot": validate,
        "finetune": finetune,
        "finetune_joint": finetune,
        "import_finetuned": imported,
        "merge": merge,
        "pick_merge": merge,
        "reestimate": reestimate,
        "reestimated_curve": kept,
        "kept_curve": kept,
        "reprobed_curve": reprobed,
        "surgery_curve": surgery,
        "agreement": agreement,
        "per_task_scales": per_task,
        "test_task": test,
        "own_accuracy": own_accuracy,
        "subset": subset,
        "single_task_predictions": axis,
        "heatmap": heatmap,
        "build_model": model,
        "negate": negate,
    }
)
"""How each kind of step is counted; others choose among numbers, and pass nothing."""


def memory(count: Counter, step: Step) -> tuple[float, float]:
    """Return the bytes a step needs on its device and in main memory: an estimate from above, without the libraries.

    Training keeps weights, gradients, Adam's two moments and the pre-trained copy, and half-precision activations.
    """
    vectors, weights = len(step.inputs.get("finetuned", ())), 0.0
    if step.inputs.get("backbone"):
        weights = count.weights(step)
    if "finetune" in step.config:
        settings, shape = step.config["finetune"], count.backbone(step)
        batch = settings["batch_size"] / settings["accumulate"]
        return 6 * weights + 2 * batch * shape.activations, 2 * weights
    held = (vectors + 4) * weights
    return (held, 2 * weights) if "device" in step.config else (0, held)


def task_size(address: TaskAddress, images: int) -> TaskSize:
    """Return the size of a task by the protocol's table, by what it lists, or from its number of images."""
    if address.paper is not None:
        return TaskSize(address.paper.classes, *address.paper.sizes)
    if (counts := address.source.counts) is not None:
        return TaskSize(UNKNOWN_CLASSES, *held_out(counts["train"]), counts["test"])
    if address.dataset is None:
        found = tasks.list_task(address)
        return TaskSize(len(found.classes), *(found.sizes()[split] for split in SPLITS))
    return TaskSize(UNKNOWN_CLASSES, *held_out(images - images // 6), images // 6)


def held_out(train: int) -> tuple[int, int]:
    """Return how many of so many training images are trained and validated on."""
    validation = min(int(0.1 * train), 5000)
    return train - validation, validation
