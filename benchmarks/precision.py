"""Training in bfloat16 and with plain attention against float32: ratios of CPU seconds a step, within one run.

python benchmarks/precision.py [ADDRESS [--size PIXELS] | --widths 64 128 256 384 768]
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python benchmarks/precision.py ...    on a CPU with AMX, as on one without

Widths are those of the lab's transformers with random weights (64 patches). Kinds of training take turns, and the
quickest turn of each counts, so that other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import taskvec as tv
from taskvec.core import compute
from taskvec.data.images import Preprocessing
from taskvec.encoders.backbone import assemble
from taskvec.lab.vit import VisionTransformer

BACKENDS = {"fused": SDPBackend.FLASH_ATTENTION, "plain": SDPBackend.MATH}
KINDS = list(itertools.product(("float32", "bfloat16"), BACKENDS))


def seconds_a_step(backbone: tv.Backbone, task: tv.Task, precision: str, attention: str, steps: int) -> float:
    """Return CPU seconds a fine-tuning step of 64 images with a precision and a kind of attention."""
    head = tv.fit_head(backbone, task, tv.Probe(steps=2, warmup=0))
    settings, backend = tv.Finetune(steps=steps, batch_size=64, warmup=0), BACKENDS[attention]
    with patch.object(compute, "sdpa_kernel", lambda _: sdpa_kernel(backend)), sdpa_kernel(backend):
        begin = time.process_time()
        tv.finetune(backbone, task, head, settings, precision=precision)
        return (time.process_time() - begin) / steps


def random_encoder(width: int) -> tv.Backbone:
    """Return a transformer of the lab with random weights, two blocks deep."""
    torch.manual_seed(0)
    module = VisionTransformer(size=64, width=width, depth=2, heads=max(1, width // 64))
    return assemble(f"random {width}", module, Preprocessing(size=64), {}, "cpu")


def measure(backbone: tv.Backbone, steps: int, turns: int) -> None:
    """Print how long a step of each kind takes, over that in float32 with fused attention."""
    task = tv.load_task("lab:signs", backbone.preprocessing, limit=256)
    for kind in KINDS:
        seconds_a_step(backbone, task, *kind, 1)
    times = {kind: [seconds_a_step(backbone, task, *kind, steps)] for kind in KINDS}
    for kind in KINDS * (turns - 1):
        times[kind].append(seconds_a_step(backbone, task, *kind, steps))
    base = min(times[KINDS[0]])
    ratios = ", ".join(f"{' '.join(kind)} {min(values) / base:.2f}" for kind, values in times.items())
    print(f"{backbone.name}, width {backbone.width}: {ratios} ({base:.3f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backbone", nargs="?", default="lab:supervised")
    parser.add_argument("--size", type=int)
    parser.add_argument("--widths", type=int, nargs="+", default=())
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "none")
    print(f"{compute.processor()}; limit of oneDNN: {limit}; CPU seconds a step over float32 with fused attention")
    encoders = [random_encoder(width) for width in options.widths]
    for backbone in encoders or [tv.load_backbone(options.backbone, size=options.size, device="cpu")]:
        measure(backbone, options.steps, options.turns)


if __name__ == "__main__":
    main()
