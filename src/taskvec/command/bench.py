"""``taskvec bench``: how fast this machine is with a study's backbones, as a table and for ``taskvec plan``."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from taskvec.core.compute import processor, study_device
from taskvec.core.errors import TaskvecError
from taskvec.core.formatting import bytes_text
from taskvec.core.machine import gpus_of
from taskvec.core.notes import note, some
from taskvec.core.settings import Finetune
from taskvec.encoders.addresses import parse
from taskvec.engine.pipeline import versions
from taskvec.engine.store import Store
from taskvec.study.forecast.bench import BenchConfig, measured
from taskvec.study.forecast.model_cost import ModelCost, architecture, model_cost
from taskvec.study.forecast.rates import BackboneRates, HostRates, Rates
from taskvec.study.forecast.sizes import Key
from taskvec.study.forecast.workers import cpu_workers
from taskvec.study.schema import StudyFile

LAB, BASE, LARGE = "lab:supervised", "timm:vit_base_patch16_224", "timm:vit_large_patch16_224"
"""What is measured where no study is given; the large one on GPUs only."""
LIMIT = 120.0
"""Seconds after which no further backbone is begun."""
PASSES = 5
"""About how many measured times a backbone takes."""
SHORTEST, LONGEST = 0.5, 4.0
"""Seconds of one measured time, at least and at most."""


def measure(
    file: StudyFile | None, device: str, store: Store, workers: int | None, say: Callable[[str], None]
) -> Rates:
    """Measure this machine with the backbones of a study, those of one shape once; ``say`` is told what begins."""
    kind = study_device(device)
    chips = gpus_of(kind)
    groups = list(grouped(backbones(file, bool(chips))))
    configs = [config_of(keys[0], kind, file, len(groups)) for keys, _ in groups]
    workers = 1 if chips else workers or cpu_workers(file.study.threads if file else 1)
    names = [some([key[0] for key in keys]) for keys, _ in groups]
    results = in_time(measured(configs, store, workers, chips[0].id if chips else None), names, processor(kind), say)
    return Rates(
        processor=processor(kind),
        device=kind.partition(":")[0],
        torch=versions(["torch"])["torch"],
        workers=workers,
        when=datetime.now(UTC).date().isoformat(),
        host=HostRates(**results[-1]["host"]),
        backbones=[rates for group, result in zip(groups, results, strict=False) for rates in rates_of(*group, result)],
    )


def config_of(key: Key, device: str, file: StudyFile | None, count: int) -> BenchConfig:
    """Return how one of so many backbones is measured, with batches of the study's size."""
    tune, seconds = file.study.finetune if file else Finetune(), LIMIT / PASSES / count
    return BenchConfig(
        **named(key),
        device=device.partition(":")[0],
        batch=tune.batch_size // tune.accumulate,
        seconds=min(LONGEST, max(SHORTEST, seconds)),
    )


def named(key: Key) -> dict[str, Any]:
    """Return the fields of a backbone's key by name."""
    return dict(zip(("address", "size", "projection"), key, strict=True))


def rates_of(keys: Sequence[Key], cost: ModelCost, result: Mapping[str, Any]) -> list[BackboneRates]:
    """Return what was measured of one backbone, for all of its shape."""
    return [BackboneRates(**named(key), flops=cost.flops, **result["backbone"]) for key in keys]


def in_time(
    results: Generator[dict[str, Any]], names: list[str], place: str, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return what is measured before the time is over, at least of one backbone; the others are noted."""
    start, every = time.monotonic(), list[dict[str, Any]]()
    with contextlib.closing(results):
        for number, name in enumerate(names, 1):
            if every and time.monotonic() - start > LIMIT:
                note(f"not measured, for time: {some(names[number - 1 :])}")
                break
            say(f"[{number}/{len(names)}] {name} on {place}")
            every.append(next(results))
    return every


def backbones(file: StudyFile | None, large: bool) -> list[Key]:
    """Return the backbones to measure: a study's, or the usual ones."""
    if file is not None:
        choices = file.study.backbones
        return [(str(parse(choice.address, file.folder)), choice.size, choice.projection) for choice in choices]
    addresses = [LAB, *usual(large)]
    return [(address, None, None) for address in addresses]


def usual(large: bool) -> list[str]:
    """Return the usual transformers, where their library is installed."""
    return [BASE, LARGE][: 1 + large] if importlib.util.find_spec("timm") else []


def grouped(keys: Sequence[Key]) -> Iterator[tuple[list[Key], ModelCost]]:
    """Yield backbones of one shape together, with what they cost; of a shape that no file tells, the usual ones."""
    groups: dict[tuple[float, int, int, int], tuple[list[Key], ModelCost]] = {}
    missing = []
    for key in keys:
        try:
            architecture(*key)
        except (TaskvecError, OSError):
            missing.append(key[0])
            continue
        if cost := model_cost(*key):
            groups.setdefault((cost.flops, cost.parameters, cost.width, cost.size), ([], cost))[0].append(key)
    yield from groups.values()
    if missing:
        note(f"{some(missing)}: not on this machine, so a ViT-B/16 and a ViT-L/16 are measured in their place")
        yield from grouped([(address, None, None) for address in usual(True)])


def lines(rates: Rates) -> Iterator[str]:
    """Yield the table of what was measured."""
    yield rates.about
    yield ""
    yield f"{'backbone':<36}{'images/s':>12}{'trained/s':>12}{'begin':>9}{'open':>9}"
    for each in rates.backbones:
        figures = f"{each.forward:>12,.1f}{each.trained:>12,.1f}{each.beginning:>7.2f} s{each.opening:>7.2f} s"
        yield f"{each.address:<36}{figures}  {each.passes}, {each.training}"
    host = rates.host
    yield ""
    yield f"linear heads {1 / host.head_step:,.0f} steps/s; photographs {1 / host.photograph:,.0f}/s a core"
    yield f"drawn images {1 / host.drawing:,.0f}/s a core; files {bytes_text(host.disk)}/s"
