"""How the seconds of a study's steps grow with its tasks, images and encoder, each with the exponent of a power law.

python benchmarks/scaling.py [--most-tasks 32]

Every point is a whole study of small image folders in a fresh store, on one thread; figures and the program's start do
not count. The exponent is the slope of a straight line through the logarithms: 1 is proportional.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import timm
from PIL import Image
from safetensors.torch import save_file
from table import Row, show
from truths import taken

TASKS, IMAGES = (2, 4, 8, 16, 32), (25, 100, 400)
ENCODERS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
STUDY = """
name: scaling
backbones: [{{address: "{backbone}"{size}}}]
tasks: [{tasks}]
heads: [kept]
heatmap: {{pairs: 1, points: 3, samples: 64}}
probe: {{steps: 50, warmup: 5}}
finetune: {{steps: {steps}, warmup: 2, batch_size: 32}}
precision: float32
"""


def write_task(folder: Path, images: int, seed: int) -> Path:
    """Write a task of four classes of coloured noise, so many images each, and return its folder."""
    generator = np.random.default_rng(seed)
    colours = generator.integers(60, 196, (4, 1, 1, 3))
    for label, colour in enumerate(colours):
        place = folder / f"class-{label}"
        place.mkdir(parents=True)
        for index in range(images):
            pixels = (colour + generator.integers(-60, 60, (32, 32, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{index:04}.png")
    return folder


def step_seconds(folder: Path, tasks: Sequence[Path], backbone: str, steps: int = 5, size: int = 0) -> float:
    """Return the seconds of all steps of a study, which one worker runs one after the other."""
    listed = ", ".join(f'"folder:{task}"' for task in tasks)
    given = f", size: {size}" if size else ""
    study = folder / "study.yaml"
    study.write_text(STUDY.format(backbone=backbone, tasks=listed, steps=steps, size=given))
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "taskvec", "run", str(study), "--workers", "1"]
        command += ["--out", f"{place}/out", "--store", f"{place}/store"]
        subprocess.run(command, check=True, capture_output=True)
        return sum(kind["seconds"] for kind in taken(Path(place) / "store").values())


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the slope of the logarithm of seconds over that of sizes."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def curve(what: str, sizes: Sequence[float], seconds: Sequence[float]) -> Iterator[Row]:
    """Yield a row for every point, and one for the exponent."""
    for size, value in zip(sizes, seconds, strict=True):
        yield Row(f"seconds with {size:,g} {what}", value, unit="s")
    yield Row(f"exponent of the seconds in {what}", exponent(sizes, seconds))


def rows(most: int = max(TASKS)) -> Iterator[Row]:
    """Yield the scaling in tasks, images and parameters."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        counts = [count for count in TASKS if count <= most]
        tasks = [write_task(folder / f"task-{place}", 25, place) for place in range(max(counts))]
        yield from curve("tasks", counts, [step_seconds(folder, tasks[:n], "lab:supervised") for n in counts])
        seconds = []
        for count in IMAGES:
            pair = [write_task(folder / f"images-{count}-{place}", count, place) for place in range(2)]
            seconds.append(step_seconds(folder, pair, "lab:supervised"))
        yield from curve("images a task", [4 * count for count in IMAGES], seconds)
        parameters, seconds = [], []
        for name in ENCODERS:
            module = timm.create_model(name)
            save_file(module.state_dict(), folder / f"{name}.safetensors")
            parameters.append(float(sum(value.numel() for value in module.parameters())))
            seconds.append(step_seconds(folder, tasks[:2], f"timm:{name}@{folder}/{name}.safetensors", 4, 64))
        yield from curve("parameters", parameters, seconds)


def main() -> None:
    """Print a line for every point and exponent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--most-tasks", type=int, default=max(TASKS))
    show(rows(parser.parse_args().most_tasks))


if __name__ == "__main__":
    main()
