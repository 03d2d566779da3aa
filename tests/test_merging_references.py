"""Spectral, sparse and statistical methods against slow float64 versions, written in numpy from the papers' code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from taskvec.testing import Model
from torch import Tensor

from taskvec.merging.entries import Masked, Part
from taskvec.merging.registry import apply, find_recipe

Arrays = list[np.ndarray]


def merged(name: str, taus: Arrays, config: dict[str, Any] | None = None, **about: Any) -> np.ndarray:
    """Merge one matrix by a method of the package."""
    stack = torch.from_numpy(np.stack(taus)).float()
    part, recipe = Part("w", torch.zeros(stack.shape[1:]), "matrix", **about), find_recipe(name, config)
    [(_, found)] = apply(recipe, Model((part,), (stack,)).gathered(*recipe.stages[-1]))
    if isinstance(found, Masked):
        return torch.stack([found.of(task) for task in range(len(taus))]).double().numpy()
    return found.double().numpy()


def polar(matrix: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def slow_tsv_m(taus: Arrays) -> np.ndarray:
    rank = min(taus[0].shape)
    share = int(rank * (1 / len(taus)))
    u, s, v = np.zeros((taus[0].shape[0], rank)), np.zeros(rank), np.zeros((rank, taus[0].shape[1]))
    for i, tau in enumerate(taus):
        left, sizes, right = np.linalg.svd(tau, full_matrices=False)
        place = slice(i * share, (i + 1) * share)
        u[:, place], s[place], v[place] = left[:, :share], sizes[:share], right[:share]
    return polar(u) @ np.diag(s) @ polar(v)


def slow_iso_c(taus: Arrays) -> np.ndarray:
    left, sizes, right = np.linalg.svd(sum(taus), full_matrices=False)
    return left @ np.diag(np.full_like(sizes, sizes.mean())) @ right


def slow_iso_cts(taus: Arrays, k: float = 0.8) -> np.ndarray:
    rank, tasks = min(taus[0].shape), len(taus)
    specific = round((rank - int(rank * k)) / tasks) * tasks
    common, own = rank - specific, specific // tasks
    left, sizes, right = np.linalg.svd(sum(taus), full_matrices=False)
    us, ss, vs = [], [], []
    for tau in taus:
        u, s, v = np.linalg.svd(tau - left[:, :common] @ left[:, :common].T @ tau, full_matrices=False)
        us.append(u[:, :own])
        ss.append(s[:own])
        vs.append(v[:own])
    u = np.concatenate([*us, left[:, :common]], 1)
    s = np.concatenate([*ss, sizes[:common]])
    v = np.concatenate([*vs, right[:common]], 0)
    return s.mean() * polar(u) @ polar(v)


def slow_wudi(taus: Arrays, steps: int = 40, rate: float = 1e-3) -> np.ndarray:
    """Adam as in its paper, on the gradient of each product."""
    x = sum(taus)
    mean, square = np.zeros_like(x), np.zeros_like(x)
    for step in range(1, steps + 1):
        gradient = sum(2 * ((x - tau) @ tau.T) @ tau / (tau**2).sum() for tau in taus)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        x = x - rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return x


def slow_ties(taus: Arrays, keep: float = 0.2) -> np.ndarray:
    kept = []
    for tau in taus:
        ordered = sorted(abs(value) for value in tau.flat)
        least = ordered[len(ordered) - int(len(ordered) * keep) - 1]
        kept.append(np.where(abs(tau) >= least, tau, 0))
    out = np.zeros_like(taus[0])
    for at in np.ndindex(out.shape):
        sign = np.sign(sum(tau[at] for tau in kept))
        agreeing = [tau[at] for tau in kept if tau[at] * sign > 0]
        out[at] = np.mean(agreeing) if agreeing else 0
    return out


def slow_emr(taus: Arrays) -> np.ndarray:
    flag = np.where(sum(taus) > 0, 1, -1)
    unified = flag * np.max([np.where(tau * flag > 0, abs(tau), 0) for tau in taus], axis=0)
    masks = [tau * unified > 0 for tau in taus]
    return np.stack([m * unified * abs(t).sum() / abs(m * unified).sum() for m, t in zip(masks, taus, strict=True)])


def slow_pcb(taus: Arrays, keep: float = 0.1) -> np.ndarray:
    rows = np.stack([tau.ravel() for tau in taus])
    n, d = rows.shape

    def clamp(x: np.ndarray, low: float, high: float) -> np.ndarray:
        ordered = np.sort(x, axis=1)
        return np.clip(x, ordered[:, [int(d * low)]], ordered[:, [int(d * (1 - high) - 1)]])

    def normalise(x: np.ndarray) -> np.ndarray:
        return (x - x.min(1, keepdims=True)) / (x.max(1, keepdims=True) - x.min(1, keepdims=True))

    sizes = clamp(abs(rows), 0.0001, 0.0001)
    score = np.exp(n * normalise(sizes) ** 2) * np.tanh(rows * rows.sum(0))
    scale = normalise(clamp(score, 1 - keep, 0))
    return ((np.sign(rows) * sizes * scale).sum(0) / np.maximum(scale.sum(0), 1e-12)).reshape(taus[0].shape)


SLOW: dict[str, tuple[Callable[[Arrays], np.ndarray], dict[str, Any]]] = {
    "tsv_m": (slow_tsv_m, {}),
    "iso_c": (slow_iso_c, {}),
    "iso_cts": (slow_iso_cts, {}),
    "wudi": (slow_wudi, {"steps": 40, "learning_rate": 1e-3}),
    "ties": (slow_ties, {}),
    "emr": (slow_emr, {}),
    "pcb": (slow_pcb, {}),
}


def taus(shape: tuple[int, int], tasks: int, seed: int = 0) -> Arrays:
    """Draw vectors with a part that tasks share; float32 numbers in float64 arrays."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=shape)
    return [(0.5 * shared + generator.normal(size=shape)).astype(np.float32).astype(np.float64) for _ in range(tasks)]


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize(("shape", "tasks"), [((24, 24), 3), ((16, 40), 2), ((40, 17), 4), ((30, 20), 1)])
def test_a_matrix_merges_as_in_float64(name: str, shape: tuple[int, int], tasks: int) -> None:
    slow, config = SLOW[name]
    given = taus(shape, tasks)
    wanted = slow(given)
    assert np.abs(merged(name, given, config) - wanted).max() <= 2e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
def test_kernels_are_flattened_to_matrices_and_other_entries_averaged(name: str) -> None:
    given = taus((12, 27), 3)
    stack = torch.from_numpy(np.stack(given)).float().view(3, 12, 3, 3, 3)
    entries = [
        (Part("conv", torch.zeros(12, 3, 3, 3), "matrix"), stack),
        (Part("pos_embed", torch.zeros(12, 27), "embedding"), stack.flatten(2)),
    ]
    (_, kernel), (_, table) = apply(find_recipe(name), entries)
    assert isinstance(kernel, Tensor) and isinstance(table, Tensor)
    assert np.allclose(kernel.flatten(1).numpy(), merged(name, given), atol=1e-6)
    assert torch.allclose(table, stack.flatten(2).mean(0), atol=1e-6)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
def test_null_directions_are_not_made_up(name: str) -> None:
    """Rows that no task moves stay where they are, and a task that moves nothing changes no direction."""
    given = taus((20, 12), 2)
    for tau in given:
        tau[15:] = 0
    assert np.abs(merged(name, given)[15:]).max() < 1e-6
    low = [np.outer(tau[:, 0], tau[0]) for tau in given]
    left, _, right = np.linalg.svd(sum(low))
    found = merged(name, low)
    assert np.abs(left[:, 2:].T @ found).max() < 1e-5
    assert np.abs(found @ right[2:].T).max() < 1e-5


def test_pcb_of_more_tasks_than_float32_has_powers_of_e() -> None:
    given = taus((12, 10), 120)
    wanted = slow_pcb(given)
    assert np.abs(merged("pcb", given) - wanted).max() <= 1e-4 * np.abs(wanted).max()  # 120 u² has few digits left


def test_more_tasks_than_dimensions_keep_one_direction_each() -> None:
    found = merged("tsv_m", taus((3, 5), 4))
    assert np.isfinite(found).all()
    assert np.linalg.norm(found) > 0


def test_fisher_is_the_weighted_mean() -> None:
    given, generator = taus((6, 5), 3), np.random.default_rng(1)
    weights = generator.random((3, 6, 5))
    lengths = np.sqrt((weights**2).sum((1, 2)))
    for normalised, share in ((True, 1 / (lengths + 1e-6)), (False, np.ones(3))):
        factors = (weights + 1e-6) * share[:, None, None]
        wanted = sum(f * t for f, t in zip(factors, given, strict=True)) / factors.sum(0)
        config = {"normalised": normalised}
        found = merged("fisher", given, config, statistics=torch.from_numpy(weights).float())
        assert np.allclose(found, wanted, atol=1e-6)


def test_regmean_minimises_the_distance_to_every_tasks_outputs() -> None:
    """With whole Gram matrices it is the least-squares solution; scaled ones follow the authors' formula."""
    given, generator = taus((6, 5), 3), np.random.default_rng(1)
    inputs = [generator.normal(size=(40, 5)) for _ in given]
    grams = np.stack([x.T @ x for x in inputs])
    statistics = torch.from_numpy(grams).float()
    stacked = np.concatenate(inputs)
    outputs = np.concatenate([x @ tau.T for x, tau in zip(inputs, given, strict=True)])
    wanted = np.linalg.lstsq(stacked, outputs, rcond=None)[0].T
    found = merged("regmean", given, {"off_diagonal": 1.0}, statistics=statistics)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    reduced = [0.9 * gram + 0.1 * np.diag(np.diag(gram)) for gram in grams]
    wanted = sum(tau @ gram for tau, gram in zip(given, reduced, strict=True)) @ np.linalg.inv(sum(reduced))
    assert np.abs(merged("regmean", given, statistics=statistics) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_regmean_takes_the_mean_where_inputs_are_always_zero() -> None:
    given = taus((6, 5), 3)
    found = merged("regmean", given, statistics=torch.zeros(3, 5, 5))
    assert np.allclose(found, np.mean(given, axis=0), atol=1e-6)


def test_slerp_keeps_the_length_of_unit_tensors_and_meets_both_ends() -> None:
    generator = np.random.default_rng(0)
    ends = [one / np.linalg.norm(one) for one in generator.normal(size=(2, 4, 6))]
    for t in (0.0, 0.3, 0.5, 1.0):
        found = merged("slerp", ends, {"t": t})
        assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
        cosines = [np.clip((found * end).sum(), -1, 1) for end in ends]
        whole = np.arccos((ends[0] * ends[1]).sum())
        assert np.arccos(cosines[0]) == pytest.approx(t * whole, abs=1e-3)
        assert np.arccos(cosines[1]) == pytest.approx((1 - t) * whole, abs=1e-3)


def test_breadcrumbs_keep_the_middle() -> None:
    tau = np.arange(1, 21, dtype=np.float64).reshape(4, 5)
    found = merged("breadcrumbs", [tau], {"beta": 0.25, "gamma": 0.1})
    assert sorted(found[found != 0]) == [14, 15, 16, 17, 18]


def test_della_keeps_large_entries_of_a_row_more_often() -> None:
    tau = np.tile(np.arange(1.0, 5.0), (20_000, 1))
    found = merged("della", [tau])
    kept = (found != 0).mean(0)
    assert np.allclose(kept, [0.15, 0.25, 0.35, 0.45], atol=0.02)
    assert np.allclose(found.mean(0), [1, 2, 3, 4], rtol=0.05)


def test_masks_compare_each_task_with_the_others() -> None:
    given = [np.array([[1.0, 0.1, 2.0]]), np.array([[0.1, 1.0, 2.0]]), np.array([[0.0, -1.0, 0.1]])]
    common = sum(given)
    masks = np.stack([abs(tau) > 0.4 * abs(common - tau) for tau in given])
    assert np.allclose(merged("tall_masks", given), masks * common)
    assert np.allclose(merged("consensus", given), (masks.sum(0) >= 2) * common)


def test_magmax_takes_the_largest_and_the_positive_of_two_equal_ones() -> None:
    given = [np.array([[1.0, -3.0, 2.0]]), np.array([[-2.0, 1.0, -2.0]])]
    assert merged("magmax", given).tolist() == [[-2.0, -3.0, 2.0]]
