"""The lab's images: the same for the same arguments, balanced, and never shared between splits or with pre-training."""

from __future__ import annotations

import hashlib
import unicodedata

import numpy as np
import pytest
import torch

from taskvec.core.errors import TaskvecError
from taskvec.lab.drawing import glyphs, worlds
from taskvec.lab.drawing.looks import Look, grow, paint, stream, thicken
from taskvec.lab.pretraining import corpus


def digests(images: np.ndarray) -> set[str]:
    return {hashlib.sha256(image.tobytes()).hexdigest() for image in images}


@pytest.mark.parametrize("task", worlds.TASKS)
def test_same_arguments_draw_the_same_images(task: str) -> None:
    images, labels = worlds.draw(task, "train", 60, seed=3)
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    again, same = worlds.draw(task, "train", 60, seed=3)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert images.shape == (60, 3, 32, 32)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, same)
    other, _ = worlds.draw(task, "train", 60, seed=4)
    assert not np.array_equal(images, other)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    worlds.draw("signs", "test", 10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("task", worlds.TASKS)
def test_splits_share_no_image_and_every_class_appears(task: str) -> None:
    train, train_labels = worlds.draw(task, "train", 400)
    test, test_labels = worlds.draw(task, "test", 200)
    assert not digests(train) & digests(test)
    names = worlds.classes(task)
    assert len(set(names)) == len(names)
    for labels in (train_labels, test_labels):
        counts = np.bincount(labels, minlength=len(names))
        assert len(counts) == len(names)
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1


def test_digits_come_from_different_sources_and_are_capped() -> None:
    split = worlds.digit_split()
    assert not set(split["train"]) & set(split["test"])
    assert len(split["train"]) + len(split["test"]) == 1797
    train, labels = worlds.draw("digits", "train", 4000)
    test, _ = worlds.draw("digits", "test", 4000)
    assert (len(train), len(test)) == (1297, 500)
    assert not digests(train) & digests(test)
    assert np.bincount(labels).min() > 100


def test_pretraining_shows_no_glyph_of_a_task() -> None:
    classes, used = corpus.pretraining_code_points(), worlds.task_code_points()
    assert len(classes) > 300
    assert not set(classes) & used
    for code_point in classes:
        parts = unicodedata.normalize("NFKD", chr(code_point))
        assert not {ord(part) for part in parts} & used
        assert not {"LATIN", "GREEK", "CYRILLIC", "ARMENIAN"} & set(unicodedata.name(chr(code_point)).split())
    shapes = {mask.tobytes() for mask in glyphs.font_masks(sorted(used), glyphs.TEXT_FONTS)}
    shown = {mask.numpy().tobytes() for mask in corpus.pretraining_masks().masks}
    assert not shapes & shown


def test_tied_to_task() -> None:
    tied = {"é", "ѐ", "ά", "①", "⒜", "⇶", "➔", "ᴀ", "օ"}
    assert {character for character in tied if corpus.tied_to_task(ord(character))} == tied
    assert not corpus.tied_to_task(ord("ლ"))
    assert not corpus.tied_to_task(ord("∮"))


def test_difficulty_runs_from_clean_to_full() -> None:
    easy, _ = corpus.draw_pretraining(32, 0.0, stream("a"))
    assert torch.equal(easy[:, 0], easy[:, 1])
    assert easy.amin() == 0
    assert easy.amax() == 255
    hard, _ = corpus.draw_pretraining(32, 1.0, stream("a"))
    assert (hard[:, 0] != hard[:, 1]).any(1).any(1).float().mean() > 0.9


def test_clean_look_keeps_the_glyph_in_place() -> None:
    mask = glyphs.glyph_mask("DejaVuSans", ord("ლ"))
    assert mask is not None
    image = paint(torch.from_numpy(mask)[None].float() / 255, Look(), stream("b"))[0, 0].float()
    shrunk = torch.nn.functional.interpolate(torch.from_numpy(mask)[None, None].float(), (32, 32), mode="bilinear")
    assert torch.corrcoef(torch.stack([image.flatten(), shrunk.flatten()]))[0, 1] > 0.98


def test_growing_is_max_pooling() -> None:
    ink = torch.rand(2, 1, 40, 40, generator=stream("d"))
    torch.testing.assert_close(grow(ink), torch.nn.functional.max_pool2d(ink, 3, 1, 1))
    weight = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    thick, thin = thicken(ink, weight)
    torch.testing.assert_close(thick, grow(ink)[0])
    torch.testing.assert_close(thin, -grow(-ink)[1])


def test_missing_and_empty_glyphs_have_no_mask() -> None:
    assert glyphs.glyph_mask("DejaVuSans", glyphs.MISSING) is None
    assert glyphs.glyph_mask("cmss10", ord("ლ")) is None
    assert glyphs.glyph_mask("DejaVuSans", ord(" ")) is None


def test_a_mask_of_two_classes_is_left_out() -> None:
    first, second, shared = (np.full((40, 40), value, np.uint8) for value in (1, 2, 3))
    table = glyphs.mask_table([[first, shared], [second, shared]])
    assert table.count.tolist() == [1, 1]
    labels = torch.tensor([0, 1, 1, 0])
    assert (table.pick(labels, stream("c"))[:, 0, 0] * 255).round().tolist() == [1, 2, 2, 1]


def test_mistakes_are_explained() -> None:
    with pytest.raises(TaskvecError, match="did you mean 'street'"):
        worlds.draw("streets", "train", 10)
    with pytest.raises(TaskvecError, match="lab split 'validation'"):
        worlds.draw("street", "validation", 10)
    with pytest.raises(TaskvecError, match="cannot draw 0"):
        worlds.draw("street", "train", 0)
    with pytest.raises(TaskvecError, match="lab task"):
        worlds.classes("greeks")
