"""The one training loop against a plain one, its schedule and its batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taskvec.core.training import Group, Schedule, index_batches, train


def quadratic(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, generator=generator, requires_grad=True), torch.randn(30, 5, generator=generator)


def test_the_loop_equals_pytorch_written_out() -> None:
    ours, data = quadratic(0)
    theirs = ours.detach().clone().requires_grad_()
    schedule = Schedule(steps=10, warmup=3, weight_decay=0.1, clip=0.5)
    losses = train([Group([ours], 0.1)], lambda x: (ours - x).square().sum(), data, schedule)
    optimizer = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    expected = []
    for step in range(10):
        loss = (theirs - data[step]).square().sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        optimizer.step()
        rates.step()
        expected.append(float(loss.detach()))
    assert torch.equal(ours, theirs)
    assert losses == pytest.approx(expected)


def test_accumulated_batches_equal_one_large_batch() -> None:
    results = []
    for accumulate, batches in ((1, [torch.arange(4)] * 3), (2, [torch.arange(2), torch.arange(2, 4)] * 3)):
        point, data = quadratic(1)

        def loss(batch: torch.Tensor, point: torch.Tensor = point, data: torch.Tensor = data) -> torch.Tensor:
            return (point - data[batch]).square().sum(1).mean()

        train([Group([point], 0.1)], loss, batches, Schedule(3, accumulate=accumulate))
        results.append(point.detach())
    assert torch.allclose(results[0], results[1], atol=1e-6)


def test_groups_do_not_feel_each_other() -> None:
    alone, data = quadratic(2)
    together, other = alone.detach().clone().requires_grad_(), torch.full((5,), 100.0, requires_grad=True)
    train([Group([alone], 0.1)], lambda x: (alone - x).square().sum(), data, Schedule(5))
    both = [Group([together], 0.1), Group([other], 0.7)]
    train(both, lambda x: (together - x).square().sum() + (other - x).square().sum(), data, Schedule(5))
    assert torch.allclose(alone, together)


def test_the_schedule_rises_then_falls_to_zero() -> None:
    schedule = Schedule(steps=100, warmup=10)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert schedule.factor(100) == pytest.approx(0)


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_shows_no_sample_twice(count: int, size: int, seed: int) -> None:
    size = min(size, count)
    epoch = list(itertools.islice(index_batches(count, size, seed), count // size))
    seen = torch.cat(epoch).tolist()
    assert len(seen) == len(set(seen))
    assert all(len(batch) == size for batch in epoch)
    again = list(itertools.islice(index_batches(count, size, seed), count // size))
    assert all(torch.equal(a, b) for a, b in zip(epoch, again, strict=True))
