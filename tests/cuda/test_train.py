"""Training on a GPU: a loop written out, graphs and compiled encoders, repeated bits, crops there."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tasks import colour_task

import taskvec as tv
from taskvec.core.compute import arithmetic
from taskvec.core.notes import listen
from taskvec.core.settings import Finetune
from taskvec.core.training import FETCH, DivergedError, Group, Schedule, train
from taskvec.data.decoding import Whole
from taskvec.data.images import Preprocessing
from taskvec.data.resampling import resized_crops
from taskvec.data.tasks import Split, Task
from taskvec.encoders.backbone import Backbone, assemble
from taskvec.lab.vit import VisionTransformer
from taskvec.learning import batches, finetuning
from taskvec.learning.heads import random_head
from taskvec.weights.flat import Weights

pytestmark = pytest.mark.cuda
SETTINGS = Finetune(steps=5, batch_size=16, warmup=2, learning_rate=2e-4)
LONG = SETTINGS.model_copy(update={"steps": 30})


@pytest.fixture
def task() -> Task:
    return make_task()


def make_backbone(device: str) -> Backbone:
    torch.manual_seed(0)
    module = VisionTransformer(size=32, patch=8, width=64, depth=2, heads=2)
    architecture = {"family": "lab", "options": module.architecture}
    return assemble("tiny", module, Preprocessing(size=32), architecture, device)


def make_task() -> Task:
    """Make a task of 32 pixels."""
    task = colour_task("warm", 3, 1)
    splits = [Split(s.images.repeat(4, 2).repeat(4, 3), s.labels) for s in (task.train, task.validation, task.test)]
    return Task("warm", task.classes, *splits)


def make_photos() -> Task:
    """Make the same task with whole images of many sizes to train on."""
    task, generator = make_task(), np.random.default_rng(0)
    shapes = generator.integers(34, 60, (60, 2))
    pixels = generator.integers(100, 156, int(3 * shapes.prod(1).sum())).astype(np.uint8)
    train = Split(task.train.images, task.train.labels, Whole(pixels, shapes))
    return Task("photos", task.classes, train, task.validation, task.test)


def tuned(device: str, task: Task, settings: Finetune, precision: str = "float32") -> tuple[Weights, list[float]]:
    backbone = make_backbone(device)
    result = finetuning.finetune_tasks(
        backbone, [task], [random_head(backbone.width, 3, 0)], settings, precision=precision
    )
    return result.encoder, list(result.losses)


def test_five_steps_equal_those_of_a_cpu(task: Task) -> None:
    ours, losses = tuned("cuda", task, SETTINGS)
    want, known = tuned("cpu", task, SETTINGS)
    assert torch.allclose(ours.flat.cpu(), want.flat, atol=1e-4)
    assert losses == pytest.approx(known, abs=1e-4)


def test_five_steps_equal_a_loop_written_out(task: Task) -> None:
    backbone, head = make_backbone("cuda"), random_head(64, 3, 0).on("cuda")
    module = copy.deepcopy(backbone.module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=SETTINGS.learning_rate, weight_decay=SETTINGS.weight_decay)
    stream = batches.training_batches(backbone, task.train, SETTINGS.batch_size, 0)
    with arithmetic("float32", "cuda"):
        for factor in (0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * i / 3)) for i in range(3))):
            optimizer.param_groups[0]["lr"] = SETTINGS.learning_rate * factor
            images, labels = next(stream)
            F.cross_entropy(F.linear(module(images), head.weight, head.bias), labels).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    state = tuned("cuda", task, SETTINGS)[0].state()
    assert all(torch.allclose(state[name], want, atol=1e-4) for name, want in module.state_dict().items())


def test_a_graph_takes_the_steps_of_the_loop(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    with listen() as notes:
        graphed, losses = tuned("cuda", task, LONG)
    monkeypatch.setattr(finetuning, "GRAPHED", 0)
    eager, known = tuned("cuda", task, LONG)
    assert not notes
    assert torch.allclose(graphed.flat, eager.flat, atol=1e-4)
    assert losses == pytest.approx(known, abs=1e-4)
    assert losses[-1] < losses[0]


def test_a_compiled_encoder_learns_the_same(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "GRAPHED", 0)
    eager, known = tuned("cuda", task, SETTINGS)
    monkeypatch.setattr(finetuning, "COMPILED_STEPS", 1)
    with listen() as notes:
        compiled, losses = tuned("cuda", task, SETTINGS)
    assert not notes
    assert torch.allclose(compiled.flat, eager.flat, atol=1e-4)
    assert losses == pytest.approx(known, abs=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [make_task, make_photos])
def test_training_twice_gives_the_same_bits(make: Callable[[], Task], precision: str) -> None:
    (first, losses), (second, again) = (tuned("cuda", make(), LONG, precision) for _ in range(2))
    assert torch.equal(first.flat, second.flat)
    assert losses == again


def test_bfloat16_learns(task: Task) -> None:
    _, losses = tuned("cuda", task, LONG.model_copy(update={"steps": 120, "learning_rate": 1e-3}), "bfloat16")
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_dropout_draws_anew_in_every_step_of_a_graph() -> None:
    weight = torch.zeros(1000, device="cuda", requires_grad=True)
    data = iter([torch.ones(1000, device="cuda")] * 20)
    torch.manual_seed(0)
    losses = train(
        [Group([weight], 1e-9)], lambda x: F.dropout(x, 0.5).mean() + weight.sum() * 0, data, Schedule(20), graph=True
    )
    assert len(set(losses)) > 10


def test_learning_rates_of_groups_move_in_a_graph() -> None:
    results = []
    for graph in (False, True):
        torch.manual_seed(0)
        points = [torch.randn(5, device="cuda", requires_grad=True) for _ in range(2)]
        data = iter(torch.randn(40, 5, device="cuda"))
        groups = [Group([points[0]], 0.1), Group([points[1]], 0.01)]
        loss = lambda x, points=points: sum((p - x).square().sum() for p in points)  # noqa: E731
        train(groups, loss, data, Schedule(20, warmup=3, accumulate=2), graph=graph)  # type: ignore[arg-type]
        results.append(torch.cat(points).detach())
    assert torch.allclose(*results, atol=1e-5)


def test_what_cannot_be_captured_is_trained_with_a_note() -> None:
    point = torch.ones(3, device="cuda", requires_grad=True)
    data = iter([torch.ones(3, device="cuda")] * 20)
    with listen() as notes:
        losses = train([Group([point], 0.1)], lambda x: (point * float(x.sum())).sum(), data, Schedule(20), graph=True)
    assert len(losses) == 20
    assert len(notes) == 1
    assert "without a CUDA graph" in notes[0]
    assert len(F.dropout(point, 0.5)) == 3  # random numbers are still drawn, and graphs captured
    torch.cuda.empty_cache()


def test_a_loss_that_is_not_finite_is_told_with_its_step() -> None:
    point = torch.ones(3, device="cuda", requires_grad=True)

    def data() -> Iterator[torch.Tensor]:
        for step in range(2 * FETCH):
            yield torch.full((3,), math.nan if step == 6 else 1.0, device="cuda")

    with pytest.raises(DivergedError, match=r"at learning rate 0\.1: the loss of step 7 of 100 is nan") as caught:
        train([Group([point], 0.1)], lambda x: (point * x).sum(), data(), Schedule(2 * FETCH), finite=True)
    assert len(caught.value.losses) == 7


def test_an_operation_without_a_deterministic_form_is_taken_with_a_note() -> None:
    image = torch.rand(1, 1, 8, 8, device="cuda", requires_grad=True)
    loss = lambda x: (F.interpolate(image, scale_factor=2, mode="bicubic") - x).square().mean()  # noqa: E731
    with listen() as notes:
        train([Group([image], 0.1)], loss, iter([torch.zeros((), device="cuda")] * 4), Schedule(4))
    assert len(notes) == 1
    assert "last digits" in notes[0]
    assert not torch.are_deterministic_algorithms_enabled()


def test_crops_on_the_device_are_those_of_the_cpu() -> None:
    whole = make_photos().train.whole
    assert whole is not None
    indices = list(range(20))
    arrays = [torch.from_numpy(a) for a in (whole.pixels, whole.starts[indices], whole.shapes[indices])]
    boxes = torch.tensor([whole.box(index, 1, 2) for index in indices])
    here = resized_crops(*arrays, boxes, whole.longest_side(), 32)
    for precision in ("float32", "tf32"):
        with arithmetic(precision, "cuda"):
            there = resized_crops(*(a.cuda() for a in arrays), boxes.cuda(), whole.longest_side(), 32)
        assert torch.equal(there.cpu(), here)


def test_batches_do_not_depend_on_where_pixels_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, tasks = make_backbone("cuda"), (make_task(), make_photos())
    near = [next(batches.training_batches(backbone, t.train, 8, 3)) for t in tasks]
    monkeypatch.setattr(batches, "fits", lambda *_: False)
    monkeypatch.setattr(Backbone, "resident", lambda self, images: images)
    far = [next(batches.training_batches(backbone, t.train, 8, 3)) for t in tasks]
    cpu = [next(batches.training_batches(make_backbone("cpu"), t.train, 8, 3)) for t in tasks]
    for place, ours in enumerate(near):
        for other in (far[place], cpu[place]):
            assert torch.equal(ours[1].cpu(), other[1].cpu())
            assert torch.allclose(ours[0].cpu(), other[0].cpu(), atol=0.1 if place else 1e-4)


def test_a_fine_tuned_encoder_is_measured_where_it_learned(task: Task) -> None:
    backbone, head = make_backbone("cuda"), random_head(64, 3, 0)
    weights = tv.finetune(backbone, task, head, LONG.model_copy(update={"steps": 120, "learning_rate": 1e-3}))
    assert weights.flat.device.type == "cuda"
    assert tv.evaluate(backbone, weights, [task], [head], "test")["warm"] > 0.6
