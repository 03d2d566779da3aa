"""Device, precision, threads and seeds of a computation, by fixed rules."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from taskvec.core.errors import TaskvecError
from taskvec.core.machine import gpu, gpus

Made = TypeVar("Made")
Precision = Literal["float32", "bfloat16"]
PassPrecision = Literal["float32", "tf32", "float16"]
"""Precision of passes that learn nothing: float32, with TF32 in matrix products, or float16 autocast."""
Use = Literal["training", "evaluation"]

WIDE = 128
"""Feature width from which bfloat16 pays off in training on a CPU with AMX tiles (benchmarks/precision.py)."""


def processor(device: str = "cpu") -> str:
    """Return the name of the processor that computes: another one may give other last digits, and so other choices.

    The instructions that torch uses follow the name, which alone may stand for many CPUs.
    """
    if chip := gpu(device):
        return chip.name
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    tiles = ", AMX" if has_fast_bfloat16() else ""
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}{tiles})"


def choose_device(setting: str = "auto") -> str:
    """Return ``cuda`` where there is one and ``cpu`` elsewhere, or the device asked for if it is usable."""
    if setting == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=setting)
    except (RuntimeError, AssertionError) as error:
        raise TaskvecError(
            f"device '{setting}' cannot be used: {error}".splitlines()[0], "use auto, cpu or cuda"
        ) from None
    return setting


def study_device(setting: str = "auto") -> str:
    """Return the device of a study's steps by what the GPUs' driver lists: whoever only plans opens no CUDA context."""
    if setting == "auto":
        return "cuda" if torch.backends.cuda.is_built() and gpus() else "cpu"
    if not setting.startswith("cuda"):
        return choose_device(setting)
    if not torch.backends.cuda.is_built():
        raise TaskvecError(f"device '{setting}' cannot be used: this torch is built without CUDA", "use auto or cpu")
    if gpu(setting) is None:
        names = ", ".join(chip.name for chip in gpus()) or "none"
        raise TaskvecError(f"device '{setting}' cannot be used: the GPUs here are {names}", "use auto, cpu or cuda")
    return setting


def choose_precision(setting: str, use: Use, width: int, device: str) -> Precision:
    """Return the precision for a use; evaluation, where scales are compared, is always float32.

    ``auto`` trains in bfloat16 on GPUs that have it, and on CPUs with AMX tiles when the encoder is at least ``WIDE``
    features wide. An explicit ``bfloat16`` is for training only: a move of 0.05 task vectors is below its resolution.
    """
    resolved = "float32" if use == "evaluation" else resolve_precision(setting, device)
    wide: Precision = "bfloat16" if width >= WIDE else "float32"
    return wide if resolved == "wide" else resolved


def resolve_precision(setting: str, device: str) -> Precision | Literal["wide"]:
    """Return the precision that a setting means on this machine; ``wide`` is bfloat16 from ``WIDE`` features on.

    The configuration of a step holds this and not ``auto``, so that its result does not depend on where it runs.
    """
    if setting in ("float32", "bfloat16", "wide"):
        return cast("Precision | Literal['wide']", setting)
    if device.startswith("cuda"):  # a plan for a GPU that is elsewhere takes it for one of this decade
        chip = gpu(device)
        return "bfloat16" if chip is None or chip.capability >= (8, 0) else "float32"
    return "wide" if has_fast_bfloat16() else "float32"


def has_fast_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices in hardware (AMX tiles)."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


@contextlib.contextmanager
def autocast(precision: Precision, device: str) -> Iterator[None]:
    """Run a block under autocast for bfloat16, and unchanged for float32.

    On a CPU it takes the plain attention: the fused one's backward pass is slow in bfloat16 (benchmarks/precision.py).
    """
    device_type = device.split(":")[0]
    with contextlib.ExitStack() as stack:
        if precision == "bfloat16":
            stack.enter_context(torch.autocast(device_type, torch.bfloat16))
            if device_type == "cpu":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads during a block; their number changes last bits, so fingerprints hold it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seeded(make: Callable[[], Made], seed: int) -> Made:
    """Return what ``make`` returns when random numbers come from ``seed``; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
