"""Random batches of training images: the same draws wherever pixels lie and whoever makes them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from taskvec.core.notes import listen
from taskvec.core.settings import Finetune
from taskvec.data.decoding import Whole
from taskvec.data.images import Preprocessing
from taskvec.learning.batches import Batch, Stream, crops_here, crops_there, prefetched, stacks, uploads, views
from taskvec.learning.finetuning import images_of_each

TO = Preprocessing(size=16)
LABELS = torch.arange(30) % 3


def some(stream: Stream, count: int = 7) -> list[Batch]:
    return [stream.make(draw) for draw in itertools.islice(stream.draws, count)]


def whole_images(lowest: int, highest: int) -> Whole:
    generator = np.random.default_rng(1)
    shapes = generator.integers(17, 40, (30, 2))
    return Whole(generator.integers(lowest, highest, int(3 * shapes.prod(1).sum())).astype(np.uint8), shapes)


@pytest.mark.parametrize("crops", [True, False])
def test_views_are_the_same_from_an_array_from_a_tensor_and_carried_by_draws(crops: bool) -> None:
    array = np.random.default_rng(0).integers(0, 256, (30, 3, 16, 16)).astype(np.uint8)
    how = (LABELS, TO, 8, 3, crops)
    streams = views(array, *how), views(torch.from_numpy(array), *how), views(array, *how, carried=True)
    want, *others = (some(stream) for stream in streams)
    for batches in others:
        for (images, labels), (same, known) in zip(batches, want, strict=True):
            assert torch.equal(images, same)
            assert torch.equal(labels, known)
    assert len({len(next(views(array, *how, carried=carried).draws)) for carried in (True, False)}) == 2


def test_crops_of_a_device_are_those_of_the_cpu_but_for_a_level_or_two() -> None:
    whole = whole_images(100, 156)
    ours, theirs = (some(make(whole, LABELS, TO, 8, 3)) for make in (crops_there, crops_here))
    levels = [
        abs(a - b) * torch.tensor(TO.std).view(3, 1, 1) * 255 for (a, _), (b, _) in zip(ours, theirs, strict=True)
    ]
    assert max(float(difference.max()) for difference in levels) < 2.5
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0][0], ours[1][0])


@pytest.mark.parametrize("count", [1, 3, 32])
@pytest.mark.parametrize("ahead", [True, False])
def test_draws_that_are_uploaded_together_stay_in_order(count: int, ahead: bool) -> None:
    draws = ((torch.tensor([place]), torch.full((2, 3), float(place))) for place in itertools.count())
    stacked = prefetched(stacks(draws, count)) if ahead else stacks(draws, count)
    for place, (index, parts) in enumerate(itertools.islice(uploads(stacked, "cpu"), 40)):
        assert index.tolist() == [place]
        assert parts.unique().tolist() == [place]


@pytest.mark.parametrize(("batch", "accumulate", "tasks", "images"), [(128, 1, 8, 16), (128, 4, 3, 10), (8, 4, 8, 1)])
def test_a_batch_that_is_smaller_than_its_tasks_is_told(batch: int, accumulate: int, tasks: int, images: int) -> None:
    with listen() as notes:
        assert images_of_each(Finetune(batch_size=batch, accumulate=accumulate), tasks) == images
    assert len(notes) == (batch < accumulate * tasks)
    assert all("8 in 4 passes" in text for text in notes)
