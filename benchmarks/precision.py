"""Training in bfloat16 and with plain attention against float32: ratios of CPU seconds a step, within one run.

python benchmarks/precision.py [timm:NAME@FILE --size PIXELS]
"""

from __future__ import annotations

import argparse
import itertools
import time
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import taskvec as tv
from taskvec.core import compute


def seconds_a_step(backbone: tv.Backbone, task: tv.Task, precision: str, backend: SDPBackend, steps: int) -> float:
    """Return CPU seconds a fine-tuning step of 64 images with a precision and a kind of attention."""
    head = tv.fit_head(backbone, task, tv.Probe(steps=2, warmup=0))
    settings = tv.Finetune(steps=steps, batch_size=64, warmup=0)
    with patch.object(compute, "sdpa_kernel", lambda _: sdpa_kernel(backend)), sdpa_kernel(backend):
        begin = time.process_time()
        tv.finetune(backbone, task, head, settings, precision=precision)
        return (time.process_time() - begin) / steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backbone", nargs="?", default="lab:supervised")
    parser.add_argument("--size", type=int)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    backbone = tv.load_backbone(options.backbone, size=options.size, device="cpu")
    task = tv.load_task("lab:signs", backbone.preprocessing, limit=256)
    kinds = list(itertools.product(("float32", "bfloat16"), (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)))
    for kind in kinds:
        seconds_a_step(backbone, task, *kind, 1)
    times = {kind: seconds_a_step(backbone, task, *kind, options.steps) for kind in kinds}
    base = times[kinds[0]]
    print(f"{options.backbone}, width {backbone.width}; AMX tiles: {compute.has_fast_bfloat16()}")
    for (precision, backend), value in times.items():
        name = "fused" if backend == SDPBackend.FLASH_ATTENTION else "plain"
        print(f"{precision:9} {name} attention: {value / base:.2f} x float32 with fused attention")


if __name__ == "__main__":
    main()
