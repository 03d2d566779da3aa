"""Merges of a study read encoders from files and write directions there: the bits of memory, in little of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from taskvec.command.weight_files import choose_merge_device
from taskvec.core.errors import TaskvecError
from taskvec.encoders import records
from taskvec.encoders.backbone import Backbone, load_backbone
from taskvec.merging import in_memory
from taskvec.merging.directions import laid_out, write_direction, write_transformed
from taskvec.merging.in_memory import Buffers, Collected
from taskvec.merging.on_disk import Streams, stream
from taskvec.merging.registry import METHODS, Recipe, find_recipe
from taskvec.weights import vectors
from taskvec.weights.flat import Weights, pack, save
from taskvec.weights.reader import Checkpoint

SHAPES = {
    "patch_embed.proj.weight": (4, 3, 2, 2), "pos_embed": (1, 5, 4), "blocks.0.norm.weight": (4,),
    "blocks.0.fc.weight": (6, 4), "blocks.1.fc.weight": (4, 6), "blocks.1.square": (3, 3), "bn.running_var": (4,),
    "scale": (), "nothing": (0, 3),
}  # fmt: skip
QUICK: dict[str, dict[str, Any]] = {"wudi": {"steps": 3}}
RECIPES = [*METHODS, "lines+dare+ties", "breadcrumbs+emr", "dare+tsv_m", "lines+slerp", "dare+fisher", "lines+regmean"]


def state(seed: int) -> dict[str, Tensor]:
    """Return a state with a tied tensor, integers, batch norm, an empty tensor and a scalar."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["bn.running_var"] = made["bn.running_var"].abs()
    made["head.tied"] = made["blocks.0.fc.weight"]
    return made | {"bn.num_batches_tracked": torch.tensor(7)}


def sums(recipe: Recipe, base: Weights, tasks: int) -> dict[str, Tensor]:
    """Make up what the last method of a recipe would have measured of every entry."""
    generator, made = torch.Generator().manual_seed(1), dict[str, Tensor]()
    for entry, _ in Buffers(base, [base]):
        shape, name = entry.base.shape, recipe.last.name
        if name == "fisher":
            made[entry.name] = torch.rand((2, *shape), generator=generator) + 0.1
        if name == "regmean" and entry.kind == "matrix":
            inputs = torch.randn(9, entry.base[0].numel(), generator=generator).double()
            made[entry.name] = torch.cat([torch.randn(len(entry.base), inputs.shape[1]).double(), inputs.mT @ inputs])
        if name == "adamerging":
            made[entry.name] = torch.rand(tasks, generator=generator)
    return made


@contextmanager
def opened(folder: Path, base: Weights, tuned: list[Weights]) -> Iterator[Callable[..., Streams]]:
    """Keep encoders in files, and make their entries for a recipe."""
    with ExitStack() as stack:
        paths = [folder / f"encoder-{place}.safetensors" for place in range(len(tuned) + 1)]
        for weights, path in zip([base, *tuned], paths, strict=True):
            save(weights, path)
        first, *others = [stack.enter_context(Checkpoint(path)) for path in paths]
        matched = laid_out(base.layout, first, others)
        yield lambda recipe, **options: Streams.of(recipe, first, others, matched, seed=3, **options)


@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 1000), tasks=st.integers(1, 5), size=st.integers(1, 60))
def test_streamed_merges_have_the_bits_of_those_in_memory(
    tmp_path_factory: pytest.TempPathFactory, name: str, seed: int, tasks: int, size: int
) -> None:
    recipe, folder = find_recipe(name, QUICK.get(name)), tmp_path_factory.mktemp("merge")
    base = pack(state(seed))
    tuned = [pack(state(seed + 1 + task)) for task in range(recipe.last.tasks or tasks)]
    known = sums(recipe, base, len(tuned))
    memory = Buffers(base, [vectors.subtract(weights, base) for weights in tuned], 3, known)
    with opened(folder, base, tuned) as streams:
        entries = streams(recipe, slice=size * len(tuned), statistics=known)
        if recipe.per_task:
            collected = Collected(base.with_flat(torch.zeros_like(base.flat)), len(tuned))
            stream(recipe, entries, collected.take)
            result, wanted = collected.directions(), in_memory.task_directions(recipe, memory)
            assert torch.equal(result.masks, wanted.masks) and result.names == wanted.names
            assert torch.allclose(result.rescales, wanted.rescales, rtol=1e-6, atol=0)  # sums of float64, sliced
            assert torch.equal(result.shared.flat, wanted.shared.flat)
        else:
            write_direction(recipe, entries, folder / "direction.safetensors")
            save(in_memory.direction(recipe, memory), folder / "wanted.safetensors")
            assert (folder / "direction.safetensors").read_bytes() == (folder / "wanted.safetensors").read_bytes()


def test_transformed_vectors_are_written_as_they_are_in_memory(tmp_path: Path) -> None:
    base, tuned = pack(state(0)), [pack(state(seed)) for seed in (1, 2, 3)]
    recipe = find_recipe("lines+dare+fisher", {"drop": 0.5})
    with opened(tmp_path, base, tuned) as streams:
        paths = write_transformed(recipe.transforms, streams(recipe.transforms, slice=9), tmp_path)
    rows = dict.fromkeys(range(3), torch.zeros(0))
    taus = [vectors.subtract(weights, base) for weights in tuned]
    for task, path in enumerate(paths):
        written = records.read_weights(path, base)
        alone = find_recipe("lines+dare", {"drop": 0.5, "alpha": 1 / 3})
        others = [tau if place == task else tau.with_flat(tau.flat * 0) for place, tau in enumerate(taus)]
        rows[task] = written.flat
        assert torch.equal(written.flat, in_memory.direction(alone, Buffers(base, others, 3)).flat)
        assert int(written["bn.num_batches_tracked"]) == 7
    assert len({tuple(row.tolist()) for row in rows.values()}) == 3


def test_files_of_another_layout_are_named(tmp_path: Path) -> None:
    base = pack(state(0))
    other = pack({name: tensor for name, tensor in state(1).items() if name != "pos_embed"})
    with pytest.raises(TaskvecError, match=r"encoder-1.*is missing pos_embed"), opened(tmp_path, base, [other]):
        pass


def test_what_is_not_finite_is_named_and_no_option_is_advised_that_a_study_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskvec.weights.flat.check_finite", lambda *_: None)  # which save does not let through
    base, tuned = pack(state(0)), pack(state(1))
    tuned["blocks.1.square"][0, 0] = torch.inf
    with opened(tmp_path, base, [tuned]) as streams, pytest.raises(TaskvecError, match="blocks.1.square") as raised:
        write_direction(find_recipe("ties"), streams(find_recipe("ties"), excludable=False), tmp_path / "out")
    assert "encoder-1" in str(raised.value) and "--exclude" not in str(raised.value)


def test_a_direction_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    base, tuned = pack(state(0)), pack(state(1))
    tuned["scale"].fill_(2e38)
    recipe = find_recipe("lines+dare", {"alpha": 10, "drop": 0.0})
    with opened(tmp_path, base, [tuned]) as streams, pytest.raises(TaskvecError, match="'scale' of the result holds"):
        write_direction(recipe, streams(recipe), tmp_path / "out")


@pytest.mark.parametrize("address", ["lab:random", "lab:contrastive"])
def test_a_layout_is_that_of_the_backbone(tmp_path: Path, address: str) -> None:
    backbone: Backbone = load_backbone(address, device="cpu")
    records.write_backbone(backbone, tmp_path)
    assert records.read_layout(tmp_path) == backbone.pretrained.layout


@pytest.mark.parametrize(
    ("method", "setting", "device"),
    [
        ("task_arithmetic", "auto", "cpu"),
        ("tsv_m", "auto", "cuda"),
        ("lines+wudi", "auto", "cuda"),
        ("tsv_m", "cpu", "cpu"),
    ],
)
def test_files_are_merged_on_a_gpu_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, method: str, setting: str, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_merge_device(find_recipe(method), setting) == device


PEAK = """
import resource, sys
from pathlib import Path
import torch
from taskvec.merging.directions import laid_out, write_direction
from taskvec.merging.on_disk import Streams
from taskvec.merging.registry import find_recipe
from taskvec.weights.flat import pack
from taskvec.weights.reader import Checkpoint
folder, tasks, *names = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
files = [Checkpoint(folder / "base.safetensors"), *[Checkpoint(folder / "tuned.safetensors") for _ in range(tasks)]]
layout = pack({name: torch.empty(t.shape, device="meta") for name, t in files[0].tensors.items()}).layout
matched, before = laid_out(layout, files[0], files[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for recipe in map(find_recipe, names):
    write_direction(recipe, Streams.of(recipe, files[0], files[1:], matched), folder / recipe.name)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux alone")
def test_elementwise_merges_of_twenty_tasks_take_a_fixed_memory(tmp_path: Path) -> None:
    """Of a model of 8 MiB the vectors (160 MiB) are not held; the memory does not grow with a model's size."""
    generator = torch.Generator().manual_seed(0)
    base = {f"blocks.{place}.weight": torch.randn(1024, 1024, generator=generator) for place in range(2)}
    save(pack(base), tmp_path / "base.safetensors")
    save(pack({key: value + 0.01 for key, value in base.items()}), tmp_path / "tuned.safetensors")
    names = ["task_arithmetic", "dare"]
    command = [sys.executable, "-c", PEAK, str(tmp_path), "20", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 48 * 2**10, done.stdout  # KiB
    merged = load_file(tmp_path / "task_arithmetic")
    assert all(torch.allclose(merged[key], torch.tensor(0.2), atol=1e-4) for key in base)
