"""Merges on a GPU: what every method makes, and measures, is what it is on the CPU, and the same twice.

Elementwise methods compute in float32 and give the CPU's bits or nearly so. Spectral methods compute in float64, so
that float32's rounding is all that differs; tolerances are relative to the largest number of an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tasks import write_folder_task
from torch import Tensor

from taskvec.core.compute import arithmetic
from taskvec.core.progress import no_progress
from taskvec.data.tasks import load_task
from taskvec.encoders.backbone import load_backbone
from taskvec.encoders.records import write_backbone
from taskvec.learning import heads
from taskvec.merging import in_memory
from taskvec.merging.directions import laid_out, write_direction
from taskvec.merging.entries import Data
from taskvec.merging.methods import measuring
from taskvec.merging.on_disk import Streams
from taskvec.merging.registry import METHODS, Recipe, find_recipe
from taskvec.study.steps.merging import MergeConfig, merge
from taskvec.weights import vectors
from taskvec.weights.flat import Weights, distinct, pack, read, save
from taskvec.weights.reader import Checkpoint

pytestmark = pytest.mark.cuda
DEVICE, TASKS = "cuda", 4
TOLERANCE = {"wudi": 1e-4, "regmean": 1e-4, "pcb": 1e-4}
"""Adam divides by the size of gradients, regmean solves an equation, pcb stretches the top of its scores to 0 to 1."""
USUAL = 2e-5
QUICK: dict[str, dict[str, Any]] = {"wudi": {"steps": 20}}
MEASURED = {"fisher": {"examples": 8}, "regmean": {"examples": 40}, "adamerging": {"steps": 3, "learning_rate": 0.01}}
SHAPES = {
    "patch_embed.proj.weight": (96, 3, 4, 4), "pos_embed": (1, 17, 96), "norm.bias": (96,), "scale": (),
    **{f"blocks.{i}.mlp.fc1.weight": (192, 96) for i in range(2)},
    **{f"blocks.{i}.mlp.fc2.weight": (96, 192) for i in range(2)},
    "blocks.1.attn.proj.weight": (96, 96), "blocks.1.norm.weight": (96,),
}  # fmt: skip


def model(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return pack({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})


def made_up(recipe: Recipe, base: Weights) -> dict[str, Tensor]:
    """Make up what the last method would have measured of every entry."""
    generator, made, name = torch.Generator().manual_seed(1), dict[str, Tensor](), recipe.last.name
    for entry, _ in in_memory.Buffers(base, [base]):
        shape = entry.base.shape
        if name == "fisher":
            made[entry.name] = torch.rand((2, *shape), generator=generator) + 0.1
        if name == "regmean" and entry.kind == "matrix":
            inputs = torch.randn(500, entry.base[0].numel(), generator=generator).double()
            made[entry.name] = torch.cat([entry.base.flatten(1).double(), inputs.mT @ inputs])
        if name == "adamerging":
            made[entry.name] = torch.rand(TASKS, generator=generator)
    return made


@contextmanager
def streamed(folder: Path, tasks: int) -> Iterator[tuple[Weights, Callable[..., Streams]]]:
    """Keep encoders in files, and make their entries for a recipe."""
    with ExitStack() as stack:
        models = [model(seed) for seed in range(tasks + 1)]
        paths = [folder / f"{place}.safetensors" for place in range(len(models))]
        for weights, path in zip(models, paths, strict=True):
            save(weights, path)
        first, *others = [stack.enter_context(Checkpoint(path)) for path in paths]
        matched = laid_out(models[0].layout, first, others)
        yield models[0], lambda recipe, **options: Streams.of(recipe, first, others, matched, seed=3, **options)


def close(result: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((result - wanted).abs().max() <= tolerance * wanted.abs().max()) if wanted.numel() else True


@pytest.mark.parametrize(
    "name", [*(name for name, method in METHODS.items() if method.role != "per-task"), "dare+tsv_m"]
)
def test_every_method_gives_what_it_does_on_the_cpu_and_the_same_twice(tmp_path: Path, name: str) -> None:
    recipe = find_recipe(name, QUICK.get(name))
    with streamed(tmp_path, recipe.last.tasks or TASKS) as (base, streams), arithmetic("float32", DEVICE):
        known = made_up(recipe, base)
        for number, device in enumerate(("cpu", DEVICE, DEVICE)):
            on_device = {key: value.to(device) for key, value in known.items()}
            write_direction(recipe, streams(recipe, device=device, statistics=on_device), tmp_path / f"out{number}")
    wanted, result, again = (read(tmp_path / f"out{number}") for number in range(3))
    for key, tensor in wanted.items():
        assert close(result[key], tensor, TOLERANCE.get(recipe.last.name, USUAL)), key
        assert torch.equal(result[key], again[key]), key


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.role == "per-task"])
def test_per_task_methods_give_in_memory_what_they_do_on_the_cpu(name: str) -> None:
    models = [model(seed) for seed in range(TASKS + 1)]
    results = []
    for device in ("cpu", DEVICE, DEVICE):
        base, *tuned = [weights.with_flat(weights.flat.to(device)) for weights in models]
        entries = in_memory.Buffers(base, [vectors.subtract(weights, base) for weights in tuned])
        made = in_memory.task_directions(find_recipe(name), entries)
        results.append(torch.stack([made.of(task).flat.cpu() for task in range(TASKS)]))
    assert close(results[1], results[0], USUAL)
    assert torch.equal(results[1], results[2])


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Data]:
    """Give the same random task vectors of a vision transformer, tasks and heads on both devices."""
    root, made = tmp_path_factory.mktemp("tasks"), dict[str, Data]()
    write_folder_task(root / "one")
    write_folder_task(root / "two", ("red", "blue"), train=15, test=6)
    for device in ("cpu", DEVICE):
        backbone = load_backbone("lab:random", device=device)
        tasks = [load_task(f"folder:{root / name}", backbone.preprocessing) for name in ("one", "two")]
        pre, generator = backbone.pretrained, torch.Generator().manual_seed(0)
        taus = [0.02 * torch.randn(pre.flat.shape, generator=generator) for _ in tasks]
        own = [heads.random_head(backbone.width, len(task.classes), 0).on(device) for task in tasks]
        made[device] = Data(backbone, [pre.with_flat(tau.to(device)) for tau in taus], tasks, own)
    return made


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.measure])
def test_every_methods_measure_is_that_of_the_cpu_and_the_same_twice(ground: dict[str, Data], name: str) -> None:
    recipe = find_recipe(name, MEASURED[name])
    with arithmetic("float32", DEVICE):
        wanted, result, again = (in_memory.measure(recipe, ground[device]) for device in ("cpu", DEVICE, DEVICE))
    assert wanted.keys() == result.keys()
    for key, tensor in wanted.items():
        moved = result[key].cpu()
        assert torch.equal(result[key], again[key]), key
        if name == "adamerging":  # Adam divides by the size of gradients: of a few coefficients that is rounding
            assert float((moved - tensor).abs().max()) <= 2 * 3 * 0.01
        else:
            assert close(moved, tensor, 1e-3), key


def test_the_gradient_of_adamergings_coefficients_is_that_of_the_cpu(ground: dict[str, Data]) -> None:
    rows = []
    for data in (ground["cpu"], ground[DEVICE]):
        slots, images = distinct(data.backbone.pretrained), [task.train.images[:4] for task in data.tasks]
        with arithmetic("float32", DEVICE), data.backbone.at():
            measuring.write_merged(data, slots, torch.full((len(slots), 2), 0.3))
            rows.append(measuring.gradients(data, slots, images))
    assert close(rows[1], rows[0], 1e-3)


@pytest.mark.parametrize("name", ["task_arithmetic", "dare+iso_c", "wudi", "emr"])
def test_a_studys_step_merges_there(ground: dict[str, Data], tmp_path: Path, name: str) -> None:
    data, outs = ground["cpu"], []
    folders = [tmp_path / "backbone", *(tmp_path / str(task) for task in range(len(data.vectors)))]
    for folder in folders:
        folder.mkdir()
    write_backbone(data.backbone, folders[0])
    for folder, vector in zip(folders[1:], data.vectors, strict=True):
        save(vectors.add(data.backbone.pretrained, vector), folder / "encoder.safetensors")
    for number, device in enumerate(("cpu", DEVICE, DEVICE)):
        outs.append(tmp_path / f"out{number}")
        outs[-1].mkdir()
        config = MergeConfig(method=name, seed=0, device=device, config=QUICK.get(name))
        merge.function(config, {"backbone": folders[0], "finetuned": folders[1:]}, outs[-1], no_progress)
    for path in outs[0].glob("*.safetensors"):
        wanted, result, again = (read(out / path.name) for out in outs)
        for key, tensor in wanted.items():
            assert close(result[key].float(), tensor.float(), 1e-4), key
            assert torch.equal(result[key], again[key]), key
