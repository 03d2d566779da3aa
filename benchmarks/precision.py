"""Training in bfloat16 and with plain attention against float32: ratios of CPU seconds a step, within one run.

    python benchmarks/precision.py [timm:NAME@FILE --size PIXELS]
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import taskvec as tv
from taskvec import compute


def seconds_a_step(backbone: tv.Backbone, task: tv.Task, precision: str, plain: bool, steps: int) -> float:
    """Return CPU seconds a fine-tuning step of 64 images; float32 with plain attention is the odd one out."""
    head = tv.fit_head(backbone, task, tv.Probe(steps=2, warmup=0))
    settings = tv.Finetune(steps=steps, batch_size=64, warmup=0)
    backend = SDPBackend.MATH if plain else SDPBackend.FLASH_ATTENTION
    chosen, compute.sdpa_kernel = compute.sdpa_kernel, lambda _: sdpa_kernel(backend)
    try:
        with sdpa_kernel(backend):
            begin = time.process_time()
            tv.finetune(backbone, task, head, settings, precision=precision)
            return (time.process_time() - begin) / steps
    finally:
        compute.sdpa_kernel = chosen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backbone", nargs="?", default="lab:supervised")
    parser.add_argument("--size", type=int)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    backbone = tv.load_backbone(options.backbone, size=options.size, device="cpu")
    task = tv.load_task("lab:signs", backbone.preprocessing, limit=256)
    kinds = [(p, plain) for p in ("float32", "bfloat16") for plain in (False, True)]
    for p, plain in kinds:
        seconds_a_step(backbone, task, p, plain, 1)
    times = {kind: seconds_a_step(backbone, task, *kind, options.steps) for kind in kinds}
    base = times["float32", False]
    print(f"{options.backbone}, width {backbone.width}; AMX tiles: {compute.has_fast_bfloat16()}")
    for (precision, plain), value in times.items():
        print(f"{precision:9} {'plain' if plain else 'fused'} attention: {value / base:.2f} x float32 with fused attention")


if __name__ == "__main__":
    main()
