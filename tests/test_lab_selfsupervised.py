"""The lab's self-supervised objectives against slow versions of their definitions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from taskvec.core.compute import threads
from taskvec.core.training import Schedule, train
from taskvec.lab.drawing.looks import stream
from taskvec.lab.pretraining import distillation, masked, objective
from taskvec.lab.pretraining.distillation import SelfDistillation
from taskvec.lab.pretraining.masked import MASKED, MaskedAutoencoder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(objective, "HELD_OUT", 32)
    monkeypatch.setattr(masked, "BATCH", 3)
    monkeypatch.setattr(distillation, "BATCH", 4)
    with threads(1):
        yield


def paint_over(images: Tensor, patches: Tensor) -> Tensor:
    """Replace the named 8 x 8 patches of every image by noise."""
    images = images.clone()
    for image, numbers in zip(images, patches.tolist(), strict=True):
        for number in numbers:
            row, column = 8 * (number // 4), 8 * (number % 4)
            image[:, row : row + 8, column : column + 8] = torch.rand(3, 8, 8) * 2 - 1
    return images


def test_half_of_the_patches_are_hidden_and_all_are_ordered() -> None:
    images, order = MaskedAutoencoder(10, 0).batch(0)
    assert images.shape == (3, 3, 32, 32)
    assert order.sort(1).values.tolist() == [list(range(16))] * 3
    assert len({tuple(row) for row in order.tolist()}) == 3
    assert order[:, :MASKED].shape == order[:, MASKED:].shape == (3, 8)


def test_encoder_never_sees_hidden_patches() -> None:
    made = MaskedAutoencoder(10, 0)
    images, order = made.batch(5)
    hidden, visible = order[:, :MASKED], order[:, MASKED:]
    truth = made.reconstruct(images, visible)
    torch.testing.assert_close(made.reconstruct(paint_over(images, hidden), visible), truth, rtol=0, atol=0)
    assert not torch.allclose(made.reconstruct(paint_over(images, visible[:, :1]), visible), truth)


def test_error_is_that_of_hidden_patches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made = MaskedAutoencoder(10, 0)
    images, order = made.batch(5)
    guess = made.reconstruct(images, order[:, MASKED:]).detach()
    error = slow_error(guess, images, order)
    assert value(made.loss((images, order))) == pytest.approx(error, rel=1e-5)
    monkeypatch.setattr(made, "reconstruct", lambda images, visible: guess)
    assert value(made.loss((paint_over(images, order[:, MASKED:]), order))) == pytest.approx(error, rel=1e-5)
    painted = paint_over(images, order[:, :1])
    assert value(made.loss((painted, order))) == pytest.approx(slow_error(guess, painted, order), rel=1e-5)
    assert slow_error(guess, painted, order) != error


def value(loss: Tensor) -> float:
    return float(loss.detach())


def slow_error(guess: Tensor, images: Tensor, order: Tensor) -> float:
    errors = []
    for index, image in enumerate(images.double()):
        for number in order[index, :MASKED].tolist():
            row, column = 8 * (number // 4), 8 * (number % 4)
            pixels = image[:, row : row + 8, column : column + 8].flatten()
            truth = (pixels - pixels.mean()) / math.sqrt(float(pixels.var(correction=0)) + 0.01)
            errors += [(float(a) - float(b)) ** 2 for a, b in zip(guess[index, number], truth, strict=True)]
    return sum(errors) / len(errors)


def test_latents_go_to_their_places_and_mask_tokens_to_the_others() -> None:
    made = MaskedAutoencoder(10, 0)
    made.decoder.block = torch.nn.Identity()  # type: ignore[assignment]
    latents, visible = torch.rand(1, 2, 128), torch.tensor([[9, 4]])
    pixels = made.decoder(latents, visible)
    assert pixels.shape == (1, 16, 192)
    for place in range(16):
        token = made.decoder.entrance(latents[0, [9, 4].index(place)]) if place in (9, 4) else made.decoder.mask
        single = made.decoder.exit(made.decoder.norm(token + made.decoder.positions[place]))
        torch.testing.assert_close(pixels[0, place], single)


def test_views_have_their_shapes_and_range() -> None:
    wide, small = SelfDistillation(10, 0).batch(9)
    assert wide.shape == (8, 3, 32, 32)
    assert small.shape == (4 * distillation.LOCALS, 3, 16, 16)
    assert distillation.eased((0.6, 1.0), 0.5) == pytest.approx((0.8, 1.0))
    assert wide.abs().max() <= 1 and small.abs().max() <= 1
    assert not torch.equal(wide[:4], wide[4:])


def test_crop_of_the_whole_is_the_image() -> None:
    images = torch.rand(2, 3, 32, 32)
    generator = stream("test")
    whole = distillation.crop(images, 32, (2.0, 2.0), generator)
    torch.testing.assert_close(whole, images, rtol=0, atol=1e-4)
    ramp = torch.linspace(-1, 1, 32).expand(200, 3, 32, 32)
    views = distillation.crop(ramp, 16, (0.25, 0.25), generator)
    widths = (views[..., -1] - views[..., 0])[:, 0, 0] / (15 / 16 * 2 * 32 / 31)
    assert widths.min() >= 0.5 * math.sqrt(3 / 4) - 1e-3 and widths.max() <= 0.5 * math.sqrt(4 / 3) + 1e-3
    assert widths.std() > 0.02 and views.mean((1, 2, 3)).std() > 0.1


def test_loss_compares_every_pair_of_different_views() -> None:
    targets = torch.rand(2, 4, 5).softmax(2)
    logits = 10 * torch.randn(3, 4, 5)
    pairs = [
        -sum(float(p) * float(q) for p, q in zip(target[image].double(), log_share(logit[image]), strict=True))
        for t, target in enumerate(targets)
        for v, logit in enumerate(logits)
        for image in range(4)
        if t != v
    ]
    assert len(pairs) == 4 * 4
    assert float(distillation.cross_entropy(targets, logits)) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def log_share(logits: Tensor) -> Tensor:
    wide = logits.double()
    return wide - wide.exp().sum().log()


def test_targets_are_sharpened_and_balanced() -> None:
    logits = 4 * torch.randn(6, 3) + torch.tensor([9.0, 0.0, 0.0])
    shares = [[math.exp(value) for value in row] for row in logits.double().tolist()]
    for _ in range(3):
        filled = [sum(row[column] for row in shares) for column in range(3)]
        shares = [[value / total for value, total in zip(row, filled, strict=True)] for row in shares]
        shares = [[value / sum(row) for value in row] for row in shares]
    torch.testing.assert_close(distillation.balanced(logits), torch.tensor(shares))
    even = distillation.balanced(logits, rounds=1000)
    torch.testing.assert_close(even.sum(0), torch.full((3,), 2.0))
    torch.testing.assert_close(even.sum(1), torch.ones(6))


def test_targets_are_the_teachers() -> None:
    made = SelfDistillation(10, 0)
    wide, _ = made.batch(0)
    output, targets = made.modules.teacher(wide), made.modules.targets(wide)
    assert output.shape == (8, 256) and output.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(targets, distillation.balanced(output / 0.04))
    assert not targets.requires_grad


def test_teacher_gets_no_gradient_and_is_the_moving_average() -> None:
    made = SelfDistillation(4, 0)
    teacher, student = (dict(module.named_parameters()) for module in (made.modules.teacher, made.modules.student))
    start = {name: weight.clone() for name, weight in teacher.items()}
    made.loss(made.batch(0)).backward()
    assert all(weight.grad is None for weight in teacher.values())
    assert all(weight.grad is not None and weight.grad.any() for weight in student.values())
    with torch.no_grad():
        for weight in student.values():
            weight.add_(1)
    made.after_step(1)
    share = 1 - 0.01 * (1 + math.cos(math.pi / 4)) / 2
    for name, weight in teacher.items():
        torch.testing.assert_close(weight, share * start[name] + (1 - share) * student[name])


def test_momentum_rises_to_one() -> None:
    values = [distillation.momentum(step, 100) for step in range(101)]
    assert values[0] == pytest.approx(0.99) and values[100] == 1 and values == sorted(values)


def test_shipped_encoder_is_the_teachers() -> None:
    made = SelfDistillation(10, 0)
    assert made.encoder is made.modules.teacher.encoder
    trained = {id(weight) for group in made.groups() for weight in group.parameters}
    assert trained == {id(weight) for weight in made.modules.student.parameters()}


@pytest.mark.parametrize("kind", [MaskedAutoencoder, SelfDistillation])
def test_only_the_seed_matters(kind: type[MaskedAutoencoder] | type[SelfDistillation]) -> None:
    def run(seed: int, other: int) -> tuple[list[float], Tensor, dict[str, float]]:
        torch.manual_seed(other)
        made = kind(2, seed)
        losses = train(made.groups(), made.loss, map(made.batch, range(2)), Schedule(2), after_step=made.after_step)
        assert torch.equal(torch.random.get_rng_state(), torch.manual_seed(other).get_state())
        return losses, made.encoder.norm.weight.detach().clone(), made.figures()

    first, again, different = run(0, 1), run(0, 2), run(1, 1)
    assert first[0] == again[0] != different[0]
    assert torch.equal(first[1], again[1])
    assert first[2] == again[2] and all(math.isfinite(value) for value in first[2].values())


@pytest.mark.parametrize("kind", [MaskedAutoencoder, SelfDistillation])
def test_state_that_a_resumed_run_needs_is_in_the_modules(
    kind: type[MaskedAutoencoder] | type[SelfDistillation],
) -> None:
    first, second = kind(4, 0), kind(4, 1)
    first.loss(first.batch(0))
    second.modules.load_state_dict(first.modules.state_dict())
    second.generator.set_state(first.generator.get_state())
    assert value(first.loss(first.batch(1))) == value(second.loss(second.batch(1)))
