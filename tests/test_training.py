"""The one training loop against a plain one, its schedule and its batches."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taskvec.core import cuda_steps
from taskvec.core.notes import listen
from taskvec.core.training import (
    DivergedError,
    Group,
    Losses,
    Schedule,
    index_batches,
    make_optimizer,
    set_rates,
    train,
)


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


def poisoned(step: int) -> Iterator[torch.Tensor]:
    """Yield data without end, with NaN in that of one step."""
    yield from (torch.full((5,), math.nan if place == step else 1.0) for place in itertools.count())


@pytest.mark.parametrize("step", [0, 3])
def test_a_loss_that_is_not_finite_is_told_with_its_step_and_the_rate(step: int) -> None:
    point, _ = quadratic(0)
    loss = lambda x: (point - x).square().sum()  # noqa: E731
    message = rf"learning rate 0\.25: the loss of step {step + 1} of 9 is nan\nlower the learning rate"
    with pytest.raises(DivergedError, match=message) as caught:
        train([Group([point], 0.25)], loss, poisoned(step), Schedule(9), finite=True)
    assert len(caught.value.losses) == step + 1
    assert all(map(math.isfinite, caught.value.losses[:-1]))
    assert caught.value.mended_by("rest").losses == caught.value.losses


def test_problems_that_share_a_loop_may_diverge_without_each_other() -> None:
    lost, other = torch.ones(5, requires_grad=True), torch.ones(5, requires_grad=True)
    groups = [Group([lost], 0.1), Group([other], 0.1)]
    losses = train(groups, lambda x: (lost * x).sum() + other.square().sum(), poisoned(2), Schedule(6))
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, False, False, False]
    assert other.isfinite().all()
    assert not lost.isfinite().any()


def test_a_training_that_is_resumed_ends_where_one_without_a_break_does() -> None:
    schedule, ends, known = Schedule(steps=9, warmup=2), [], []
    for parts in ([range(9)], [range(4), range(4, 9)]):
        point, data = quadratic(3)
        groups, losses = [Group([point], 0.1)], []
        optimizer = make_optimizer(groups, schedule)
        for steps in parts:
            loss = lambda x, point=point: (point - x).square().sum()  # noqa: E731
            losses += train(groups, loss, data[steps.start :], schedule, optimizer=optimizer, steps=steps)
        ends.append(point.detach())
        known.append(losses)
    assert torch.equal(*ends)
    assert known[0] == known[1]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_losses_that_are_fetched_rarely_are_all_there(count: int) -> None:
    losses = Losses(range(10, 10 + count), Schedule(20), [Group([torch.zeros(1)], 0.1)], finite=True)
    losses.every, losses.recent = 3, torch.zeros(3)
    for value in range(count):
        losses.add(torch.tensor(float(value)))
        assert len(losses.values) == (value + 1) // 3 * 3
    assert losses.fetched() == list(map(float, range(count)))


def test_a_loss_that_is_fetched_late_is_told_with_its_own_step() -> None:
    losses = Losses(range(10, 20), Schedule(20), [Group([torch.zeros(1)], 0.1)], finite=True)
    losses.every, losses.recent = 4, torch.zeros(4)
    losses.add(torch.tensor(1.0))
    losses.add(torch.tensor(math.inf))
    with pytest.raises(DivergedError, match="the loss of step 12 of 20 is inf"):
        losses.fetched()


def test_rates_that_are_tensors_are_written_in_place() -> None:
    groups = [Group([torch.zeros(1)], 0.5), Group([torch.zeros(1)], 2.0)]
    optimizer = make_optimizer(groups, Schedule(3))
    rate = torch.tensor(0.0)
    optimizer.param_groups[1]["lr"] = rate
    set_rates(optimizer, groups, 0.25)
    assert [float(settings["lr"]) for settings in optimizer.param_groups] == [0.125, 0.5]
    assert optimizer.param_groups[1]["lr"] is rate


class FakeGraph:
    """What is captured on a GPU without being computed, for a step that adds batches to a total."""

    step: Sequence[torch.Tensor] = ()

    def replay(self) -> None:
        graphed = self.graphed
        graphed.loss.copy_(graphed.step(graphed.inputs))

    graphed: cuda_steps.GraphedStep


@pytest.mark.parametrize("able", [True, False])
def test_a_graph_sees_every_batch_once_and_in_its_own_buffers(monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    total = torch.zeros(2)

    def step(batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        for first, second in batches:
            total.add_(first * second)
        return total.sum()

    @contextlib.contextmanager
    def capture(graph: FakeGraph, _: None) -> Iterator[None]:
        graph.graphed, before = graphed, total.clone()
        yield
        total.copy_(before)  # to capture is not to compute
        if not able:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(cuda_steps, "capturing", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    optimizer = make_optimizer([Group([total], 0.1)], Schedule(8))
    graphed = cuda_steps.GraphedStep(step, optimizer)
    data = torch.arange(32.0).view(8, 2, 2)
    with listen() as notes:
        losses = [float(graphed([(first, second), (second, first)])) for first, second in data]
    assert losses == [float(2 * data[: place + 1].prod(1).sum()) for place in range(8)]
    assert (graphed.graph is not None) == able
    assert len(notes) == (not able)
    assert optimizer.param_groups[0]["capturable"] == able


@pytest.mark.parametrize("told", [True, False])
def test_a_capture_that_fails_is_ended_everywhere(monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    @contextlib.contextmanager
    def capture(graph: FakeGraph, **options: object) -> Iterator[None]:
        ended.append(options["pool"])
        yield

    def end(*device_and_pool: object) -> None:
        ended.append(device_and_pool)
        if told:
            raise RuntimeError("not currently recording to mempool_id")

    ended: list[object] = []
    generator, stream = mock.Mock(), mock.Mock(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    with pytest.raises(RuntimeError, match="stream is capturing"), cuda_steps.capturing(mock.Mock(), stream):
        raise RuntimeError("operation not permitted when stream is capturing")
    assert ended == [(0, 7), (0, (0, 7))]
    generator.graphsafe_set_state.assert_called_once_with(generator.clone_state())


def test_an_operation_without_a_deterministic_form_is_taken_with_a_note() -> None:
    calls = []

    def step(batches: Sequence[int]) -> torch.Tensor:
        calls.append(torch.are_deterministic_algorithms_enabled())
        if calls[-1]:
            raise RuntimeError("resize_backward does not have a deterministic implementation, but you set ...")
        return torch.tensor(float(batches[0]))

    optimizer = make_optimizer([Group([torch.zeros(1)], 0.1)], Schedule(1))
    taken = cuda_steps.tolerant(step, optimizer)  # type: ignore[arg-type]
    torch.use_deterministic_algorithms(True)
    try:
        with listen() as notes:
            assert float(taken([3])) == 3
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == [True, False]
    assert "resize_backward" in notes[0]


def test_another_error_of_a_step_is_an_error() -> None:
    def step(_: Sequence[int]) -> torch.Tensor:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        cuda_steps.tolerant(step, make_optimizer([Group([torch.zeros(1)], 0.1)], Schedule(1)))([1])  # type: ignore[arg-type]
