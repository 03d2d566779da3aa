"""Device, precision, threads and seeds of a computation, by fixed rules."""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeVar, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from taskvec.core.errors import TaskvecError
from taskvec.core.machine import gpu, gpus

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products repeat their bits; cuBLAS reads it once
Made = TypeVar("Made")
Precision = Literal["float32", "bfloat16"]
PassPrecision = Literal["float32", "tf32", "float16"]
"""Precision of passes that learn nothing: float32, with TF32 in products and convolutions, or float16 autocast."""
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""The type that autocast computes in, by the precision that asks for it."""
Use = Literal["training", "evaluation"]

Wide = Literal["wide", "wider"]
"""Bfloat16 for encoders of many features, float32 for others: what ``auto`` means on CPUs that multiply in bfloat16."""
WIDTHS: Mapping[str, int] = MappingProxyType({"wide": 128, "wider": 384})
"""Features from which bfloat16 pays off in training on a CPU (benchmarks/precision.py).

``wide`` is for Intel's AMX tiles, ``wider`` for AMD's AVX512-BF16.
"""


def processor(device: str = "cpu") -> str:
    """Return the name of the processor that computes: another one may give other last digits, and so other choices.

    The instructions that torch uses follow the name, which alone may stand for many CPUs.
    """
    if chip := gpu(device):
        return chip.name
    name = cpu_fact("model name") or platform.processor() or platform.machine()
    tiles = ", AMX" if has_tiles() else ""
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}{tiles})"


def cpu_fact(name: str) -> str:
    """Return what Linux says of the first CPU under a name, such as ``flags``; nothing elsewhere."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")
    return ""


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

    ``auto`` trains in bfloat16 on GPUs that have it, and on CPUs that gain from it (``wide_bfloat16``) when the encoder
    has at least as many features as ``WIDTHS`` says. An explicit ``bfloat16`` is for training only: a move of 0.05 task
    vectors is below its resolution.
    """
    resolved = "float32" if use == "evaluation" else resolve_precision(setting, device)
    if resolved == "wide" or resolved == "wider":
        return "bfloat16" if width >= WIDTHS[resolved] else "float32"
    return resolved


def resolve_precision(setting: str, device: str) -> Precision | Wide:
    """Return the precision that a setting means on this machine.

    The configuration of a step holds this and not ``auto``, so that its result does not depend on where it runs.
    """
    if setting in ("float32", "bfloat16", *WIDTHS):
        return cast("Precision | Wide", setting)
    if device.startswith("cuda"):  # a plan for a GPU that is elsewhere takes it for one of this decade
        chip = gpu(device)
        return "bfloat16" if chip is None or chip.capability >= (8, 0) else "float32"
    return wide_bfloat16() or "float32"


def wide_bfloat16() -> Wide | None:
    """Return from how many features on this CPU trains faster in bfloat16, by a name of ``WIDTHS``, or None.

    AVX512-BF16 alone pays on AMD's CPUs (Zen 4 and later), which multiply twice as many numbers in bfloat16 as in
    float32. Intel's start half as many of these instructions, and gain nothing.
    """
    if has_tiles():
        return "wide"
    amd = cpu_fact("vendor_id") == "AuthenticAMD" and "avx512_bf16" in cpu_fact("flags").split()
    return "wider" if amd else None


def has_tiles() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices in AMX tiles."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


@contextlib.contextmanager
def autocast(precision: Precision | PassPrecision, device: str, cache: bool = True) -> Iterator[None]:
    """Run a block under autocast for bfloat16 and float16, and unchanged for float32 and TF32 (see ``arithmetic``).

    With the ``cache``, a parameter that asks for gradients is cast once in the outermost block, where it must not move;
    but not under ``torch.inference_mode``, where autocast remembers nothing.
    On a CPU it takes the plain attention: the fused one's backward pass is slow in bfloat16 (benchmarks/precision.py).
    """
    device_type = device.split(":")[0]
    with contextlib.ExitStack() as stack:
        if precision in AUTOCAST:
            stack.enter_context(torch.autocast(device_type, AUTOCAST[precision], cache_enabled=cache))
            if device_type == "cpu":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextlib.contextmanager
def arithmetic(precision: PassPrecision = "float32", device: str = "cuda") -> Iterator[None]:
    """Set both TF32 switches of CUDA explicitly for a block, and put them back: on for ``tf32``, off for all else.

    By default torch multiplies matrices in float32, but lets convolutions of cuDNN use TF32. The switches are those of
    the process: threads that compute on a GPU at the same time have to agree. A CPU has none, and nothing is set.
    """
    before, wanted = switches(), ("tf32" if precision == "tf32" else "ieee",) * 2
    if not device.startswith("cuda") or before == wanted:
        yield
        return
    set_switches(wanted)
    try:
        yield
    finally:
        set_switches(before)


def uses_tf32(precision: str) -> dict[str, bool]:
    """Return how both switches stand while numbers of a precision are computed on a GPU, as the lock records it."""
    return dict.fromkeys(("matmul", "convolutions"), precision == "tf32")


def switches() -> tuple[str, str]:
    """Return how CUDA multiplies float32 matrices and convolves float32 images: ``tf32``, or as ``ieee`` says.

    ``none`` is torch's word for a switch that nobody has set. Reading the older switches fails where someone has set
    the newer ones, so these are read where torch has them (2.9).
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision, cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return ("ieee", "tf32")[matmul.allow_tf32], ("ieee", "tf32")[cudnn.allow_tf32]


def set_switches(values: tuple[str, str]) -> None:
    """Set how CUDA multiplies and convolves in float32.

    The older switches come first: they set the newer ones too, so that both agree for who reads either (torch.compile
    reads the older until 2.13), but leave open what the newer ones say explicitly. From 2.9 on they are deprecated.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use the new API settings to control TF32", UserWarning)
        matmul.allow_tf32, cudnn.allow_tf32 = (value == "tf32" for value in values)
    if hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = values[0]
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = values[1]  # type: ignore[attr-defined]


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
