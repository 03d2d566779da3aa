"""Every method of the registry keeps the invariants that it declares; recipes, kinds of entries, order statistics."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taskvec.testing import SHAPES, VALUES, Case, InvariantError, Model, check_case, check_method, make_model
from torch import Tensor

from taskvec.core.errors import TaskvecError
from taskvec.core.settings import Settings
from taskvec.merging import in_memory as buffers
from taskvec.merging.entries import Entry, Masked, depths, describe, kind_of
from taskvec.merging.methods.ranks import order_statistics
from taskvec.merging.registry import METHODS, Method, Recipe, apply, find_recipe, register
from taskvec.weights import vectors as arithmetic
from taskvec.weights.flat import Weights, pack

QUICK: dict[str, dict[str, Any]] = {"wudi": {"steps": 3}}
"""Hyperparameters with which a method is checked in little time."""
METHOD = pytest.mark.parametrize("name", METHODS)


def statistics(name: str) -> Callable[[Entry, int, torch.Generator], Tensor | None]:
    """Return what makes up what a method would measure on data."""

    def grams(entry: Entry, tasks: int, generator: torch.Generator) -> Tensor | None:
        if entry.kind != "matrix":
            return None
        inputs = torch.randn(tasks, 9, entry.base[0].numel(), generator=generator)
        return inputs.mT @ inputs

    return {
        "fisher": lambda entry, tasks, generator: torch.rand((tasks, *entry.base.shape), generator=generator),
        "regmean": grams,
        "adamerging": lambda entry, tasks, generator: torch.rand(tasks, generator=generator),
    }.get(name, lambda *_: None)


def made_up(name: str, entries: buffers.Buffers) -> dict[str, Tensor]:
    """Return made-up statistics of all entries, as a method takes them: a row a task, or sums."""
    generator, tasks = torch.Generator().manual_seed(0), len(entries.vectors)
    pairs = [(replace(entry, statistics=statistics(name)(entry, tasks, generator)), stack) for entry, stack in entries]
    model = Model(*zip(*pairs, strict=True)).gathered(*find_recipe(name).stages[-1])
    return {entry.name: entry.statistics for entry, _ in model if entry.statistics is not None}


def directions(recipe: Recipe, entries: Any) -> list[Tensor]:
    """Return the direction of every entry; a per-task method's for all tasks, one after the other."""
    known = entries.gathered(*recipe.stages[-1])
    results = [result for _, result in apply(recipe, buffers.FiniteEntries(known))]
    tasks = range(len(entries.stacks[0]))
    return [torch.stack([r.of(task) for task in tasks]) if isinstance(r, Masked) else r for r in results]


@METHOD
@settings(max_examples=4, deadline=None)
@given(st.builds(Case, st.sampled_from(VALUES), st.integers(1, 4), st.integers(0, 10_000)))
def test_methods_keep_the_invariants_of_all_and_those_that_they_declare(name: str, case: Case) -> None:
    check_case(name, case, QUICK.get(name), statistics(name))


def halved(vectors: Any, entry: Entry, config: Settings) -> Any:
    return vectors.sum(0) / 2


def first(vectors: Any, entry: Entry, config: Settings) -> Any:
    return vectors[0] * 1.0


def squared(vectors: Any, entry: Entry, config: Settings) -> Any:
    return (vectors**2).clamp(max=1).sum(0)


def inverse(vectors: Any, entry: Entry, config: Settings) -> Any:
    return 1 / vectors.sum(0)


def shifted(vectors: Any, entry: Entry, config: Settings) -> Any:
    return vectors.sum(0) + 1


def in_place(vectors: Any, entry: Entry, config: Settings) -> Any:
    return vectors.mul_(0.5).sum(0)


def drawn(vectors: Any, entry: Entry, config: Settings) -> Any:
    return vectors.sum(0) * torch.rand(())


def centred(vectors: Any, entry: Entry, config: Settings) -> Any:
    return (vectors - (vectors.mean() if vectors.numel() else 0)).sum(0)


def double(vectors: Any, entry: Entry, config: Settings) -> Any:
    return vectors.double().sum(0)


def stacked(vectors: Any, entry: Entry, config: Settings) -> Any:
    return vectors


def tensors_only(vectors: Any, entry: Entry, config: Settings) -> Any:
    return vectors.sum(0).clamp(min=-1e20)


@pytest.mark.parametrize(
    ("function", "declared", "message"),
    [
        (halved, {"laws": {"one task"}}, r"'one task' \(values normal, tasks 1, seed 0\): .*instead of"),
        (first, {"laws": {"order"}}, "'order' .* instead of .*allowed"),
        (squared, {"laws": {"homogeneous"}}, "'homogeneous'"),
        (inverse, {}, "'finite' .* has inf for finite vectors|'zero vectors move nothing' .* has inf"),
        (shifted, {}, "'zero vectors move nothing' .* has 1 instead of 0"),
        (in_place, {}, "'inputs stay as they are' .*'patch_embed.proj.weight' was changed in place"),
        (drawn, {}, "'the same twice'"),
        (centred, {"elementwise": True}, "'elementwise'|'files'"),
        (double, {}, "'float32' .* torch.float64"),
        (stacked, {}, "'a direction for every entry' .* makes .* where .* belongs"),
        (tensors_only, {"arrays": True}, "'arrays' .* AttributeError: 'numpy.ndarray' object has no attribute 'clamp'"),
    ],
)
def test_a_method_that_breaks_an_invariant_is_told_which_and_where(
    function: Any, declared: dict[str, Any], message: str
) -> None:
    laws = frozenset(declared.pop("laws", ()))
    method = Method("mine", function, "made up", "here", laws=laws, **declared)
    with pytest.raises(InvariantError, match=f"method 'mine' breaks ({message})"):
        check_method(method)


def test_what_a_method_measures_must_be_made_up_to_check_it() -> None:
    with pytest.raises(TaskvecError, match="'regmean' measures on data"):
        check_method("regmean")


@METHOD
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_an_error_that_names_the_tensor(name: str, bad: float) -> None:
    recipe, entries = find_recipe(name, QUICK.get(name)), make_model(Case("normal", 2, 3), statistics(name))
    entries.stacks[3][1, 2, 1] = bad
    with pytest.raises(TaskvecError, match=r"blocks\.0\.fc\.weight"):
        directions(recipe, entries)


def test_methods_that_draw_one_after_the_other_have_numbers_of_their_own() -> None:
    torch.manual_seed(0)
    entries = [(Entry("w", torch.zeros(200, 50), "matrix", 0.5), torch.rand(2, 200, 50) + 1)]
    for name in (
        "dare+della",
        "lines+dare+della",
    ):  # of two tasks: a tenth of each, and of that somewhat less than half
        ((_, found),) = apply(find_recipe(name, {}), entries)
        assert 0.06 < float((found != 0).float().mean()) < 0.11, name
    ((_, alone),) = apply(find_recipe("dare", {}), entries)
    ((_, again),) = apply(find_recipe("dare+ties", {"keep": 1.0}), entries)
    assert torch.equal(alone != 0, again != 0)  # the first to draw has the numbers it had alone


def test_a_vector_too_short_for_float32_does_not_break_wudi() -> None:
    torch.manual_seed(0)
    tiny = 1e-22 * torch.randn(3, 6, 5)
    ((_, found),) = apply(find_recipe("wudi", {"steps": 3}), [(Entry("w", torch.zeros(6, 5), "matrix"), tiny)])
    assert torch.equal(found, tiny.sum(0))


def test_needs_name_methods_that_draw_or_measure() -> None:
    for method in METHODS.values():
        assert bool(method.measure) == bool(method.needs - {"seed"}), method.name
        assert method.reference and method.description


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.data())
def test_order_statistics_are_those_of_sorted_numbers(values: list[float], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(values) - 1))
    row = torch.tensor(values, dtype=torch.float32)
    slices = [torch.stack([piece, -piece]) for piece in row.split(7)]
    found = order_statistics(slices, lambda count: [rank, count - 1])
    wanted = torch.stack([row.sort().values, (-row).sort().values])[:, [rank, len(values) - 1]]
    assert torch.equal(torch.from_numpy(found) + 0.0, wanted + 0.0)


def test_zeros_are_not_counted_among_the_smallest_negative_numbers() -> None:
    row = torch.tensor([[-0.0, 0.0, -2.1e-42, -1e-45, 0.0]])
    found = order_statistics([row], lambda count: list(range(count)))
    assert torch.equal(torch.from_numpy(found) + 0.0, row.sort().values + 0.0)


def test_order_statistics_of_nothing_are_zero() -> None:
    assert order_statistics([torch.zeros(2, 0)], lambda count: [0]).tolist() == [[0.0], [0.0]]


def test_drops_depend_on_seed_entry_and_task_alone() -> None:
    part = Entry("a", torch.zeros(5, 3), "matrix", seed=1)
    draws = part.uniform(0)
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    assert torch.equal(draws, replace(part, depth=1.0).uniform(0))
    for other in (replace(part, seed=2), replace(part, name="b")):
        assert not torch.equal(draws, other.uniform(0))
    assert not torch.equal(draws, part.uniform(1))
    tail = replace(part, base=torch.zeros(6), start=9)
    assert torch.equal(draws.flatten()[9:], tail.uniform(0))


def test_the_kept_share_of_dare_is_one_minus_p_and_its_mean_is_the_vector() -> None:
    part = Entry("a", torch.zeros(20_000), "vector", seed=1)
    [(_, found)] = apply(find_recipe("dare", {"drop": 0.75}), [(part, torch.ones(1, 20_000))])
    assert isinstance(found, Tensor)
    assert abs(float((found != 0).float().mean()) - 0.25) < 0.02
    assert abs(float(found.mean()) - 1) < 0.05


TABLES = """
transformer.word_embeddings.weight gpt_neox.embed_in.weight model.encoder.embed_positions.weight transformer.wte.weight
encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight image_encoder.blocks.0.attn.rel_pos_h
bert.embeddings.token_type_embeddings.weight backbone.embeddings.weight text_model.embeddings.token_embedding.weight
layers.0.blocks.0.attn.relative_position_bias_table blocks.0.attn.attention_biases shared.weight
""".split()  # noqa: SIM905
MAPS = """
gpt_neox.embed_out.weight vision_model.embeddings.patch_embedding.weight embeddings.patch_embeddings.projection.weight
patch_embed.proj.weight layers.0.rel_pos.mlp.fc1.weight layers.0.blocks.0.attn.cpb_mlp.0.weight lm_head.weight
transformer.h.0.self_attention.query_key_value.weight
""".split()  # noqa: SIM905


def test_kinds_and_depths_are_told_by_names_and_shapes() -> None:
    assert kind_of("blocks.0.attn.qkv.weight", (9, 3)) == "matrix"
    assert kind_of("patch_embed.proj.weight", (8, 3, 4, 4)) == "matrix"
    assert kind_of("pos_embed", (1, 5, 8)) == kind_of("embeddings.position_embeddings.weight", (5, 8)) == "embedding"
    assert kind_of("mask_token", (1, 8)) == kind_of("model.embed_tokens.weight", (99, 8)) == "embedding"
    for name in ("model.embed.weight", "emb.weight", "token_type_embeddings.weight", "query_embed.weight"):
        assert kind_of(name, (99, 8)) == "embedding", name
    for name in ("token_embedding.proj.weight", "blocks.0.mlp.shared.weight"):
        assert kind_of(name, (99, 8)) == "matrix", name
    assert kind_of("layers.0.mlp.experts.down_proj", (8, 64, 32)) == "embedding"
    assert kind_of("layers.0.experts.3.w1.weight", (64, 32)) == "matrix"
    assert kind_of("norm.weight", (8,)) == kind_of("scale", ()) == "vector"
    for name in TABLES:
        assert kind_of(name, (99, 8)) == "embedding", name
    for name in MAPS:
        assert kind_of(name, (99, 8)) == "matrix", name
    vit = depths(["patch_embed.w", "blocks.0.mlp.0.w", "blocks.1.w", "blocks.10.w", "norm.w"])
    assert list(vit.values()) == [0.0, 0.0, 0.5, 1.0, 0.0]
    nested = depths(["stem.w", "stages.0.blocks.0.w", "stages.0.blocks.1.w", "stages.1.blocks.0.w"])
    assert list(nested.values()) == [0.0, 0.0, 0.5, 1.0]
    towers = depths(["vision.encoder.layers.1.w", "vision.encoder.layers.0.w", "text.encoder.layers.0.w"])
    assert list(towers.values()) == [1.0, 0.0, 0.0]
    assert list(depths(["layer1.0.conv1.weight", "layer2.0.conv1.weight"]).values()) == [0.0, 1.0]
    torchvision = depths(["features.0.0.w", "features.1.0.block.0.w", "features.1.1.block.5.w", "features.2.1.w"])
    assert list(torchvision.values()) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    encoder = depths(["class_token", "encoder.layers.encoder_layer_0.ln.w", "encoder.layers.encoder_layer_11.mlp.0.w"])
    assert list(encoder.values()) == [0, 0, 1]
    assert list(depths(["a", "b.weight"]).values()) == [None, None]


def state(seed: int) -> dict[str, Tensor]:
    """Return a state with tied tensors, integers, batch norm, an empty tensor and a scalar, in three dtypes."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["bn.running_var"] = made["bn.running_var"].abs()
    made["blocks.1.square"] = made["blocks.1.square"].to(torch.bfloat16)
    made["blocks.1.fc.weight"] = made["blocks.1.fc.weight"].half()
    made["head.tied"] = made["blocks.0.fc.weight"]
    return made | {"bn.num_batches_tracked": torch.tensor(seed)}


def tuned(count: int) -> tuple[Weights, list[Weights]]:
    base = pack(state(0))
    return base, [arithmetic.subtract(pack(state(seed + 1)), base) for seed in range(count)]


@METHOD
def test_buffers_keep_layout_ties_and_integers(name: str) -> None:
    recipe = find_recipe(name)
    base, taus = tuned(2)
    entries = buffers.Buffers(base, taus, 0, made_up(name, buffers.Buffers(base, taus)))
    if recipe.per_task:
        result = buffers.task_directions(recipe, entries)
        found = result.of(1)
        assert result.bytes_per_task <= base.flat.numel() // 8 + 1 + 4 * len(SHAPES)
    else:
        found = buffers.direction(recipe, entries)
    merged = arithmetic.add(base, found, 0.7)
    assert merged.layout == base.layout
    assert bool(merged.flat.isfinite().all())
    assert torch.equal(merged["head.tied"], merged["blocks.0.fc.weight"])
    assert int(merged["bn.num_batches_tracked"]) == 0
    assert float(merged["bn.running_var"].min()) >= 0
    assert torch.equal(arithmetic.add(base, found, 0.0).flat, base.flat)


def test_addition_is_the_sum_of_flat_buffers_bit_for_bit() -> None:
    base, taus = tuned(5)
    total = taus[0].flat.clone()
    for tau in taus[1:]:
        total += tau.flat
    assert torch.equal(buffers.direction(find_recipe("task_arithmetic"), buffers.Buffers(base, taus)).flat, total)


def test_a_per_task_result_comes_back_from_its_file(tmp_path: Any) -> None:
    base, taus = tuned(3)
    for name in ("tall_masks", "emr"):
        made = buffers.task_directions(find_recipe(name), buffers.Buffers(base, taus))
        buffers.save_directions(made, tmp_path / "d.safetensors")
        back = buffers.read_directions(tmp_path / "d.safetensors", base)
        for task in range(3):
            assert torch.equal(made.of(task).flat, back.of(task).flat)


def test_recipes_are_written_with_plus() -> None:
    recipe = find_recipe("lines+dare+ties", {"drop": 0.5, "keep": 0.2})
    assert [method.name for method, _ in recipe.stages] == ["lines", "dare", "ties"]
    assert recipe.settings() == {"drop": 0.5}
    assert recipe.needs == {"seed"} and recipe.elementwise and not recipe.per_task
    assert [method.name for method, _ in find_recipe("dare").stages] == ["dare", "task_arithmetic"]


def test_a_recipe_is_its_methods_one_after_the_other() -> None:
    base, taus = tuned(2)
    joined = buffers.direction(find_recipe("lines+iso_c", {"alpha": 0.2, "beta": 1.0}), buffers.Buffers(base, taus))
    about = describe({entry.name: entry.shape for entry in base.layout})
    scaled = [tau.clone() for tau in taus]
    for tau in scaled:
        for entry in base.layout:
            if entry.name != "head.tied":
                tau[entry.name].mul_(0.2 + float(about[entry.name][1] or 0))
    alone = buffers.direction(find_recipe("iso_c"), buffers.Buffers(base, scaled))
    assert torch.allclose(joined.flat, alone.flat, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("tiess", {}, "did you mean 'ties'"),
        ("ties+dare", {}, "'ties' can only stand at the end"),
        ("dare+dare+ties", {}, "names a method twice"),
        ("ties", {"kepp": 0.1}, "did you mean 'keep'"),
        ("ties", {"keep": 0}, "keep"),
        ("ties", {"keep": "much"}, "given: 'much'"),
        ("della", {"drop": 0.9}, "epsilon"),
        ("breadcrumbs", {"beta": 0.95}, "lower one"),
        ("task_arithmetic", {"keep": 0.1}, "no hyperparameter 'keep'"),
    ],
)
def test_a_recipe_that_cannot_be_says_why(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskvecError, match=message):
        find_recipe(name, config)


def test_what_a_method_cannot_merge_is_an_error() -> None:
    base, taus = tuned(3)
    with pytest.raises(TaskvecError, match="merges 2 tasks, and there are 3"):
        buffers.direction(find_recipe("slerp"), buffers.Buffers(base, taus))
    with pytest.raises(TaskvecError, match="each task its own"):
        buffers.direction(find_recipe("emr"), buffers.Buffers(base, taus))
    with pytest.raises(TaskvecError, match="needs heads and inputs"):
        buffers.direction(find_recipe("fisher"), buffers.Buffers(base, taus))
    flat = pack({"weight": torch.ones(2, 2)})
    with pytest.raises(TaskvecError, match="no name of the model's tensors tells a layer"):
        buffers.direction(find_recipe("lines"), buffers.Buffers(flat, [flat]))


def test_a_method_from_outside_the_package_is_as_good_as_any() -> None:
    """The example of docs/methods.md, as it stands there."""
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text("utf-8")
    exec(text.split("```python\n")[1].split("```")[0], {})
    try:
        method = METHODS["agreement"]
        assert method.laws == {"one task", "order", "homogeneous"}
        check_method("agreement")
        base, taus = tuned(2)
        config = {"power": 0.0, "drop": 0.0}
        merged = buffers.direction(find_recipe("dare+agreement", config), buffers.Buffers(base, taus))
        assert torch.allclose(merged.flat, (taus[0].flat + taus[1].flat) / 2, atol=1e-6)
        with pytest.raises(ValueError, match="registered already"):
            register(method)
        with pytest.raises(ValueError, match=r"\+ joins methods"):
            register(replace(method, name="a+b"))
    finally:
        METHODS.pop("agreement")


PEAKS = """
import threading, time, torch
from taskvec.merging import METHODS
from taskvec.merging.parts import Part
torch.set_num_threads(1)
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
def merge(name, vectors):
    config = METHODS[name].config(**({"steps": 2} if name == "wudi" else {}))
    METHODS[name].function(vectors, Part("w", torch.zeros(vectors.shape[1:]), "matrix"), config)
names = ["della", "wudi", "iso_c", "iso_cts", "tsv_m"]
for name in names:
    merge(name, torch.randn(4, 64, 256))
start, peaks, done = anonymous(), dict.fromkeys(names, 0), threading.Event()
vectors = torch.randn(4, 512, 2048)
def watch():
    while not done.wait(0.001):
        now = name
        peaks[now] = max(peaks[now], anonymous() - start)
name = names[0]
thread = threading.Thread(target=watch)
thread.start()
for name in names:
    merge(name, vectors)
done.set()
thread.join()
print({name: round(peak / vectors[0].nbytes, 1) for name, peak in peaks.items()})
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_methods_of_whole_matrices_hold_the_bar_of_memory() -> None:
    """Vectors, base and result included, in units of the matrix: at most 2 T + 4."""
    returned = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, env=returned)
    peaks = ast.literal_eval(done.stdout)
    assert all(0 < peak <= 2 * 4 + 4 for peak in peaks.values()), peaks


def test_listing_methods_loads_no_torch() -> None:
    code = (
        "from taskvec.merging import find_recipe; find_recipe('dare+ties'); import sys; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
