"""How fast devices are: rates that ``taskvec bench`` has measured and saved, and defaults that say where they are from.

Rates of backbones are in FLOP/s, so that one backbone's can stand for another's of about its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from taskvec.core.compute import processor
from taskvec.core.errors import TaskvecError
from taskvec.core.files import Record, disk_errors, fingerprint, read_record, write_json
from taskvec.core.machine import cores, gpus
from taskvec.core.notes import note
from taskvec.engine.pipeline import versions
from taskvec.study.forecast.model_cost import ModelCost
from taskvec.study.forecast.sizes import BACKWARD, NUMBER, UNKNOWN, Key

FOLDER = "rates"
"""The folder of a store that holds saved rates, one file for each processor and version of torch."""
BATCH = 256
"""Images that pass forward at once."""


class HostRates(Record):
    """What a core does beside the device: seconds a step of a linear head, a photograph decoded, and a small image
    drawn; bytes a second that are written and hashed."""

    head_step: float
    photograph: float
    drawing: float
    disk: float


class BackboneRates(Record):
    """What was measured of a backbone: images a second forward and in training, seconds that opening it and beginning
    to train it take, and the precisions; ``flops`` are those of an image."""

    address: str
    size: int | None
    projection: bool | None
    flops: float
    forward: float
    trained: float
    opening: float
    beginning: float
    passes: str
    training: str

    @property
    def key(self) -> Key:
        """Return which backbone it is."""
        return self.address, self.size, self.projection


class Rates(Record):
    """What was measured on a device, when, by which torch, with how many workers at once."""

    version: Literal[1] = 1
    processor: str
    device: str
    torch: str
    workers: int
    when: str
    host: HostRates
    backbones: list[BackboneRates]

    @property
    def about(self) -> str:
        """Say where and when the rates were measured."""
        here = "" if {"torch": self.torch} == versions(["torch"]) else f", torch {self.torch}"
        several = f", {self.workers} workers at once" if self.workers > 1 else ""
        return f"measured on {self.processor}, {self.when}{several}{here}"


@dataclass(frozen=True)
class Pace:
    """How fast a device is with a backbone: FLOP/s forward and in training; seconds that a batch forward, an update, a
    training's beginning and opening the encoder take beside; and where these are from."""

    forward: float
    training: float
    batch: float
    update: float
    beginning: float
    opening: float
    source: str


@dataclass(frozen=True)
class Device:
    """A device: what its default rates are from, FLOP/s forward and in training, and seconds that a batch forward and
    an update take to launch; the cores beside it; and what was measured on it, where something was."""

    name: str
    about: str
    forward: float
    training: float
    batch: float
    update: float
    cores: int
    host: HostRates
    measured: Rates | None = None

    def pace(self, key: Key, cost: ModelCost) -> Pace:
        """Return the pace with a backbone: as measured, by FLOPs from the nearest that was measured, or the default."""
        opening = OPENING + NUMBER * cost.parameters / READING
        if self.measured is None or not self.measured.backbones:
            return Pace(self.forward, self.training, self.batch, self.update, 0.0, opening, "default")
        same = next((rates for rates in self.measured.backbones if rates.key == key), None)
        rates = same or min(self.measured.backbones, key=lambda rates: abs(math.log(rates.flops / cost.flops)))
        speed = rates.forward * rates.flops, rates.trained * BACKWARD * rates.flops
        if same:
            return Pace(*speed, 0.0, 0.0, rates.beginning, rates.opening, "measured")
        return Pace(*speed, 0.0, 0.0, rates.beginning, opening, f"by FLOPs from {rates.address}")


OPENING, READING = 0.02, 1.25e9
"""Seconds that making any encoder takes, and bytes a second that its weights are read at (benchmarks/opening.py)."""
CORE = HostRates(head_step=0.7e-3, photograph=10e-3, drawing=0.3e-3, disk=0.5e9)
"""A core of the lab's machine: an Intel Xeon with AVX-512 and AMX."""
CORES = 60e9, 72e9
"""FLOP/s of such a core with the lab's encoders, forward in float32 and in training: 51 and 75 in quickstart, 73 and 79
in lab-paper-small, whose seconds by kind of step are in tests/plan_truths.json."""
CORE_FLOPS = 45e9
"""FLOP/s of a core in matrix products of linear heads."""
BATCHED = CORE.model_copy(update={"head_step": 0.1e-3})
"""The same beside a GPU, which fits the heads of all rates as one problem."""
SEEN, TRAINED = 8969 * UNKNOWN.flops, 2610 * BACKWARD * UNKNOWN.flops
"""FLOP/s of bare loops with a ViT-B/16 at 224 px on an NVIDIA H200 (torch 2.11): forward in float16, training in
bfloat16."""
SEEN_SHARE, TRAINED_SHARE = 0.85, 0.90
"""The shares of bare loops that evaluation and fine-tuning are held to (docs/performance.md)."""
LAUNCHES = 3e-3, 8e-3
"""Seconds to launch a batch forward and an update: the floor of small models on a GPU. Assumed."""
H100, A100 = math.sqrt(3.35 / 4.8), math.sqrt(312 / 989 * 2.04 / 4.8)
"""Speeds against an H200 (SXM; NVIDIA's data sheets): the geometric mean of the ratios of dense tensor FLOP/s (989, 989
and 312 TFLOP/s) and of memory bandwidth (4.8, 3.35 and 2.04 TB/s)."""


def gpu_device(name: str, factor: float, about: str) -> Device:
    """Return a GPU that is by a factor as fast as the H200 that was measured."""
    speed = factor * SEEN * SEEN_SHARE, factor * TRAINED * TRAINED_SHARE
    return Device(name, about, *speed, *LAUNCHES, 16, BATCHED)


LOOPS = "85 % of a bare float16 loop and 90 % of a bare bfloat16 one, ViT-B/16, measured on an H200"
DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "h200": gpu_device("h200", 1.0, LOOPS),
        "h100": gpu_device("h100", H100, f"{LOOPS}, times {H100:.2f} by data sheets"),
        "a100": gpu_device("a100", A100, f"{LOOPS}, times {A100:.2f} by data sheets"),
        "cpu": Device(
            "cpu", "cores of an Intel Xeon with AVX-512 and AMX, by finished studies of the lab", *CORES, 0, 0, 1, CORE
        ),
    }
)
"""What is assumed where nothing was measured."""
HERE = "here"
"""The name of this machine's GPU, or its CPU where it has none."""


def find_device(name: str, folder: Path) -> Device:
    """Return a device by its name, with the rates of it that a store holds; ``here`` needs some."""
    every = saved(folder)
    if name == HERE:
        kind = "cuda" if gpus() else "cpu"
        rates = latest(rates for rates in every if rates.processor == processor(kind))
        if rates is None:
            raise TaskvecError(f"nothing was measured on {processor(kind)} yet", "run taskvec bench --save")
        here = DEVICES["cpu"] if kind == "cpu" else replace(DEVICES["h200"], cores=cores())
        return as_measured(replace(here, name=HERE), rates)
    if name == "cpu":
        return as_measured(DEVICES[name], latest(r for r in every if r.processor == processor("cpu")))
    model = name.upper()
    return as_measured(DEVICES[name], latest(r for r in every if model in r.processor.replace("-", " ").split()))


def as_measured(device: Device, rates: Rates | None) -> Device:
    """Return a device with what was measured on it and on the cores beside it; without rates as it is assumed."""
    return device if rates is None else replace(device, host=rates.host, measured=rates)


def latest(rates: Iterable[Rates]) -> Rates | None:
    """Return the rates by the torch that is installed, else the newest ones."""
    installed = versions(["torch"])["torch"]
    return max(rates, key=lambda each: (each.torch == installed, each.when), default=None)


def saved(store: Path) -> list[Rates]:
    """Return all rates that a store holds; what cannot be read is noted and left out."""
    every = []
    for path in sorted((store / FOLDER).glob("*.json")):
        try:
            every.append(read_record(path, Rates))
        except TaskvecError as error:
            note(f"saved rates are left out: {error.problem}; taskvec bench --save measures again")
    return every


def save_rates(rates: Rates, store: Path) -> Path:
    """Keep what was measured in a store, beside what was measured there before of other backbones; return the file."""
    path = store / FOLDER / f"{fingerprint([rates.processor, rates.device, rates.torch])}.json"
    measured = {each.key for each in rates.backbones}
    alike = [
        r for r in saved(store) if (r.processor, r.device, r.torch) == (rates.processor, rates.device, rates.torch)
    ]
    before: Sequence[BackboneRates] = [each for r in alike for each in r.backbones if each.key not in measured]
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, rates.model_copy(update={"backbones": [*before, *rates.backbones]}).model_dump(mode="json"))
    return path
