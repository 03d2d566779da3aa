"""Seconds and memory to open a kept encoder from a warm page cache, in a fresh process, on one thread.

    python benchmarks/opening.py            # a ViT-S/16
    python benchmarks/opening.py --vit-l    # a ViT-L/16, 1.2 GB

Beside it stands the floor, in the same process: one copy of the file's bytes into memory of one's own. Imports do not
count. Bar: a ViT-L under 1.5 s on a quiet core.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPEATS = 3


def keep(name: str, folder: Path) -> None:
    """Write an encoder with random weights as a study keeps it."""
    from taskvec.data.images import Preprocessing
    from taskvec.encoders import records
    from taskvec.encoders.backbone import assemble
    from taskvec.encoders.loaders import families

    architecture = {"family": "timm", "options": {"name": name, "size": 224}}
    backbone = assemble(name, families.build(architecture), Preprocessing(224), architecture, "cpu")
    records.write_backbone(backbone, folder)


def memory(field: str) -> float:
    """Return a number of this process's memory in MB: VmHWM is the most that was resident, RssAnon its own now."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match.group(1)) / 1e3 if match else float("nan")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of the wall and of the CPU that something takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(folder: Path) -> dict[str, float]:
    """Open the encoder once, when all is imported, and copy its file once."""
    import timm
    import torch

    from taskvec.core.files import file_digest
    from taskvec.encoders import records
    from taskvec.encoders.backbone import Backbone

    torch.set_num_threads(1)
    timm.create_model("test_vit", pretrained=False, num_classes=0)
    path = folder / "encoder.safetensors"
    file_digest(path)  # brings the file into the page cache
    most, own = memory("VmHWM"), memory("RssAnon")
    opened: list[Backbone] = []
    wall, cpu = timed(lambda: opened.append(records.read_backbone(folder)))
    own, most = memory("RssAnon") - own, memory("VmHWM") - most
    size = path.stat().st_size // 4
    floor, _ = timed(lambda: torch.from_file(str(path), shared=False, size=size).clone())
    return {"wall": wall, "cpu": cpu, "floor": floor, "own": own, "most": most, "megabytes": path.stat().st_size / 1e6}


def main() -> None:
    """Keep an encoder, open it in processes of their own, and print the best of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vit-l", action="store_true", help="a ViT-L/16 in place of a ViT-S/16")
    parser.add_argument("--folder", type=Path, help="open what lies here, and print JSON")
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(measure(options.folder)))
        return
    name = "vit_large_patch16_224" if options.vit_l else "vit_small_patch16_224"
    with tempfile.TemporaryDirectory() as temporary:
        written = timed(lambda: keep(name, Path(temporary)))
        size = (Path(temporary) / "encoder.safetensors").stat().st_size / 1e6
        command = [sys.executable, __file__, "--folder", temporary]
        one = {**os.environ, "OMP_NUM_THREADS": "1"}
        runs = [json.loads(subprocess.check_output(command, env=one)) for _ in range(REPEATS)]
    best = min(runs, key=lambda run: run["wall"])
    print(f"{name}, {size:.0f} MB: made and written in {written[0]:.2f} s")
    print(
        f"opened in {best['wall']:.2f} s (CPU {best['cpu']:.2f} s), {best['wall'] / best['floor']:.1f} times one copy"
    )
    print(f"memory: {best['own']:.0f} MB of its own, at most {best['most']:.0f} MB resident with what is mapped")


if __name__ == "__main__":
    main()
