"""Merging and comparing files: equal to the same in memory, in little of it, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.command import loads_torch, taskvec
from helpers.safetensors_files import TORCH, write, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from taskvec.command.cli import app, excluded
from taskvec.command.weight_files import Merge, check_out, compare, parse_settings, parse_size
from taskvec.command.weight_files import write as write_tables
from taskvec.core.errors import TaskvecError
from taskvec.core.notes import listen
from taskvec.merging import in_memory as buffers
from taskvec.merging import registry as merging
from taskvec.merging.differences import in_order, layer_of
from taskvec.merging.entries import Masked
from taskvec.merging.matching import match
from taskvec.merging.on_disk import Streams, Target, merge_files
from taskvec.merging.registry import METHODS, Method, find_recipe, register
from taskvec.weights import vectors
from taskvec.weights.flat import pack
from taskvec.weights.reader import Checkpoint, labels

State = dict[str, torch.Tensor]
shapes = st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1, max_size=5)
dtypes = st.sampled_from(sorted(TORCH))


def random_state(shape_list: list[tuple[int, ...]], seed: int, kinds: list[torch.dtype], size: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"t{i}": (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(kinds[i % len(kinds)])
        for i, shape in enumerate(shape_list)
    }
    for tensor in state.values():
        if tensor.numel() > 1:
            tensor.view(-1)[:2] = torch.tensor([-0.0, torch.finfo(tensor.dtype).tiny / 2])
    return state | {"steps": torch.tensor(seed), "mask": torch.tensor([True, False, True])}


def expected(base: State, tuned: list[State], scale: float) -> State:
    """Merge in memory, tensor by tensor, by the rule of the documentation."""
    out = dict(base)
    for name, tensor in base.items():
        if tensor.is_floating_point():
            wide = tensor if tensor.dtype == torch.float64 else tensor.float()
            taus = [(one[name].to(torch.promote_types(wide.dtype, one[name].dtype)) - wide).float() for one in tuned]
            total = taus[0]
            for tau in taus[1:]:
                total = total + tau
            out[name] = (total.to(wide.dtype) * scale + wide).to(tensor.dtype)
    return out


def merged(
    folder: Path, base: State, tuned: list[State], scale: float, slice: int, method: str = "task_arithmetic"
) -> State:
    paths = [write(folder / f"{i}.safetensors", state, {"format": "pt"}) for i, state in enumerate([base, *tuned])]
    recipe = find_recipe(method)
    opened = [Checkpoint(path) for path in paths]
    streams = Streams(
        opened[0], opened[1:], match(opened[0], opened[1:]), not recipe.elementwise, not recipe.arrays, slice=slice
    )
    merge_files(recipe, streams, scale, Target(folder / "out.safetensors"))
    for one in opened:
        one.close()
    return load_file(folder / "out.safetensors")


def assert_equal(found: State, wanted: State) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name


def bits(state: State) -> dict[str, bytes]:
    """Return the bytes of tensors, in which -0 is not 0."""
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


# ---------------------------------------------------------------- laws


@settings(max_examples=40, deadline=None)
@given(
    shapes,
    st.integers(1, 3),
    st.lists(dtypes, min_size=1, max_size=3),
    dtypes,
    st.integers(1, 40),
    st.floats(-2, 2, width=32),
)
def test_files_are_merged_as_in_memory_whatever_the_slices(
    shape_list: list[tuple[int, ...]], tasks: int, kinds: list[str], other: str, slice: int, scale: float
) -> None:
    base = random_state(shape_list, 0, [TORCH[kind] for kind in kinds])
    tuned = [random_state(shape_list, 1 + task, [TORCH[other], TORCH["F32"]]) for task in range(tasks)]
    with TemporaryDirectory() as folder:
        found = merged(Path(folder), base, tuned, scale, slice)
        assert sorted(path.name for path in Path(folder).iterdir()) == sorted(
            [*(f"{i}.safetensors" for i in range(tasks + 1)), "out.safetensors"]
        )
    assert_equal(found, expected(base, tuned, scale))


@settings(max_examples=15, deadline=None)
@given(shapes, st.lists(dtypes, min_size=1, max_size=3), st.floats(-2, 2, width=32))
def test_scale_zero_and_no_change_give_the_base_bit_for_bit(
    shape_list: list[tuple[int, ...]], kinds: list[str], scale: float
) -> None:
    base = random_state(shape_list, 0, [TORCH[kind] for kind in kinds])
    tuned = random_state(shape_list, 1, [torch.float32])
    with TemporaryDirectory() as folder:
        assert bits(merged(Path(folder), base, [tuned], 0.0, 7)) == bits(base)
        assert bits(merged(Path(folder), base, [base, base], scale, 7)) == bits(base)


@pytest.mark.parametrize(
    "name",
    [
        "task_arithmetic",
        "average",
        "ties",
        "magmax",
        "consensus",
        "pcb",
        "tsv_m",
        "iso_c",
        "breadcrumbs+della",
        "lines+dare+ties",
    ],
)
@settings(max_examples=4, deadline=None)
@given(shapes, st.integers(1, 3), st.floats(-2, 2, width=32))
def test_files_and_buffers_agree(name: str, shape_list: list[tuple[int, ...]], tasks: int, scale: float) -> None:
    states = [random_state(shape_list, seed, [torch.float32]) for seed in range(tasks + 1)]
    base, *tuned = [{f"blocks.0.{key}": tensor for key, tensor in one.items()} for one in states]
    pre = pack(base)
    taus = [vectors.subtract(pack(one), pre) for one in tuned]
    want = vectors.add(pre, buffers.direction(find_recipe(name), buffers.Buffers(pre, taus)), scale)
    with TemporaryDirectory() as folder:
        found = merged(Path(folder), base, tuned, scale, 5, name)
    for key, tensor in want.state().items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.elementwise])
def test_threads_do_not_change_a_bit(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if METHODS[name].measure:
        pytest.skip("needs more than files")
    generator = torch.Generator().manual_seed(0)
    state = {f"blocks.{i}.weight": torch.randn(50, 60, generator=generator) for i in range(3)}
    tuned = [{key: value + torch.randn(50, 60, generator=generator) for key, value in state.items()} for _ in range(2)]
    paths = [write(tmp_path / f"m{i}.safetensors", each) for i, each in enumerate([state, *tuned])]
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr("taskvec.merging.on_disk.THREADS", threads)
        out = tmp_path / f"threads{threads}"
        with ExitStack() as stack:
            base, *others = [stack.enter_context(Checkpoint(path)) for path in paths]
            recipe = find_recipe(name)
            streams = Streams(base, others, match(base, others), tensors=not recipe.arrays, slice=500)
            merge_files(recipe, streams, 0.5, Target(out))
        found.append({path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))})
    assert found[0]
    assert found[0] == found[1] == found[2]


def test_several_threads_say_what_one_would(tmp_path: Path) -> None:
    """Slices are merged in any order; of two diverged tensors the message names the file's first, every time."""
    base = {f"blocks.{i}.weight": torch.zeros(64) for i in range(20)}
    tuned = {name: torch.ones(64) for name in base}
    for name in ("blocks.6.weight", "blocks.19.weight"):
        tuned[name] = torch.full((64,), torch.nan)
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(TaskvecError, match=r"'blocks\.19\.weight' holds NaN"):
            merged(folder, base, [tuned], 1.0, 5)
        assert not (folder / "out.safetensors").exists()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.measure])
@pytest.mark.parametrize("stored", ["twice", "once", "mixed"])
def test_tied_weights_stay_tied_and_are_merged_as_in_memory(tmp_path: Path, name: str, stored: str) -> None:
    shapes = {"blocks.0.fc.weight": (6, 6), "lm_head.weight": (6, 4), "tok_embed.weight": (6, 4), "norm.weight": (4,)}
    states = [{key: torch.randn(shape) for key, shape in shapes.items()} for _ in range(3)]
    for state in states:
        state["lm_head.weight"] = state["tok_embed.weight"].clone()
    written = [dict(state) for state in states]
    for state in {"twice": [], "once": written, "mixed": written[1:2]}[stored]:
        del state["lm_head.weight"]
    paths = [write(tmp_path / f"{i}.safetensors", state) for i, state in enumerate(written)]
    recipe = find_recipe(name, {"steps": 3} if name == "wudi" else {})
    out = tmp_path / ("out" if recipe.per_task else "out.safetensors")
    lines = Merge(paths[0], paths[1:], out, 0.7, name, [f"steps={3}"] if name == "wudi" else []).run()
    assert any("lm_head.weight = tok_embed.weight" in line for line in lines) == (stored != "once")
    packed = [pack(state | {"lm_head.weight": state["tok_embed.weight"]}) for state in map(table_first, states)]
    entries = buffers.Buffers(packed[0], [vectors.subtract(one, packed[0]) for one in packed[1:]])
    if recipe.per_task:
        wanted = {f"{task + 1}": buffers.task_directions(recipe, entries).of(task) for task in range(2)}
    else:
        wanted = {"": buffers.direction(recipe, entries)}
    for task, direction in wanted.items():
        found = load_file(out / f"{task}.safetensors" if task else out)
        for key, tensor in vectors.add(packed[0], direction, 0.7).state().items():
            if key in found:
                torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)
        assert stored == "once" or torch.equal(found["lm_head.weight"], found["tok_embed.weight"])


def table_first(state: State) -> State:
    """Return a state in the order of a module, with the table before the head that is tied to it."""
    return {"tok_embed.weight": state["tok_embed.weight"]} | state


@pytest.fixture
def whole_method() -> Iterator[str]:
    """Register a method from outside that needs whole tensors, and notes their shapes."""

    def middle(found: torch.Tensor, part: Any, config: Any) -> torch.Tensor:
        assert found.shape[1:] == part.base.shape
        return found.reshape(len(found), -1).cumsum(1).mean(0).view(found.shape[1:])

    register(Method("middle", middle, "a test", "none"))
    yield "middle"
    del METHODS["middle"]


def test_methods_that_are_not_elementwise_get_whole_tensors(tmp_path: Path, whole_method: str) -> None:
    shape_list = [(3, 4), (5,), (), (2, 1, 3, 2)]
    base, one, two = (random_state(shape_list, seed, [torch.float32]) for seed in range(3))
    found = merged(tmp_path, base, [one, two], 0.5, 3, whole_method)
    for i in range(len(shape_list)):
        taus = torch.stack([state[f"t{i}"] - base[f"t{i}"] for state in (one, two)])
        want = base[f"t{i}"] + 0.5 * taus.reshape(len(taus), -1).cumsum(1).mean(0).view(base[f"t{i}"].shape)
        torch.testing.assert_close(found[f"t{i}"], want)


@pytest.fixture
def task_method() -> Iterator[str]:
    """Register a per-task method: each task moves where its vector is positive, by twice the sum."""

    def positive(found: torch.Tensor, part: Any, config: Any) -> Masked:
        return Masked(found.sum(0), found > 0, torch.full((len(found),), 2.0))

    register(Method("positive", positive, "a test", "none", role="per-task", elementwise=True))
    yield "positive"
    del METHODS["positive"]


@pytest.mark.parametrize("sharded", [False, True])
def test_per_task_methods_write_one_model_a_task(tmp_path: Path, task_method: str, sharded: bool) -> None:
    states = [random_state([(3, 4), (5,)], seed, [torch.float32]) for seed in range(3)]
    paths = [
        write(tmp_path / name / "model.safetensors", one) for name, one in zip(["base", "a", "b"], states, strict=True)
    ]
    lines = Merge(paths[0], paths[1:], tmp_path / "out", 0.5, task_method, shard_size="60B" if sharded else None).run()
    assert lines[-2:] == [str(tmp_path / "out" / ("a" if sharded else "a.safetensors")), lines[-1]]
    for task, name in enumerate("ab"):
        found = loaded(tmp_path / "out" / (name if sharded else f"{name}.safetensors"))
        taus = torch.stack([one["t0"] - states[0]["t0"] for one in states[1:]])
        torch.testing.assert_close(found["t0"], states[0]["t0"] + taus.sum(0) * (taus[task] > 0))
        assert int(found["steps"]) == 0
    with pytest.raises(TaskvecError, match="need a folder"):
        Merge(paths[0], paths[1:], tmp_path / "one.safetensors", 0.5, task_method).run()


def loaded(path: Path) -> State:
    """Read a file, or the shards of a folder as their index tells."""
    if path.is_file():
        return load_file(path)
    places = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    held = {shard: load_file(path / shard) for shard in set(places.values())}
    assert sorted(name for state in held.values() for name in state) == sorted(places)
    return {name: held[shard][name] for name, shard in places.items()}


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.measure])
def test_every_method_merges_files_whose_names_differ_by_prefixes(tmp_path: Path, name: str) -> None:
    states = [random_state([(6, 4), (4,), (2, 2)], seed, [torch.float32]) for seed in range(3)]
    shift = {"t0": "blocks.0._orig_mod.t0"}
    plain = [{("blocks.0." + key if key == "t0" else key): value for key, value in one.items()} for one in states]
    other = [states[0], *({f"module.vit.{shift.get(k, k)}": v for k, v in one.items()} for one in states[1:])]
    other[0] = plain[0]
    steps = ["steps=3"] if name == "wudi" else []
    found = []
    for folder, group in (("plain", plain), ("other", other)):
        paths = [write(tmp_path / folder / f"{i}.safetensors", state) for i, state in enumerate(group)]
        Merge(paths[0], paths[1:], tmp_path / f"{folder}-out", 0.7, name, steps).run()
        out = tmp_path / f"{folder}-out"
        found.append({path.relative_to(out): load_file(path) for path in sorted(out.rglob("*.safetensors"))})
    assert found[0].keys() == found[1].keys() and found[0]
    for path, state in found[0].items():
        assert bits(found[1][path]) == bits(state)
    differences = [
        compare(tmp_path / f / "0.safetensors", [tmp_path / f / "1.safetensors"]) for f in ("plain", "other")
    ]
    pd.testing.assert_frame_equal(*(one.tensors for one in differences))


def test_a_part_of_a_file_is_merged_and_compared_where_it_is_named(tmp_path: Path) -> None:
    states = [random_state([(6, 4), (4,), (2, 2)], seed, [torch.float32]) for seed in range(3)]
    halves = [{f"{part}.vit.{n}": t for n, t in states[i].items()} for i, part in enumerate(("student", "teacher"), 1)]
    base, held = write(tmp_path / "base.safetensors", states[0]), tmp_path / "both.safetensors"
    write(held, halves[0] | halves[1])
    parts = [Path(f"{held}#{part}") for part in ("student", "teacher.vit")]
    with pytest.raises(TaskvecError, match=r"several times, behind .*\n.*both.safetensors#NAME"):
        Merge(base, [held], tmp_path / "none.safetensors", 0.5).run()
    for number, chosen in enumerate([parts[:1], parts[1:], parts]):
        out = tmp_path / f"out{number}.safetensors"
        with listen() as heard:
            Merge(base, chosen, out, 0.5).run()
        assert_equal(load_file(out), expected(states[0], [states[1 + parts.index(part)] for part in chosen], 0.5))
        assert f"'{held}': took '{chosen[0].name.partition('#')[2]}', not the other 5 tensors" in heard
    norms = [float(torch.dist(pack(one).flat, pack(states[0]).flat)) for one in states[1:]]
    assert np.allclose(compare(base, parts).by_checkpoint()["norm"], norms)
    twice, missing = [parts[0], Path(f"{held}#student.vit")], [Path(f"{held}#techer")]
    for wrong, told in ((twice, "given twice"), (missing, "has no part 'techer'")):
        with pytest.raises(TaskvecError, match=told):
            Merge(base, wrong, tmp_path / "none.safetensors", 0.5).run()
    write_shards(tmp_path / "shards", *halves)
    Merge(Path(f"{tmp_path / 'shards'}#student"), parts[1:], tmp_path / "merged", 0.5).run()
    with Checkpoint(tmp_path / "merged") as found:
        assert set(found.tensors) == set(halves[0]) and len(found.files) == 1


# ---------------------------------------------------------------- what is kept of the base


def simple(folder: Path, tasks: int = 2) -> list[Path]:
    states = [random_state([(4, 3), (5,), (2, 2)], seed, [torch.float32]) for seed in range(tasks + 1)]
    return [write(folder / f"m{i}.safetensors", state, {"format": "pt", "made": "x"}) for i, state in enumerate(states)]


def test_one_file_keeps_metadata_and_tells_of_every_tensor(tmp_path: Path) -> None:
    base, *tuned = simple(tmp_path)
    lines = Merge(base, tuned, tmp_path / "out.safetensors", 0.3, exclude=["t2"]).run()
    assert lines == [
        "task_arithmetic of 2 checkpoints at scale 0.3",
        "merged 2 of 5 tensors (17 numbers)",
        "carried over from the base: 2 integers (steps, mask), 1 by --exclude (t2); refused: none",
        "not used of m1: 1 (t2)",
        "not used of m2: 1 (t2)",
        str(tmp_path / "out.safetensors"),
    ]
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "x"}
    assert torch.equal(load_file(tmp_path / "out.safetensors")["t2"], load_file(base)["t2"])


@pytest.mark.parametrize("stem", ["model", "open_clip_model", "diffusion_pytorch_model"])
def test_a_folders_weights_keep_the_name_their_library_looks_for(tmp_path: Path, stem: str) -> None:
    state = random_state([(4, 3), (5,)], 0, [torch.float32])
    base = write(tmp_path / "base" / f"{stem}.safetensors", state).parent
    tuned = write(tmp_path / "tuned.safetensors", state)
    Merge(base, [tuned], tmp_path / "one", 1.0).run()
    assert [path.name for path in (tmp_path / "one").iterdir()] == [f"{stem}.safetensors"]
    Merge(base, [tuned], tmp_path / "several", 1.0, shard_size="60B").run()
    assert (tmp_path / "several" / f"{stem}.safetensors.index.json").is_file()
    names = {path.name.partition("-")[0] for path in (tmp_path / "several").glob("*.safetensors")}
    assert names == {stem}
    Merge(tmp_path / "several", [tuned], tmp_path / "again", 1.0, shard_size="90B").run()
    assert_equal(
        {key: value for file in (tmp_path / "again").glob("*.safetensors") for key, value in load_file(file).items()},
        state,
    )


def test_shards_stay_as_they_are_with_index_and_configuration(tmp_path: Path) -> None:
    first, second = random_state([(4, 3)], 0, [torch.bfloat16]), {"last.weight": torch.randn(3, 2).bfloat16()}
    base = write_shards(tmp_path / "base", first, second, total=47)
    (base / "config.json").write_text('{"a": 1}')
    (base / "pytorch_model.bin").write_text("pickle")
    tuned = write(
        tmp_path / "tuned.safetensors",
        {name: 2 * tensor if tensor.is_floating_point() else tensor for name, tensor in (first | second).items()},
    )
    Merge(base, [tuned], tmp_path / "out", 1.0).run()
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    index, before = (json.loads((folder / names[-1]).read_text()) for folder in (tmp_path / "out", base))
    assert index == before
    assert_equal(loaded(tmp_path / "out"), load_file(tuned))
    Merge(base, [tuned], tmp_path / "one.safetensors", 1.0).run()
    assert_equal(load_file(tmp_path / "one.safetensors"), load_file(tuned))
    Merge(tuned, [base], tmp_path / "small", 0.0, shard_size="20B").run()
    assert_equal(loaded(tmp_path / "small"), load_file(tuned))


def test_another_type_is_for_floating_point_tensors_only(tmp_path: Path) -> None:
    base, *tuned = simple(tmp_path)
    Merge(base, tuned, tmp_path / "out.safetensors", 0.3, exclude=["t2"], dtype="bfloat16").run()
    found, want = (
        load_file(tmp_path / "out.safetensors"),
        expected(load_file(base), [load_file(one) for one in tuned], 0.3),
    )
    assert torch.equal(found["t0"], want["t0"].bfloat16())
    assert torch.equal(found["t2"], load_file(base)["t2"].bfloat16())
    assert found["steps"].dtype == torch.int64


def test_carried_numbers_must_fit_and_masks_may_be_infinite(tmp_path: Path) -> None:
    state = {"w": torch.ones(3), "mask": torch.tensor([0.0, -torch.inf])}
    base, large = (write(tmp_path / f"{i}.safetensors", state | {"mask": mask}) for i, mask in (
        (0, state["mask"]), (1, torch.tensor([0.0, -1e9])),
    ))  # fmt: skip
    Merge(base, [large], tmp_path / "o.safetensors", 1.0, exclude=["mask"], dtype="float16").run()
    assert load_file(tmp_path / "o.safetensors")["mask"].tolist() == [0.0, -torch.inf]
    with pytest.raises(TaskvecError, match="'mask' of the result holds .* F16 cannot hold"):
        Merge(large, [base], tmp_path / "p.safetensors", 1.0, exclude=["mask"], dtype="float16").run()


def test_running_variances_do_not_become_negative(tmp_path: Path) -> None:
    base = write(tmp_path / "a.safetensors", {"norm.running_var": torch.tensor([1.0, 4.0])})
    tuned = write(tmp_path / "b.safetensors", {"norm.running_var": torch.tensor([0.5, 5.0])})
    Merge(base, [tuned], tmp_path / "o.safetensors", 3.0).run()
    assert load_file(tmp_path / "o.safetensors")["norm.running_var"].tolist() == [0.0, 7.0]


# ---------------------------------------------------------------- mistakes


def wrong(folder: Path, how: str) -> Merge:
    base, *tuned = simple(folder)
    out, options = folder / "out.safetensors", {}
    if how in ("nan", "inf", "nan in base"):
        path = base if how == "nan in base" else tuned[1]
        write(path, load_file(path) | {"t1": torch.tensor([1.0, 2, float("inf" if how == "inf" else "nan"), 3, 4])})
    elif how == "too large":
        half = [
            write(path, {"x": torch.tensor([value], dtype=torch.float16)})
            for path, value in ((base, 6e4), (tuned[0], 6.5e4))
        ]
        return Merge(half[0], half[1:], out, 2.0)
    elif how == "scale":
        options = {"scale": float("nan")}
    elif how == "method":
        options = {"method": "task_aritmetic"}
    elif how == "needs":
        options = {"method": "needy"}
    elif how == "setting":
        options = {"settings": ["dencity=0.2"]}
    elif how == "set":
        options = {"settings": ["density"]}
    elif how == "type":
        options = {"dtype": "float17"}
    elif how == "size":
        options = {"shard_size": "5 apples"}
    elif how == "out is a base":
        out = base
    elif how == "shards in a file":
        options = {"shard_size": "1KB"}
    elif how == "full folder":
        (folder / "thesis").mkdir()
        (folder / "thesis" / "thesis.txt").write_text("precious")
        out = folder / "thesis"
    elif how == "out is a folder":
        out.mkdir()
    elif how == "out is a file":
        out.write_text("precious")
    elif how == "pickle":
        out = folder / "out.bin"
    elif how == "no folder":
        out = base / "x" / "out.safetensors"
    return Merge(base, tuned, out, **({"scale": 0.3} | options))


WRONGS = {
    "nan": r"m2\.safetensors': tensor 't1' holds NaN", "inf": r"m2\.safetensors': tensor 't1' holds NaN or inf",
    "nan in base": r"m0\.safetensors': tensor 't1'", "too large": "F16 cannot hold", "scale": "nan",
    "method": "did you mean",
    "needs": "needs heads and inputs", "setting": "dencity", "set": "key=value", "type": "float17", "size": "5 apples",
    "out is a base": "one of the checkpoints", "shards in a file": "need a folder", "full folder": "exists already",
    "out is a folder": "is a folder", "out is a file": "exists already", "pickle": "pickle",
    "no folder": r"m0\.safetensors",
}  # fmt: skip


@pytest.mark.parametrize("how", sorted(WRONGS))
def test_mistakes_are_clear_and_leave_everything_as_it_was(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needy = Method(
        "needy", lambda found, part, config: found[0], "a test", "none", needs=frozenset({"inputs", "heads"})
    )
    monkeypatch.setitem(merging.METHODS, "needy", needy)
    request = wrong(tmp_path, how)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(TaskvecError, match=WRONGS[how]) as caught:
        request.run()
    assert caught.value.fix
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_settings_and_sizes_are_parsed() -> None:
    assert parse_settings(["a=0.2", "b=true", "c=mean", "d=[1, 2]", "e=a=b"]) == {
        "a": 0.2, "b": True, "c": "mean", "d": [1, 2], "e": "a=b",
    }  # fmt: skip
    assert [parse_size(text) for text in ("5GB", "500 mb", "2GiB", "1.5K", "7")] == [
        5 * 10**9,
        5 * 10**8,
        2**31,
        1500,
        7,
    ]
    with pytest.raises(TaskvecError, match="twice"):
        parse_settings(["a=1", "a=2"])


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    base, one, two = simple(tmp_path)
    with pytest.raises(TaskvecError, match=r"m0.safetensors' is the base and a fine-tuned checkpoint"):
        Merge(base, [one, tmp_path / "." / "m0.safetensors"], tmp_path / "out.safetensors", 1.0).run()
    with pytest.raises(TaskvecError, match=r"m1.safetensors' is given twice"):
        Merge(base, [one, two, one], tmp_path / "out.safetensors", 1.0, "average").run()
    assert not (tmp_path / "out.safetensors").exists()


def test_a_checkpoint_given_twice_under_two_names_is_refused(tmp_path: Path) -> None:
    base, first, second = simple(tmp_path)
    (tmp_path / "sub").mkdir()
    copy = tmp_path / "sub" / "model.safetensors"
    copy.write_bytes(first.read_bytes())
    (tmp_path / "hard.safetensors").hardlink_to(first)
    around = tmp_path / "sub" / ".." / base.name
    for one, other in [(tmp_path / "sub", copy), (first, tmp_path / "hard.safetensors"), (base, around)]:
        with pytest.raises(TaskvecError, match="is given twice|is the base and a fine-tuned"):
            Merge(base, [one, second, other], tmp_path / "o.safetensors", 1.0).run()


def test_results_of_tasks_stay_in_their_folder(tmp_path: Path) -> None:
    base, first, second = simple(tmp_path)
    for name, path in {"a-b/c": first, "a/b-c": second, "z/c": first}.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(path.read_bytes())
    (tmp_path / "z" / "c" / "deep").mkdir()
    tuned = [tmp_path / "a-b" / "c", tmp_path / "a" / "b-c", tmp_path / "z" / "c" / "deep" / ".."]
    Merge(base, tuned, tmp_path / "out", 1.0, "emr", exclude=["t2"]).run()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a-b-c-2.safetensors", "a-b-c.safetensors", "z-c.safetensors"]
    assert labels([tmp_path / "x" / ".."]) == [tmp_path.name]


def test_the_former_name_of_exclude_still_works_and_says_so(tmp_path: Path) -> None:
    base, *tuned = simple(tmp_path)
    merges = [{"keep": ["t2"]}, {"exclude": ["t2"]}]
    for number, extra in enumerate(merges):
        Merge(base, tuned, tmp_path / f"{number}.safetensors", 0.3, **extra).run()  # type: ignore[arg-type]
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    with listen() as heard:
        assert excluded(None, ["t2"]) == excluded(["t2"], None) == ["t2"]
    assert heard == ["--keep is called --exclude now, and still works"]
    assert compare(base, tuned, keep=["t2"]).tensors.equals(compare(base, tuned, ["t2"]).tensors)


def test_odd_signs_in_names_may_be_kept(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"head.[0].weight": torch.zeros(2), "w": torch.zeros(2)})
    tuned = write(tmp_path / "tuned.safetensors", {"head.[0].weight": torch.zeros(3), "w": torch.ones(2)})
    with pytest.raises(TaskvecError) as caught:
        Merge(base, [tuned], tmp_path / "o.safetensors", 1.0).run()
    pattern = str(caught.value).partition("--exclude '")[2].partition("'")[0]
    for number, keep in enumerate([pattern, "head.[0].weight"]):
        Merge(base, [tuned], tmp_path / f"o{number}.safetensors", 1.0, exclude=[keep]).run()


def test_patterns_of_a_comparison_may_split_tied_weights(tmp_path: Path) -> None:
    state = {"embed.weight": torch.randn(4, 3), "norm": torch.ones(3)}
    state["head.weight"] = state["embed.weight"].clone()
    base = write(tmp_path / "base.safetensors", state)
    tuned = write(tmp_path / "tuned.safetensors", {name: value + 1 for name, value in state.items()})
    assert set(compare(base, [tuned], ["head*"]).tensors["tensor"]) == {"embed.weight", "norm"}


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    base, *tuned = simple(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    Merge(base, tuned, tmp_path / "link", 0.5, exclude=["t2"]).run()
    assert (tmp_path / "link").is_symlink() and any((tmp_path / "real").iterdir())


def test_keep_does_not_split_tied_weights(tmp_path: Path) -> None:
    paths = []
    for index in range(2):
        table = torch.randn(6, 4, generator=torch.Generator().manual_seed(index))
        state = {"embed_tokens.weight": table, "lm_head.weight": table.clone(), "norm.weight": torch.ones(4)}
        paths.append(write(tmp_path / f"{index}.safetensors", state))
    with pytest.raises(TaskvecError, match=r"names 'lm_head.weight', which is tied to 'embed_tokens.weight'"):
        Merge(paths[0], paths[1:], tmp_path / "out.safetensors", 1.0, exclude=["lm_head*"]).run()
    Merge(paths[0], paths[1:], tmp_path / "out.safetensors", 1.0, exclude=["lm_head*", "embed*"]).run()
    found, before = load_file(tmp_path / "out.safetensors"), load_file(paths[0])
    assert torch.equal(found["lm_head.weight"], before["lm_head.weight"])


def test_the_folder_one_stands_in_and_long_names_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tuned = simple(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Merge(base, tuned, Path(), 0.3, shard_size="40B").run()
    assert (tmp_path / "here" / "model.safetensors.index.json").is_file()
    name = "n" * 240 + ".safetensors"
    Merge(base, tuned, tmp_path / name, 0.3).run()
    assert (tmp_path / name).is_file()
    with pytest.raises(TaskvecError, match="File name too long"):
        Merge(base, tuned, tmp_path / ("n" * 300), 0.3).run()


def test_more_shards_than_open_files_at_first(tmp_path: Path) -> None:
    state = {f"x{i}": torch.randn(4) for i in range(80)}
    for name in ("base", "tuned"):
        write(tmp_path / f"{name}.safetensors", state)
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom taskvec.command.weight_files import Merge\n"
        "_, most = resource.getrlimit(resource.RLIMIT_NOFILE)\nfolder = Path(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, most))\n"
        "base, tuned = (folder / f'{name}.safetensors' for name in ('base', 'tuned'))\n"
        "Merge(base, [tuned], folder / 'out', 1.0, shard_size='16B').run()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 80


# ---------------------------------------------------------------- whole or not at all


def start(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


SLOW = """
import signal, sys, time
from pathlib import Path
from taskvec.__main__ import interrupt
from taskvec.file_commands import Merge
folder = Path(sys.argv[1])
sys.argv[1:] = ["merge"]
signal.signal(signal.SIGINT, interrupt)
signal.signal(signal.SIGTERM, interrupt)
out, method = sys.stdin.read().split()
def watch(number, share):
    print("under way", flush=True)
    time.sleep(60)
Merge(folder / "m0.safetensors", [folder / "m1.safetensors"], folder / out, 0.3, method).run(watch)
"""


@pytest.mark.parametrize(
    ("out", "method"), [("out.safetensors", "task_arithmetic"), ("folder", "ties"), ("out.safetensors", "dare")]
)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_merge_leaves_nothing_under_the_final_name(
    tmp_path: Path, how: signal.Signals, out: str, method: str
) -> None:
    simple(tmp_path)
    command = [sys.executable, "-c", SLOW, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(f"{out} {method}")
        process.stdin.close()
        assert process.stdout.readline() == "under way\n"
        process.send_signal(how)
        process.wait(30)
        said = process.stderr.read()
    assert not (tmp_path / out).exists()
    if how == signal.SIGKILL:
        assert hidden(tmp_path)
        Merge(tmp_path / "m0.safetensors", [tmp_path / "m1.safetensors"], tmp_path / out, 0.3).run()
    else:
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[how]
        assert "nothing was written" in said
    assert hidden(tmp_path) == []


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_what_a_merge_under_way_has_written_is_not_removed_by_another(tmp_path: Path) -> None:
    simple(tmp_path)
    alive = tmp_path / f".out.safetensors.{socket.gethostname()}-{os.getpid()}-abcdef.tmp"
    alive.mkdir()
    Merge(tmp_path / "m0.safetensors", [tmp_path / "m1.safetensors"], tmp_path / "out.safetensors", 0.3).run()
    assert hidden(tmp_path) == [alive.name]


def test_a_second_merge_to_one_file_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    simple(tmp_path)
    base, tuned, out = (tmp_path / f"{name}.safetensors" for name in ("m0", "m1", "o"))
    merges = [Merge(base, [tuned], out, scale) for scale in (0, 1)]
    told: list[str] = []

    def second(number: int, share: float) -> None:
        with pytest.raises(TaskvecError, match="another process is writing '.*o.safetensors'"):
            merges[1].run()
        told.append("refused")

    merges[0].run(second)
    assert told
    kept, found = load_file(base), load_file(out)
    assert all(torch.equal(kept[name], found[name]) for name in kept)
    assert hidden(tmp_path) == []
    with pytest.raises(TaskvecError, match="exists already"):
        merges[1].run()


def test_results_inside_what_is_read_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    simple(tmp_path)
    (tmp_path / "base" / "deep").mkdir(parents=True)
    (tmp_path / "m0.safetensors").rename(tmp_path / "base" / "model.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    for out in ("base/o.safetensors", "base/deep", "link/o.safetensors", "base/deep/../o", "link", "base"):
        with pytest.raises(TaskvecError, match="which is read|exists already"):
            Merge(tmp_path / "base", [tmp_path / "m1.safetensors"], tmp_path / out, 0.3).run()
        with pytest.raises(TaskvecError, match="which is read"):
            check_out(tmp_path / out, [tmp_path / "base"])
    assert sorted(path.name for path in (tmp_path / "base").rglob("*")) == ["deep", "model.safetensors"]


def test_a_comparison_keeps_files_of_its_names_and_refuses_what_is_no_file(tmp_path: Path) -> None:
    base, *tuned = simple(tmp_path)
    out = tmp_path / "d"
    (out / "changed").mkdir(parents=True)
    (out / "diff.csv").write_text("mine")
    (out / "changed" / "diff.csv").write_text("older")
    (out / "notes.txt").write_text("mine too")
    check_out(out, [base, *tuned])
    with listen() as heard:
        write_tables(compare(base, tuned), out)
    assert heard == [f"'{out}/diff.csv' was there already: kept as '{out}/changed/diff-2.csv'"]
    assert (out / "changed" / "diff-2.csv").read_text() == "mine"
    assert (out / "changed" / "diff.csv").read_text() == "older"
    assert (out / "notes.txt").read_text() == "mine too"
    assert hidden(out) == []
    with listen() as heard:
        write_tables(compare(base, tuned), out)
    assert heard == []
    (out / "diff.png").unlink()
    (out / "diff.png").symlink_to(base)
    with pytest.raises(TaskvecError, match="diff.png' was not written by this command"):
        check_out(out, [base])


@pytest.mark.parametrize("out", ["/proc/x/o", "/dev/null/o", "m0.safetensors/o", "x" * 300, "loop/o", "nul\0"])
def test_places_that_cannot_be_written_to_are_clear_errors(tmp_path: Path, out: str) -> None:
    base, *tuned = simple(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(TaskvecError, match="cannot use|is no path|is no folder"):
        Merge(base, tuned, tmp_path / f"{out}.safetensors", 0.3).run()
    with pytest.raises(TaskvecError, match="cannot use|is no path|is no folder"):
        check_out(tmp_path / out, [base])
        write_tables(compare(base, tuned), tmp_path / out)


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    base, *tuned = [write(tmp_path / f"{i}.safetensors", {"x": torch.randn(50_000)}) for i in range(2)]
    code = (
        "import resource, sys\nfrom taskvec.command.cli import app\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\napp(sys.argv[1:])"
    )
    process = start(code, "merge", base, *tuned, "--scale", "1", "--out", tmp_path / "out.safetensors")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.startswith("error: no space left for")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_too_small_a_disk_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *tuned = simple(tmp_path)
    monkeypatch.setattr("taskvec.weights.writer.shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(TaskvecError, match="B left"):
        Merge(base, tuned, tmp_path / "out.safetensors", 0.3).run()


# ---------------------------------------------------------------- memory


PEAK = """
import shutil, sys, threading
from pathlib import Path
from taskvec.file_commands import Merge
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
base, tuned, out, tasks, method, arrays = sys.argv[1:]
copies = [Path(f"{tuned}.{i}.safetensors") for i in range(int(tasks))]
for copy in copies:
    shutil.copyfile(tuned, copy)
start, seen, done = 0, [], threading.Event()
if arrays == "False":
    import torch
    torch.set_num_threads(1)
    start = anonymous()
def watch():
    while not done.wait(0.001):
        seen.append(anonymous())
thread = threading.Thread(target=watch)
thread.start()
try:
    Merge(Path(base), copies, Path(out), 0.3, method).run()
finally:
    done.set()
    thread.join()
assert arrays == "False" or "torch" not in sys.modules and "pandas" not in sys.modules
print(max(seen) - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize(("method", "most"), [("task_arithmetic", 100), ("ties", 160), ("pcb", 160)])
def test_memory_does_not_grow_with_models_or_their_number(tmp_path: Path, method: str, most: int) -> None:
    """Anonymous memory, of methods with torch beside what torch takes by itself."""
    rng = np.random.default_rng(0)
    state = {f"x{i}": torch.from_numpy(rng.standard_normal(4_000_000, np.float32)) for i in range(3)}
    paths = [write(tmp_path / f"{i}.safetensors", state) for i in range(2)]
    peaks = []
    for tasks in (1, 8):
        for copy in tmp_path.glob("1.safetensors.*"):
            copy.unlink()
        out = tmp_path / f"out{tasks}.safetensors"
        process = start(PEAK, *paths, out, str(tasks), method, str(METHODS[method].arrays))
        said, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        peaks.append(int(said))
    assert 0 < max(peaks) < most * 2**20, peaks
    assert peaks[1] < peaks[0] + 20 * 2**20, peaks


# ---------------------------------------------------------------- differences


def test_differences_are_those_of_the_tensors(tmp_path: Path) -> None:
    base = {
        "blocks.0.w": torch.randn(3, 4),
        "blocks.10.w": torch.randn(5),
        "blocks.2.w": torch.randn(5),
        "norm.w": torch.zeros(2),
    }
    tuned = [{name: tensor.clone() for name, tensor in base.items()} for _ in range(2)]
    tuned[0]["blocks.0.w"][0] += torch.randn(4)
    tuned[1]["blocks.0.w"] += torch.randn(3, 4)
    tuned[1]["blocks.10.w"][2] += 1
    paths = [write(tmp_path / f"m{i}.safetensors", state) for i, state in enumerate([base, *tuned])]
    found = compare(paths[0], paths[1:])
    assert list(found.products) == ["blocks.0", "blocks.2", "blocks.10", "norm"]
    taus = [pack(one).flat.double() - pack(base).flat.double() for one in tuned]
    whole = found.by_checkpoint()
    assert whole["norm"].tolist() == pytest.approx([float(tau.norm()) for tau in taus])
    assert whole["share"].tolist() == pytest.approx([float((tau != 0).double().mean()) for tau in taus])
    assert whole["base_norm"].tolist() == pytest.approx([float(pack(base).flat.norm())] * 2)
    layers = found.by_layer().set_index(["fine_tuned", "layer"])
    assert layers.loc[("m2", "blocks.10"), "changed"] == 1
    assert np.isnan(layers.loc[("m1", "norm"), "relative"])
    cosines = found.cosines().set_index("layer")["cosine"]
    assert cosines[""] == pytest.approx(float(taus[0] @ taus[1] / taus[0].norm() / taus[1].norm()), abs=1e-6)
    assert cosines["blocks.10"] == 0


def test_checkpoints_may_be_called_as_columns_are(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"blocks.0.w": torch.ones(3)})
    names = ["again", "Layer", "Checkpoint", "plain"]
    paths = [
        write(tmp_path / f"{name}.safetensors", {"blocks.0.w": torch.arange(3.0) * number + 1})
        for number, name in enumerate(names, 1)
    ]
    done = CliRunner().invoke(app, ["diff", str(base), *map(str, paths)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    _, by_layer, cosines = done.output.split("\n\n")[:3]
    assert all(name in by_layer for name in names)
    assert cosines.count("1.000") == 6  # of all pairs: all lie along one direction


def test_a_base_of_zeros_and_an_unmoved_checkpoint_are_told(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"w": torch.zeros(3)})
    tuned = write(tmp_path / "tuned.safetensors", {"w": torch.ones(3)})
    same = write(tmp_path / "same.safetensors", {"w": torch.zeros(3)})
    shown = CliRunner().invoke(app, ["diff", str(base), str(tuned)]).output
    assert "nan" not in shown and "–" in shown
    lines = Merge(base, [tuned, same], tmp_path / "out.safetensors", 1.0).run()
    assert "same does not differ from the base: its task vector is zero" in lines


def test_files_of_zeros_are_refused(tmp_path: Path) -> None:
    full = write(tmp_path / "full.safetensors", {"w": torch.ones(3, 3), "b": torch.ones(3)})
    zero = write(tmp_path / "zero.safetensors", {"w": torch.zeros(3, 3) * -1, "b": torch.ones(3)})
    for base, tuned in ((zero, full), (full, zero)):
        with pytest.raises(TaskvecError, match="zero.safetensors': all its matrices are zero"):
            Merge(base, [tuned], tmp_path / "o.safetensors", 1.0).run()
    assert not (tmp_path / "o.safetensors").exists()


def test_layers_are_named_and_ordered_from_input_to_output() -> None:
    names = ["blocks.10.a", "blocks.2.a", "head.weight", "norm.weight", "patch_embed.proj.bias", "blocks.2.mlp.0.b"]
    assert [layer_of(name) for name in names] == [
        "blocks.10",
        "blocks.2",
        "head",
        "norm",
        "patch_embed.proj",
        "blocks.2",
    ]
    assert in_order(names)[0] == "patch_embed.proj.bias"
    assert in_order(names)[1:4] == ["blocks.2.a", "blocks.2.mlp.0.b", "blocks.10.a"]
    assert layer_of("layers.1.blocks.3.attn.w") == "layers.1.blocks.3"
    assert layer_of("encoder_4.conv.w") == "encoder_4"
    assert layer_of("cls_token") == "cls_token"


# ---------------------------------------------------------------- the command


def test_the_commands_merge_and_compare(tmp_path: Path) -> None:
    base, *tuned = simple(tmp_path)
    done = taskvec("merge", base, *tuned, "--scale", "0.5", "--out", "o.safetensors", "--exclude", "t2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "merged 2 of 5 tensors" in done.stdout
    done = taskvec("diff", base, tmp_path / "o.safetensors", *tuned, "--out", tmp_path / "d")
    assert done.returncode == 0, done.stderr
    assert "entries changed" in done.stdout
    names = ["cosines.csv", "diff.csv", "diff.pdf", "diff.png"]
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == names
    rows = pd.read_csv(tmp_path / "d" / "diff.csv")
    assert rows.groupby("fine_tuned").size().to_dict() == {"o": 3, "m1": 3, "m2": 3}
    assert rows.set_index(["fine_tuned", "tensor"]).loc[("o", "t2"), "changed"] == 0


def test_mistakes_of_the_commands_are_quick(tmp_path: Path) -> None:
    base, *tuned = map(str, simple(tmp_path))
    write(tmp_path / "m1.safetensors", {"x": torch.ones(1)})
    for command in (
        ["merge", "--help"],
        ["merge", base, *tuned, "--scale", "1", "--out", "o.safetensors"],
        ["diff", base, "n"],
    ):
        assert not loads_torch(*command)
