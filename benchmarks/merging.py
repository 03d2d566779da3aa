"""Merging files: wall time and anonymous memory of `taskvec merge` beside mergekit and FusionBench, imports included.

python benchmarks/merging.py                          # a base and 8 checkpoints of ViT-L size, and a language model
python benchmarks/merging.py --size b --tasks 4       # smaller
python benchmarks/merging.py --peers none             # taskvec alone; nothing is installed
python benchmarks/merging.py --study --tasks 20       # the step of a study, from encoders that it has fine-tuned

Random weights are written into a temporary folder (ViT-L: 12 GB) and removed afterwards. Peers are installed into
environments of their own, which see this one's torch, under --environments, a temporary folder by default. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

SIZES = {"b": (768, 12), "l": (1024, 24)}
PEERS = {"mergekit": "mergekit", "fusionbench": "fusion-bench"}
SCALE = 0.3
STEP = """
import sys
from pathlib import Path
from taskvec.study.steps.merging import MergeConfig, merge
method, out, *folders = sys.argv[1:]
base, *tuned = map(Path, folders)
merge.function(MergeConfig(method=method), {"backbone": base, "finetuned": tuned}, Path(out), lambda share: None)
"""
STUDY_BAR = "bar: anonymous memory <= 1 GiB beside the result, which is not held (tall_masks: itself and a bit a task)"
BARS = "bars: anonymous memory <= 0.25 GiB, wall time <= 1/3 of the faster peer's"
FUSIONBENCH = """
import sys
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.modelpool import BaseModelPool
from safetensors.torch import load_file, save_file
from torch import nn

def module(state):
    root = nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.register_parameter(leaf, nn.Parameter(tensor))
    return root

class Pool(BaseModelPool):
    def load_model(self, name, *args, **kwargs):
        return module(load_file(self.paths[name]))

base, *tuned, out = sys.argv[1:]
pool = Pool({"_pretrained_": None, **dict.fromkeys(tuned)})
pool.paths = {"_pretrained_": base, **{path: path for path in tuned}}
save_file(TaskArithmeticAlgorithm(0.3).run(pool).state_dict(), out)
"""


@dataclass(frozen=True)
class Cost:
    """Wall seconds and the peak of anonymous memory in GiB of a command and its children."""

    seconds: float
    gibibytes: float


def measure(command: list[str | Path], log: Path) -> Cost:
    """Run a command; what it prints is shown if it fails."""
    begin, peak = time.monotonic(), 0
    with log.open("w") as file, subprocess.Popen(list(map(str, command)), stdout=file, stderr=file) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(anonymous, family(process.pid))))
            time.sleep(0.01)
    if process.returncode:
        sys.exit(f"{command[0]} failed:\n{log.read_text()[-3000:]}")
    return Cost(time.monotonic() - begin, peak / 2**20)


def family(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    for child in children:
        yield from family(int(child))


def anonymous(pid: int) -> int:
    """Return a process's anonymous memory in KiB; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def vit(width: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a ViT with patches of 16 pixels at 224 pixels."""
    block = {
        "norm1.weight": (width,), "norm1.bias": (width,), "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "norm2.weight": (width,), "norm2.bias": (width,), "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,), "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    ends = {
        "cls_token": (1, 1, width), "pos_embed": (1, 197, width), "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    return ends | {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}


def write_vits(folder: Path, size: str, tasks: int) -> list[Path]:
    """Write a base and its fine-tuned checkpoints in float32."""
    rng, paths = np.random.default_rng(0), [folder / f"{name}.safetensors" for name in ("base", *range(tasks))]
    shapes = vit(*SIZES[size])
    base = {name: 0.02 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(base, paths[0], {"format": "pt"})
    for path in paths[1:]:
        moved = {name: value + 1e-3 * rng.standard_normal(value.shape, np.float32) for name, value in base.items()}
        save_file(moved, path, {"format": "pt"})
    return paths


def write_language_model(folder: Path, seed: int, shards: int = 4, layers: int = 5) -> Path:
    """Write 1 GiB of bfloat16 in shards with an index."""
    folder.mkdir()
    generator, places = torch.Generator().manual_seed(seed), {}
    for shard in range(shards):
        state = {
            f"model.layers.{shard * layers + i}.{name}.weight": 0.02
            * torch.randn(rows, 2048, generator=generator).bfloat16()
            for i in range(layers)
            for name, rows in (("self_attn.q_proj", 2048), ("mlp.up_proj", 5461), ("mlp.gate_proj", 5461))
        }
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_tensors(state, folder / name, {"format": "pt"})
        places |= dict.fromkeys(state, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def install(name: str, folder: Path) -> Path:
    """Make an environment with a peer in it, unless it is there; return its folder of commands."""
    place = folder / name
    if not (place / "installed").exists():
        print(f"installing {PEERS[name]} into {place}", flush=True)
        venv.create(place, with_pip=True)
        packages = next((place / "lib").glob("python*/site-packages"))
        (packages / "torch-of-the-caller.pth").write_text(sysconfig.get_path("purelib"))
        subprocess.run([place / "bin" / "pip", "install", "--quiet", PEERS[name]], check=True)
        (place / "installed").touch()
    return place / "bin"


def ours(paths: list[Path], out: Path, method: str, log: Path) -> Cost:
    """Measure our command, which overwrites nothing."""
    out.unlink(missing_ok=True)
    options = ["--method", method, "--scale", str(SCALE), "--out", out]
    return measure([sys.executable, "-m", "taskvec", "merge", *paths, *options], log)


def theirs(name: str, place: Path, paths: list[Path], folder: Path, method: str) -> list[str | Path]:
    """Return a peer's command; FusionBench has no ties over files here, so addition stands for it."""
    if name == "fusionbench":
        (folder / "fusionbench.py").write_text(FUSIONBENCH)
        return [place / "python", folder / "fusionbench.py", *paths, folder / "fusionbench.safetensors"]
    parameters = {"weight": SCALE} if method == "task_arithmetic" else {"weight": 1.0, "density": 0.2}
    config = {
        "merge_method": method, "base_model": str(paths[0]), "dtype": "float32",
        "models": [{"model": str(path), "parameters": parameters} for path in paths[1:]],
    }  # fmt: skip
    (folder / "mergekit.json").write_text(json.dumps(config))
    return [place / "mergekit-pytorch", folder / "mergekit.json", folder / "mergekit"]


def report(name: str, costs: list[Cost], against: Cost | None = None) -> Cost:
    """Print the median of some runs and, where there is something to compare with, both ratios."""
    cost = Cost(statistics.median(c.seconds for c in costs), max(c.gibibytes for c in costs))
    ratio = (
        ""
        if against is None
        else f"   x {cost.seconds / against.seconds:5.2f}   x {cost.gibibytes / against.gibibytes:5.2f}"
    )
    print(f"{name:<36} {cost.seconds:7.2f} s   {cost.gibibytes:6.3f} GiB{ratio}", flush=True)
    return cost


def agree(first: Path, second: Path) -> float:
    """Return the largest difference of two files over the largest number; NaN anywhere is NaN."""
    a, b = load_file(first), load_file(second)
    assert set(a) == set(b)
    found = [(a[name] - b[name]).abs().max() / a[name].abs().max().clamp(min=1e-30) for name in a]
    return float(torch.stack(found).max())


def compare(options: argparse.Namespace, folder: Path, places: dict[str, Path], paths: list[Path]) -> None:
    """Merge the ViTs by taskvec and by each peer."""
    size = paths[0].stat().st_size / 2**30
    print(f"ViT-{options.size.upper()}, a base and {options.tasks} checkpoints of {size:.2f} GiB; {BARS}")
    print("peers' ratios are to ours; load average", *(f"{load:.1f}" for load in os.getloadavg()))
    log = folder / "log"
    out = folder / "ours.safetensors"
    base = report("taskvec task_arithmetic", [ours(paths, out, "task_arithmetic", log) for _ in range(options.repeats)])
    for name, place in places.items():
        command = theirs(name, place, paths, folder, "task_arithmetic")
        report(f"{name} task_arithmetic", [measure(command, log) for _ in range(options.repeats)], base)
        found = (
            folder / "fusionbench.safetensors"
            if name == "fusionbench"
            else next((folder / "mergekit").glob("*.safetensors"))
        )
        if len(list((folder / "mergekit").glob("*.safetensors"))) < 2 or name == "fusionbench":
            print(f"  largest difference to ours, relative: {agree(out, found):.1e}")
        else:
            print("  it wrote several shards, which are not compared with ours")
    base = report("taskvec ties", [ours(paths, out, "ties", log) for _ in range(options.repeats)])
    if "mergekit" in places:
        command = theirs("mergekit", places["mergekit"], paths, folder, "ties")
        report("mergekit ties (per tensor)", [measure(command, log) for _ in range(options.repeats)], base)


def spectral(options: argparse.Namespace, folder: Path, paths: list[Path]) -> None:
    """Measure spectral methods against their bar; what torch takes by itself is measured on a model of nothing."""
    shapes = vit(*SIZES[options.size])
    largest = max(4 * shape[0] * shape[1] for shape in shapes.values() if len(shape) == 2) / 2**30
    tiny = [folder / "tiny" / f"{number}.safetensors" for number in range(2)]
    tiny[0].parent.mkdir()
    for number, path in enumerate(tiny):
        save_file({"blocks.0.weight": np.full((2, 2), 1.0 + number, np.float32)}, path)
    out, log = folder / "spectral.safetensors", folder / "log"
    for method in ("iso_c", "tsv_m"):
        alone = ours(tiny, out, method, log)
        found = report(f"taskvec {method}", [ours(paths, out, method, log)])
        share = (found.gibibytes - alone.gibibytes) / largest
        bar = 2 * options.tasks + 4
        print(f"  without torch's {alone.gibibytes:.3f} GiB: {share:.1f} x the largest matrix (bar: 2 T + 4 = {bar})")


def study(options: argparse.Namespace, folder: Path) -> None:
    """Measure a study's step. Every second task has the same file, so that a disk of some GB will do."""
    name = {"b": "vit_base_patch16_224", "l": "vit_large_patch16_224"}[options.size]
    view = {"size": 224, "crop": 1.0, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3, "squash": False}
    record = {"architecture": {"family": "timm", "options": {"name": name, "size": 224}}, "preprocessing": view}
    paths = write_vits(folder, options.size, min(2, options.tasks))
    folders = [folder / "encoders" / str(number) for number in range(options.tasks + 1)]
    for number, place in enumerate(folders):
        place.mkdir(parents=True)
        (place / "encoder.safetensors").symlink_to(paths[1 + number % (len(paths) - 1)] if number else paths[0])
        (place / "backbone.json").write_text(json.dumps(record))
    size = paths[0].stat().st_size / 2**30
    print(f"a study's step, ViT-{options.size.upper()}, {options.tasks} tasks of {size:.2f} GiB; {STUDY_BAR}")
    for method in options.methods:
        out = folder / method
        out.mkdir()
        command = [sys.executable, "-c", STEP, method, out, *folders]
        report(f"step merge, {method}", [measure(command, folder / "log")])
        shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="l")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), help=f"some of {', '.join(PEERS)}, or none")
    parser.add_argument("--environments", type=Path, help="a folder to keep the peers' environments in")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--study", action="store_true", help="measure a study's step alone")
    parser.add_argument("--methods", nargs="*", default=["task_arithmetic", "dare", "tall_masks"], help="of the step")
    options = parser.parse_args()
    if options.study:
        with TemporaryDirectory(dir=options.folder) as temporary:
            study(options, Path(temporary))
        return
    with TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        environments = options.environments or folder / "environments"
        places = {name: install(name, environments) for name in options.peers if name in PEERS}
        (folder / "vits").mkdir()
        paths = write_vits(folder / "vits", options.size, options.tasks)
        compare(options, folder / "vits", places, paths)
        spectral(options, folder / "vits", paths)
    with TemporaryDirectory(dir=options.folder) as temporary:
        models = [write_language_model(Path(temporary) / f"m{seed}", seed) for seed in range(3)]
        print("a language model of 1 GiB in four bfloat16 shards, and two fine-tuned from it")
        report(
            "taskvec task_arithmetic",
            [ours(models, Path(temporary) / "out", "task_arithmetic", Path(temporary) / "log")],
        )


if __name__ == "__main__":
    main()
