"""Flat buffers, strict matching, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.encoders import TinyEncoder
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from taskvec.core.errors import TaskvecError
from taskvec.weights import vectors
from taskvec.weights.flat import Weights, align, bind, pack, read, save, save_tensors

shapes = st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1, max_size=5)


def random_state(shape_list: list[tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {f"t{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shape_list)}
    return state | {"steps": torch.tensor(seed), "mask": torch.tensor([True, False])}


@given(shapes, st.integers(0, 1000))
def test_packing_keeps_every_key_shape_and_value(shape_list: list[tuple[int, ...]], seed: int) -> None:
    state = random_state(shape_list, seed)
    back = pack(state).state()
    assert set(back) == set(state)
    for key, value in state.items():
        assert back[key].shape == value.shape
        assert torch.equal(back[key], value)


@given(shapes, st.integers(0, 1000))
def test_adding_the_whole_vector_gives_the_fine_tuned_weights_within_one_rounding(
    shape_list: list[tuple[int, ...]], seed: int
) -> None:
    pre, tuned = pack(random_state(shape_list, seed)), pack(random_state(shape_list, seed + 1))
    back = vectors.add(pre, vectors.subtract(tuned, pre), 1.0)
    bound = torch.maximum(pre.flat.abs(), tuned.flat.abs()) * torch.finfo(torch.float32).eps * 2
    assert bool(((back.flat - tuned.flat).abs() <= bound).all())


@given(shapes, st.integers(0, 1000))
def test_scale_zero_and_zero_vectors_give_the_pretrained_weights_bit_for_bit(
    shape_list: list[tuple[int, ...]], seed: int
) -> None:
    pre, tuned = pack(random_state(shape_list, seed)), pack(random_state(shape_list, seed + 1))
    vector = vectors.subtract(tuned, pre)
    assert torch.equal(vectors.add(pre, vector, 0.0).flat, pre.flat)
    assert torch.equal(vectors.add(pre, vectors.scale(vector, 0.0), 0.7).flat, pre.flat)


def test_integer_buffers_are_carried_from_the_pretrained_encoder() -> None:
    pre, tuned = pack(random_state([(3,)], 1)), pack(random_state([(3,)], 2))
    vector = vectors.subtract(tuned, pre)
    assert [entry.name for entry in vector.layout] == ["t0"]
    assert int(vectors.add(pre, vector)["steps"]) == 1


def test_a_bound_module_moves_with_its_buffer() -> None:
    module = TinyEncoder().eval()
    images = torch.rand(2, 3, 8, 8)
    before = module(images)
    bound = bind(module)
    assert torch.equal(module(images), before)
    assert module.third.weight is module.second.weight
    bound.flat.mul_(2)
    assert not torch.allclose(module(images), before)
    moved = {key: value.clone() for key, value in module.state_dict().items()}
    for key, value in bound.state().items():
        assert torch.equal(value, moved[key])


def test_gradient_steps_on_a_bound_module_reach_the_buffer() -> None:
    module = TinyEncoder()
    bound = bind(module)
    before = bound.flat.clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.rand(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(bound.flat, before)


def test_files_give_the_same_weights_back(tmp_path: Path) -> None:
    weights = pack(TinyEncoder().state_dict())
    save(weights, tmp_path / "w.safetensors")
    assert set(load_file(tmp_path / "w.safetensors")) == set(TinyEncoder().state_dict())
    back = align(read(tmp_path / "w.safetensors"), weights, "file")
    assert torch.equal(back.flat, weights.flat)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_no_key_is_dropped_silently(change: str) -> None:
    state = TinyEncoder().state_dict()
    like = pack(state)
    if change == "missing":
        del state["first.bias"]
    elif change == "extra":
        state["other"] = torch.zeros(1)
    else:
        state["first.bias"] = torch.zeros(7)
    with pytest.raises(TaskvecError, match=r"first\.bias|other"):
        align(state, like, "the file")


def test_vectors_of_another_architecture_are_refused() -> None:
    with pytest.raises(TaskvecError, match="b"):
        vectors.subtract(pack({"a": torch.zeros(2)}), pack({"b": torch.zeros(2)}))


def test_a_value_that_is_not_finite_is_named() -> None:
    state = {"a": torch.zeros(2), "b": torch.tensor([1.0, float("nan")])}
    with pytest.raises(TaskvecError, match="'b'"):
        align(state, pack({"a": torch.zeros(2), "b": torch.zeros(2)}), "file")


def test_a_truncated_file_is_a_clear_error(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-50])
    with pytest.raises(TaskvecError, match=r"cut\.safetensors"):
        read(tmp_path / "cut.safetensors")


def test_moving_a_bound_model_is_one_sum_from_the_pretrained_weights() -> None:
    torch.manual_seed(0)
    module = TinyEncoder()
    bound = bind(module)
    pre = bound.clone()
    taus = [pre.with_flat(torch.randn_like(pre.flat)) for _ in range(2)]
    for tau in taus:
        tau["norm.running_var"].zero_()
    vectors.move(bound, pre, taus, [0.3, -2.0])
    want = pre.flat.double() + 0.3 * taus[0].flat.double() - 2.0 * taus[1].flat.double()
    assert torch.allclose(bound.flat.double(), want, atol=1e-6)
    vectors.move(bound, pre, taus, [0.0, 0.0])
    assert torch.equal(bound.flat, pre.flat)


def test_cosine_is_that_of_the_flat_vectors() -> None:
    a, b = pack({"x": torch.tensor([1.0, 0.0])}), pack({"x": torch.tensor([1.0, 1.0])})
    assert vectors.cosine(a, b) == pytest.approx(2**-0.5)
    assert vectors.cosine(a, vectors.scale(a, -1.0)) == pytest.approx(-1)
    assert vectors.cosine(a, vectors.scale(a, 0.0)) == 0


def test_half_precision_files_are_merged_in_float32() -> None:
    pre = pack({"x": torch.ones(1, dtype=torch.bfloat16)})
    tuned = pack({"x": torch.full((1,), 1.0078125, dtype=torch.bfloat16)})
    moved = vectors.add(pre, vectors.subtract(tuned, pre), 0.05)
    assert moved.flat.dtype == torch.float32
    assert float(moved.flat) == pytest.approx(1 + 0.05 * 0.0078125)
    assert isinstance(moved, Weights)


def test_a_file_of_no_tensors_is_read_back(tmp_path: Path) -> None:
    """A round of re-probing that has no scale left to try fits no head."""
    save_tensors({}, tmp_path / "none.safetensors")
    assert read(tmp_path / "none.safetensors") == {}
