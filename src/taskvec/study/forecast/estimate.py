"""How long a study takes and how much of it is done, before it runs: ``taskvec plan``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from taskvec.core.files import canonical, fingerprint, json_text
from taskvec.core.formatting import bytes_text, duration_text, flops_text
from taskvec.data.decoding import view_bytes
from taskvec.data.sources import parse
from taskvec.encoders.identity import to_download
from taskvec.engine.pipeline import Step, leaves, look, ordered
from taskvec.engine.store import Store
from taskvec.engine.store import seconds as recorded
from taskvec.engine.work import Work, total
from taskvec.study.experiment import Experiment
from taskvec.study.forecast.model_cost import input_size
from taskvec.study.forecast.sizes import Sizes
from taskvec.study.inputs import UNKNOWN_IMAGES

STARTING = 0.005
"""Seconds that any step takes beside what is counted."""
HEAD_STEP = 0.7e-3
"""Seconds of a core that one step of one linear head takes beside its FLOPs."""
DISK = 0.5e9
"""Bytes a second that are written and hashed."""


@dataclass(frozen=True)
class Device:
    """Peak FLOP/s of evaluation and of training, and the share of each that is assumed to be reached.

    ``about`` says what the peaks are of.
    """

    about: str
    evaluation: float
    training: float
    evaluation_share: float
    training_share: float


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "h100": Device("float32 without tensor cores; training in bfloat16 (SXM)", 67e12, 989e12, 0.5, 0.35),
        "a100": Device("float32 without tensor cores; training in bfloat16", 19.5e12, 312e12, 0.6, 0.4),
        "cpu": Device("a core with AVX-512 at 2 GHz", 128e9, 128e9, 0.35, 0.5),
    }
)
"""GPUs by NVIDIA's data sheets (dense); their shares are assumed, a core's are near what the lab reaches."""


@dataclass(frozen=True)
class Planned:
    """A step, what it takes, its memory in bytes (device, main), and the seconds it took where it is done."""

    step: Step
    work: Work
    memory: tuple[float, float]
    seconds: float | None

    @property
    def kind(self) -> str:
        """Name what it does."""
        return self.step.type.name


@dataclass(frozen=True)
class Forecast:
    """All steps of a study, those that are the same counted once, and what of it is not on this machine."""

    name: str
    planned: tuple[Planned, ...]
    notes: tuple[str, ...]
    downloads: tuple[str, ...]

    @property
    def ahead(self) -> list[Planned]:
        """List what is not done."""
        return [item for item in self.planned if item.seconds is None]

    @property
    def done(self) -> list[Planned]:
        """List what is done."""
        return [item for item in self.planned if item.seconds is not None]


def forward_seconds(work: Work, device: Device) -> float:
    """Return the time of passes that train nothing."""
    return work.forward_flops / (device.evaluation * device.evaluation_share)


def training_seconds(work: Work, device: Device) -> float:
    """Return the time of passes forward and back."""
    return work.training_flops / (device.training * device.training_share)


def host_seconds(work: Work) -> float:
    """Return the time of a CPU core beside the device: decoding, linear heads, files."""
    core = DEVICES["cpu"]
    heads = work.head_steps * HEAD_STEP + work.head_flops / (core.evaluation * core.evaluation_share)
    return work.decoding + heads + work.disk / DISK + STARTING


def seconds(work: Work, device: Device) -> float:
    """Return the time of a worker that does one after the other."""
    return forward_seconds(work, device) + training_seconds(work, device) + host_seconds(work)


def forecast(name: str, experiments: Sequence[Experiment], store: Store) -> Forecast:
    """Say what the steps of a study take, and which of them the store holds; no weight and no image is read."""
    sizes, planned = Sizes(), dict[str, Planned]()
    steps = (step for experiment in experiments for step in experiment.steps())
    looks = look(steps, store, lambda step, id: view_digest(step, sizes) or id)
    for step, (id, record) in looks.items():
        if id not in planned:
            took = None if record is None else recorded(record) if math.isfinite(recorded(record)) else 0.0
            planned[id] = Planned(step, step.type.work(step, sizes), memory(step, sizes), took)
    every = tuple(planned.values())
    return Forecast(name, every, tuple(unknown_shapes(sizes)), tuple(downloads(every)))


def view_digest(step: Step, sizes: Sizes) -> str:
    """Return the digest of a view to decode, which is known before it is written; nothing for other steps.

    Backbones that look at images alike so share decoded tasks.
    """
    view = sizes.backbone(step).view if step.type.name == "preprocessing" else None
    if view is None:
        return ""
    text = json_text(view.decoding())
    return fingerprint({"preprocessing.json": hashlib.sha256(text.encode()).hexdigest()})


def memory(step: Step, sizes: Sizes) -> tuple[float, float]:
    """Return the bytes a step needs on its device and in main memory: an estimate from above, without the libraries.

    Training keeps weights, gradients, Adam's two moments and the pre-trained copy, and half-precision activations.
    """
    weights = sizes.weights(step) if step.inputs.get("backbone") else 0.0
    if settings := getattr(step.config, "finetune", None):
        batch = settings.batch_size / settings.accumulate
        return 6 * weights + 2 * batch * sizes.backbone(step).activations, 2 * weights
    held = (len(list(leaves(step.inputs.get("finetuned")))) + 4) * weights
    return (held, 2 * weights) if getattr(step.config, "device", "") else (0, held)


def unknown_shapes(sizes: Sizes) -> Iterator[str]:
    """Name backbones whose architecture is told by no file here."""
    for (address, *_), cost in sizes.costs.items():
        if cost is None:
            yield f"the architecture of {address} is not on this machine: counted as a ViT-B/16 at 224 px"


def downloads(planned: Sequence[Planned]) -> Iterator[str]:
    """Name what is not on this machine: weights that no step has loaded yet, and data of the paper's tasks."""
    for item in planned:
        if item.kind != "load_backbone" or item.seconds is not None:
            continue
        address = item.step.config.address
        if file := item.step.config.source.get("absent") or to_download(address, True):
            yield f"{address}: {file} (its encoder is {bytes_text(item.work.disk)})"
    absent = {item.step.config.source.get("absent") for item in planned if item.kind == "decode_task"}
    for address in sorted(absent - {None}):
        unknown = "" if parse(address).paper else f" (how many is not known here: counted as {UNKNOWN_IMAGES:,})"
        yield f"{address}: its images{unknown}"


def decoded_bytes(steps: Iterable[Step], store: Store) -> float:
    """Return about how many bytes of evaluation views the store lacks for a study; no weight and no image is read."""
    views, bytes_of = [step for step in ordered(steps) if step.type.name == "decode_task"], dict[str, float]()
    for step, (_, record) in look(views, store, lambda _, id: id).items():
        if step.type.name == "decode_task" and record is None:
            encoder = step.inputs["preprocessing"].inputs["backbone"].config
            size, source = input_size(encoder.address, encoder.size, encoder.projection), step.config.source
            images = min(source["images"], 3 * (step.config.limit or source["images"]))
            bytes_of[canonical([source, size])] = view_bytes(images, size)
    return sum(bytes_of.values())


def kinds(forecast: Forecast) -> list[tuple[str, int, int, Work]]:
    """Return for every kind of step how many there are, how many are done, and the work of those that are not."""
    names = dict.fromkeys(item.kind for item in forecast.planned)
    every = {name: [item for item in forecast.planned if item.kind == name] for name in names}
    ahead = {name: [item for item in items if item.seconds is None] for name, items in every.items()}
    return [
        (name, len(items), len(items) - len(ahead[name]), total(item.work for item in ahead[name]))
        for name, items in every.items()
    ]


def report(estimate: Forecast, devices: Sequence[str], workers: int) -> Iterator[str]:
    """Yield the lines of ``taskvec plan``: steps by kind, time by device, disk, memory, downloads, and a check."""
    yield f"{estimate.name}: {len(estimate.planned)} steps, {len(estimate.done)} of them done; the rest takes"
    yield ""
    yield from table(estimate)
    yield ""
    for name in devices:
        yield from device_lines(name, estimate, workers)
    yield ""
    yield from resources(estimate)
    yield from (f"download  {what}" for what in estimate.downloads)
    yield from (f"note      {what}" for what in estimate.notes)
    yield from check(estimate)


def table(estimate: Forecast) -> Iterator[str]:
    """Yield a line for every kind of step, and one for all; images and FLOPs are those still to come."""
    yield f"{'step':<24}{'steps':>6}{'done':>6}{'images forward':>16}{'trained on':>14}{'FLOPs':>13}"
    rows = kinds(estimate)
    rows.append(("all", sum(r[1] for r in rows), sum(r[2] for r in rows), total(r[3] for r in rows)))
    for name, steps, done, work in rows:
        images = f"{work.forward:>16,.0f}{work.trained:>14,.0f}"
        yield f"{name:<24}{steps:>6}{done:>6}{images}{flops_text(work.flops):>13}"


def device_lines(name: str, estimate: Forecast, workers: int) -> Iterator[str]:
    """Yield the time on a device, what it is made of, and the rates that it assumes."""
    device = DEVICES[name]
    each = [seconds(item.work, device) for item in estimate.ahead]
    shared = max(sum(each) / workers, max(each, default=0)) if name == "cpu" else sum(each)
    several = f" with {workers} workers" if name == "cpu" and workers > 1 else ""
    yield f"{name:<10}{duration_text(shared)}{several}"
    work = total(item.work for item in estimate.ahead)
    passes = forward_seconds(work, device), training_seconds(work, device)
    parts = zip(("evaluation", "training"), passes, strict=True)
    yield (
        " " * 10
        + ", ".join(f"{what} {duration_text(duration)}" for what, duration in parts)
        + (f", decoding, linear heads and files on the CPU {duration_text(sum(each) - sum(passes))}")
    )
    rates = (device.evaluation_share, device.evaluation), (device.training_share, device.training)
    reached = " and ".join(f"{share:.0%} of {flops_text(peak)}/s" for share, peak in rates)
    yield " " * 10 + f"at {reached} ({device.about})"


def resources(estimate: Forecast) -> Iterator[str]:
    """Yield disk by the largest kinds of step, and the memory of the largest step."""
    by_kind = {name: work.disk for name, _, _, work in kinds(estimate)}
    largest = [name for name in sorted(by_kind, key=lambda name: -by_kind[name])[:3] if by_kind[name] >= 1e6]
    named = ", ".join(f"{name} {bytes_text(by_kind[name])}" for name in largest)
    yield f"disk      {bytes_text(sum(by_kind.values()))} more in the store" + (f" ({named})" if named else "")
    for place, where in enumerate(("the device", "main memory")):
        top = max(estimate.planned, key=lambda item: item.memory[place])
        yield f"memory    {bytes_text(top.memory[place])} of {where} ({top.step.label})"


def check(estimate: Forecast) -> Iterator[str]:
    """Yield how the estimate compares with what finished steps took on the CPU of this machine."""
    items = [item for item in estimate.done if getattr(item.step.config, "device", "") in ("", "cpu")]
    took, wanted = sum(item.seconds or 0 for item in items), sum(seconds(item.work, DEVICES["cpu"]) for item in items)
    if took >= 1:
        expected = duration_text(wanted)
        yield f"check     {len(items)} finished steps took {duration_text(took)}; expected of a core {expected}"
