"""The table of a CPU: every bar that a CPU is held to, how a study grows, and quickstart; ``make bench``.

python benchmarks/cpu.py [--skip PART ...] [--json FILE]

Under twenty minutes on two quiet cores. Nothing is downloaded: encoders but the lab's have random weights. What needs
other libraries' environments (benchmarks/merging.py, benchmarks/parity.py) or long simulations (benchmarks/racing.py,
benchmarks/sampling.py) is run by name.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bars
import merging
import opening
import scaling
import scheduler
import timm
import torch
from table import Row, about, save, show

import taskvec as tv
from taskvec.data.images import Preprocessing
from taskvec.encoders.backbone import assemble
from taskvec.engine.executors import Inline

SIZE, IMAGES = 112, 96
MISTAKES = {
    "--help": ["--help"],
    "an unknown option": ["run", "quickstart", "--no-such-option"],
    "a study that is not there": ["run", "no-such-study.yaml"],
    "an unknown method": ["merge", "base", "one", "--method", "no-such-method", "--out", "merged"],
}
"""What has to be answered at once, without torch."""


def steps() -> Iterator[Row]:
    """Yield what steps of a study cost over the least that they could, with a ViT-S at 112 px on one thread."""
    torch.set_num_threads(1)
    module = timm.create_model("vit_small_patch16_224", img_size=SIZE, num_classes=0)
    backbone = assemble("vit-s", module, Preprocessing(SIZE), {}, "cpu")
    yield from bars.ratios(backbone, tv.load_task("lab:signs", backbone.preprocessing, limit=IMAGES))
    yield Row("moving a ViT-B/16 to another lambda on 2 threads", bars.moving(2), "<= 0.05", unit="s")
    torch.set_num_threads(1)


def answers() -> Iterator[Row]:
    """Yield the wall seconds of what is answered at once."""
    for name, arguments in MISTAKES.items():
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-m", "taskvec", *arguments], capture_output=True, check=False)
            times.append(time.perf_counter() - begin)
        yield Row(f"taskvec answers {name}", min(times), "<= 1", unit="s")


def parent() -> Iterator[Row]:
    """Yield the CPU seconds of the scheduler for 5,000 steps that do nothing, performed in the same process."""
    scheduler.seconds(1, Inline(), Path(tempfile.mkdtemp()))  # imports
    with tempfile.TemporaryDirectory() as store:
        yield Row("5,000 steps that do nothing", scheduler.seconds(5000, Inline(), Path(store)), "<= 5", unit="CPU s")


def opened() -> Iterator[Row]:
    """Yield the seconds to open a kept ViT-L/16 at 224 px, on one thread, over one copy of its file."""
    with tempfile.TemporaryDirectory() as folder:
        opening.keep("vit_large_patch16_224", Path(folder))
        command = [sys.executable, opening.__file__, "--folder", folder]
        one = {**os.environ, "OMP_NUM_THREADS": "1"}
        runs = [json.loads(subprocess.check_output(command, env=one)) for _ in range(opening.REPEATS)]
    best = min(runs, key=lambda run: run["wall"])
    yield Row("opening a kept ViT-L/16 from a warm page cache", best["wall"], "<= 1.5", unit="s")
    yield Row("the same over one copy of its file", best["wall"] / best["floor"])
    yield Row("memory of its own, over the file", best["own"] / best["megabytes"])


def merged() -> Iterator[Row]:
    """Yield seconds and anonymous memory of merges of four ViT-B, by the command and as a study's step."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = merging.write_vits(folder, "b", 4)
        for method in ("task_arithmetic", "ties", "tsv_m"):
            cost = merging.ours(paths, folder / "merged.safetensors", method, folder / "log")
            bar = "<= 0.25" if method == "task_arithmetic" else ""
            yield Row(f"taskvec merge, 4 ViT-B by {method}", cost.seconds, unit="s")
            yield Row(f"the same, anonymous memory with torch, by {method}", cost.gibibytes, bar, unit="GiB")


def quickstart() -> Iterator[Row]:
    """Yield the wall and CPU seconds of the packaged study quickstart in a fresh store."""
    with tempfile.TemporaryDirectory() as place:
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        command = [sys.executable, "-m", "taskvec", "run", "quickstart"]
        subprocess.run(
            [*command, "--out", f"{place}/out", "--store", f"{place}/store"], capture_output=True, check=True
        )
        took = time.perf_counter() - begin
        yield Row("quickstart", took, unit="s")
        cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        yield Row("quickstart, CPU seconds of all processes", cpu, unit="CPU s")


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "steps": steps,
    "answers": answers,
    "parent": parent,
    "opening": opened,
    "merging": merged,
    "scaling": scaling.rows,
    "quickstart": quickstart,
}


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS, help="parts to leave out")
    parser.add_argument("--json", type=Path, help="a file to write")
    options = parser.parse_args()
    begin, rows = time.perf_counter(), list[Row]()
    machine = about()
    print(f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}")
    for name, measure in PARTS.items():
        rows += show(measure() if name not in options.skip else ())
    print(f"{time.perf_counter() - begin:.0f} s")
    if options.json:
        save(rows, options.json)


if __name__ == "__main__":
    main()
