"""How long a study takes and how much of it is done, before it runs: ``taskvec plan``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

from taskvec.core.files import fingerprint, json_text
from taskvec.core.formatting import bytes_text, duration_text, flops_text
from taskvec.data.sources import parse
from taskvec.encoders.identity import to_download
from taskvec.engine.pipeline import Step, leaves, look, ordered
from taskvec.engine.store import Store
from taskvec.engine.store import seconds as recorded
from taskvec.engine.work import Work, total
from taskvec.study.experiment import Experiment
from taskvec.study.forecast.model_cost import ModelCost
from taskvec.study.forecast.rates import BATCH, CORE_FLOPS, READING, Device
from taskvec.study.forecast.sizes import BACKWARD, Key, Sizes
from taskvec.study.forecast.step_memory import memory
from taskvec.study.inputs import UNKNOWN_IMAGES

STARTING = 0.005
"""Seconds that any step takes beside what is counted."""


@dataclass(frozen=True)
class Planned:
    """A step, what it takes, its memory in bytes (device, main), and the seconds it took where it is done.

    What looks through a backbone has its key and its cost, and ``reads`` so many bytes of encoders beside it. It
    ``opens`` the backbone unless the step before has: consecutive steps of a worker share it.
    """

    step: Step
    work: Work
    memory: tuple[float, float]
    seconds: float | None
    backbone: tuple[Key, ModelCost] | None
    reads: float
    opens: bool

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


@dataclass(frozen=True)
class Duration:
    """Seconds that steps take: passes that train nothing, training, opening encoders, and the CPU's other work."""

    evaluation: float = 0
    training: float = 0
    opening: float = 0
    host: float = 0

    def __add__(self, other: Duration) -> Duration:
        """Add up field by field."""
        return Duration(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> float:
        """Return the seconds of a worker that does one after the other."""
        return self.evaluation + self.training + self.opening + self.host


def duration(item: Planned, device: Device) -> Duration:
    """Return how long a step takes on a device."""
    work, host = item.work, device.host
    heads = work.head_steps * host.head_step + work.head_flops / CORE_FLOPS
    decoding = work.photographs * host.photograph + work.drawings * host.drawing
    rest = decoding / device.cores + heads + work.disk / host.disk + STARTING
    if item.backbone is None:
        return Duration(host=rest)
    pace = device.pace(*item.backbone)
    return Duration(
        work.forward_flops / pace.forward + work.forward / BATCH * pace.batch,
        work.training_flops / pace.training + work.updates * pace.update + bool(work.updates) * pace.beginning,
        item.opens * pace.opening + item.reads / READING,
        rest,
    )


def forecast(name: str, experiments: Sequence[Experiment], store: Store) -> Forecast:
    """Say what the steps of a study take, and which of them the store holds; no weight and no image is read."""
    sizes, planned, shared = Sizes(), dict[str, Planned](), None
    steps = (step for experiment in experiments for step in experiment.steps())
    looks = look(steps, store, lambda step, id: view_digest(step, sizes) or id)
    for step, (id, record) in looks.items():
        if id not in planned:
            took = None if record is None else recorded(record) if math.isfinite(recorded(record)) else 0.0
            backbone, reads = opened(step, sizes)
            opens = backbone is not None and backbone[0] != shared
            shared = backbone[0] if backbone else shared
            how = step.type.work(step, sizes), memory(step, sizes), took
            planned[id] = Planned(step, *how, backbone, reads, opens)
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


def opened(step: Step, sizes: Sizes) -> tuple[tuple[Key, ModelCost] | None, float]:
    """Return which backbone a step opens and what it costs, and the bytes of other encoders that it reads."""
    if not getattr(step.config, "device", ""):
        return None, 0.0
    encoders = sum(len(list(leaves(step.inputs.get(role)))) for role in ("finetuned", "merged"))
    return (sizes.key(step), sizes.backbone(step)), encoders * sizes.weights(step)


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
    views, sizes = [step for step in ordered(steps) if step.type.name == "decode_task"], Sizes()
    looks = look(views, store, lambda step, id: view_digest(step, sizes) or id)
    missing = {id: step for step, (id, record) in looks.items() if step in views and record is None}
    return sum(step.type.work(step, sizes).disk for step in missing.values())


def kinds(forecast: Forecast) -> list[tuple[str, int, int, Work]]:
    """Return for every kind of step how many there are, how many are done, and the work of those that are not."""
    names = dict.fromkeys(item.kind for item in forecast.planned)
    every = {name: [item for item in forecast.planned if item.kind == name] for name in names}
    ahead = {name: [item for item in items if item.seconds is None] for name, items in every.items()}
    return [
        (name, len(items), len(items) - len(ahead[name]), total(item.work for item in ahead[name]))
        for name, items in every.items()
    ]


def report(estimate: Forecast, devices: Sequence[Device], workers: int) -> Iterator[str]:
    """Yield the lines of ``taskvec plan``: steps by kind, time by device, disk, memory, downloads, and a check."""
    yield f"{estimate.name}: {len(estimate.planned)} steps, {len(estimate.done)} of them done; the rest takes"
    yield ""
    yield from table(estimate)
    yield ""
    for device in devices:
        yield from device_lines(device, estimate, workers)
    yield ""
    yield from resources(estimate)
    yield from (f"download  {what}" for what in estimate.downloads)
    yield from (f"note      {what}" for what in estimate.notes)
    yield from (line for device in devices if device.name == "cpu" for line in check(estimate, device))


def table(estimate: Forecast) -> Iterator[str]:
    """Yield a line for every kind of step, and one for all; images and FLOPs are those still to come."""
    yield f"{'step':<24}{'steps':>6}{'done':>6}{'images forward':>16}{'trained on':>14}{'FLOPs':>13}"
    rows = kinds(estimate)
    rows.append(("all", sum(r[1] for r in rows), sum(r[2] for r in rows), total(r[3] for r in rows)))
    for name, steps, done, work in rows:
        images = f"{work.forward:>16,.0f}{work.trained:>14,.0f}"
        yield f"{name:<24}{steps:>6}{done:>6}{images}{flops_text(work.flops):>13}"


def device_lines(device: Device, estimate: Forecast, workers: int) -> Iterator[str]:
    """Yield the time on a device, what it is made of, and the rates that it assumes or that were measured."""
    each = [duration(item, device) for item in estimate.ahead]
    whole, is_cpu = sum(each, Duration()), not device.update
    shared = max(whole.total / workers, max((one.total for one in each), default=0)) if is_cpu else whole.total
    several = f" with {workers} workers" if is_cpu and workers > 1 else ""
    yield f"{device.name:<10}{duration_text(shared)}{several}"
    yield (
        f"{'':<10}evaluation {duration_text(whole.evaluation)}, training {duration_text(whole.training)}, opening "
        f"encoders {duration_text(whole.opening)}, decoding, linear heads and files {duration_text(whole.host)}"
    )
    yield from (f"{'':<10}{line}" for line in rate_lines(device, estimate))


def rate_lines(device: Device, estimate: Forecast) -> Iterator[str]:
    """Yield where a device's rates are from: of each backbone, where something was measured."""
    if device.measured is None:
        reached = f"{flops_text(device.forward)}/s forward and {flops_text(device.training)}/s in training"
        yield f"by default {reached}: {device.about}"
        return
    yield device.measured.about
    for key, cost in dict(item.backbone for item in estimate.ahead if item.backbone).items():
        pace = device.pace(key, cost)
        seen, trained = pace.forward / cost.flops, pace.training / BACKWARD / cost.flops
        yield f"{key[0]}: {seen:,.0f} images/s forward and {trained:,.0f} in training ({pace.source})"


def resources(estimate: Forecast) -> Iterator[str]:
    """Yield disk by the largest kinds of step, and the memory of the largest step."""
    by_kind = {name: work.disk for name, _, _, work in kinds(estimate)}
    largest = [name for name in sorted(by_kind, key=lambda name: -by_kind[name])[:3] if by_kind[name] >= 1e6]
    named = ", ".join(f"{name} {bytes_text(by_kind[name])}" for name in largest)
    yield f"disk      {bytes_text(sum(by_kind.values()))} more in the store" + (f" ({named})" if named else "")
    for place, where in enumerate(("the device", "main memory")):
        top = max(estimate.planned, key=lambda item: item.memory[place])
        yield f"memory    {bytes_text(top.memory[place])} of {where} ({top.step.label})"


def check(estimate: Forecast, device: Device) -> Iterator[str]:
    """Yield how the estimate compares with what finished steps took on the CPU of this machine."""
    items = [item for item in estimate.done if getattr(item.step.config, "device", "") in ("", "cpu")]
    took, wanted = sum(item.seconds or 0 for item in items), sum(duration(item, device).total for item in items)
    if took >= 1:
        expected = duration_text(wanted)
        yield f"check     {len(items)} finished steps took {duration_text(took)}; expected of a core {expected}"
