"""What this machine offers a process, asked without torch: its cores, and its GPUs without opening CUDA."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SHARING = "TASKVEC_WORKERS_OF_GPU"
"""The variable by which a worker process is told how many workers its GPU has."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""The variable by which CUDA is told which GPUs a process has, and in which order."""
FIELDS = "index,uuid,name,memory.total,compute_cap,mig.mode.current"
"""What nvidia-smi is asked of every GPU; memory is in MiB."""
NODES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Where drivers of GPUs stand on Linux: NVIDIA's own, in WSL, and AMD's."""
PATIENCE = 60
"""Seconds that nvidia-smi, or a child process which opens CUDA, has to answer."""
CHILD = """
import json, torch
every = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
print(json.dumps([[p.name, p.total_memory, [p.major, p.minor]] for p in every]))
"""


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_of_gpu() -> int:
    """Return how many worker processes share this one's GPU, itself included; 1 where nobody says so."""
    return int(os.environ.get(SHARING, "1"))


@dataclass(frozen=True)
class Gpu:
    """A GPU: what chooses it in ``CUDA_VISIBLE_DEVICES``, its model, memory in bytes, and compute capability."""

    id: str
    name: str
    memory: float
    capability: tuple[int, int]


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA shows to this process, in its order; this process opens no CUDA context.

    nvidia-smi tells of them; where it does not, or they are divided (MIG), a short child process asks CUDA.
    """
    return _gpus(os.environ.get(VISIBLE), os.environ.get("PATH", ""))


def gpu(device: str) -> Gpu | None:
    """Return the GPU of a device such as ``cuda`` or ``cuda:1``; None where there is none, or the device is another."""
    kind, _, place = device.partition(":")
    index = int(place or 0)
    return gpus()[index] if kind == "cuda" and index < len(gpus()) else None


def gpus_of(device: str) -> tuple[Gpu, ...]:
    """Return the GPUs on which the steps of a study run: all for ``cuda``, one for ``cuda:1``, none for the others."""
    if device == "cuda":
        return gpus()
    chip = gpu(device)
    return () if chip is None else (chip,)


@functools.cache
def _gpus(chosen: str | None, path: str) -> tuple[Gpu, ...]:
    listed = None if "MIG-" in (chosen or "") else from_driver()
    return from_child(chosen) if listed is None else visible(listed, chosen)


def from_driver() -> list[Gpu] | None:
    """Return all GPUs that nvidia-smi lists, by their UUIDs; None where it does not tell, or some are divided."""
    if shutil.which("nvidia-smi") is None:
        return None
    lines = answer(["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"])
    rows = [[cell.strip() for cell in line.split(",")] for line in (lines or "").splitlines() if line.strip()]
    if any(len(row) != len(FIELDS.split(",")) or row[-1] == "Enabled" for row in rows) or lines is None:
        return None
    try:
        rows.sort(key=lambda row: int(row[0]))
        return [Gpu(uuid, name, float(size) * 2**20, version(cap)) for _, uuid, name, size, cap, _ in rows]
    except ValueError:  # [N/A], of an old driver
        return None


def version(text: str) -> tuple[int, int]:
    """Return the two numbers of a compute capability such as 9.0."""
    major, minor = map(int, text.split("."))
    return major, minor


def visible(listed: Sequence[Gpu], chosen: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that the user's ``CUDA_VISIBLE_DEVICES`` shows, under the user's names for them; all if unset.

    As in CUDA, a number is a place, anything else the beginning of a UUID; what names none ends the list, and a list
    with a GPU twice shows none.
    """
    if chosen is None:
        return tuple(listed)
    shown: dict[str, Gpu] = {}
    for name in (part.strip() for part in chosen.split(",")):
        matches = [chip for place, chip in enumerate(listed) if is_named(name, place, chip.id)]
        if len(matches) != 1:
            break
        if matches[0].id in shown:
            return ()
        shown[matches[0].id] = replace(matches[0], id=name)
    return tuple(shown.values())


def is_named(name: str, place: int, uuid: str) -> bool:
    """Say whether a name of ``CUDA_VISIBLE_DEVICES`` means the GPU at a place with a UUID."""
    return int(name) == place if re.fullmatch(r"\d+", name) else bool(name) and uuid.startswith(name)


def from_child(chosen: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA shows to a child process, under the user's names for them or their numbers."""
    if sys.platform == "linux" and not any(Path(node).exists() for node in NODES):
        return ()
    lines = answer([sys.executable, "-P", "-c", CHILD])
    try:
        rows = json.loads((lines or "").strip().splitlines()[-1])
    except (ValueError, IndexError):
        return ()
    names = [part.strip() for part in chosen.split(",")] if chosen else [str(place) for place in range(len(rows))]
    return tuple(Gpu(id, name, size, (cap[0], cap[1])) for id, (name, size, cap) in zip(names, rows, strict=False))


def answer(command: Sequence[str]) -> str | None:
    """Return what a command prints; None where it cannot be run, fails or does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
