"""Steps that tell, starve and crash, for workers that import nothing else."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from taskvec.core.errors import TaskvecError
from taskvec.core.notes import note
from taskvec.engine.pipeline import Config, step_type


class Telling(Config):
    value: str = "1"
    fail: bool = False
    kind: str = ""


@step_type(1)
def tell(config: Telling, inputs: Any, out: Path, progress: Any) -> None:
    """Tell in every way there is, some of it twice."""
    quiet = logging.getLogger("some.library")
    quiet.propagate = False  # as transformers' and datasets' loggers
    for _ in range(2):
        note("odd classes")
        warnings.warn("odd values", UserWarning, stacklevel=1)
        quiet.warning("odd %s", "weights")
        logging.getLogger("PIL.Image").error("odd header")
    quiet.info("loaded")
    warnings.warn("soon gone", DeprecationWarning, stacklevel=1)
    print("printed by Python", file=sys.stderr)
    os.write(2, b"written by C\n")
    (out / "n.txt").write_text(config.value)
    if config.fail:
        raise TaskvecError("the step failed", "mend it")


@step_type(1)
def starve(config: Telling, inputs: Any, out: Path, progress: Any) -> None:
    if config.kind == "cpu":
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.") if config.kind == "cuda" else MemoryError


@step_type(1)
def lack(config: Telling, inputs: Any, out: Path, progress: Any) -> None:
    importlib.import_module("no_such_module")


@step_type(1)
def crash(config: Telling, inputs: Any, out: Path, progress: Any) -> None:
    raise ZeroDivisionError("a fault of ours")


@step_type(1)
def surroundings(config: Telling, inputs: Any, out: Path, progress: Any) -> None:
    """Keep what a worker's environment says of its GPU."""
    names = ("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "TASKVEC_WORKERS_OF_GPU")
    (out / "environment.json").write_text(json.dumps([os.environ.get(name) for name in names]))
