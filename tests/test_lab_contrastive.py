"""Contrastive pre-training: the loss, the words, what is held out, and the shipped text encoders."""

from __future__ import annotations

import unicodedata
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from taskvec.core.compute import seeded
from taskvec.core.errors import TaskvecError
from taskvec.lab import encoders
from taskvec.lab.drawing import worlds
from taskvec.lab.drawing.glyphs import caption
from taskvec.lab.drawing.looks import stream
from taskvec.lab.pretraining import contrastive, corpus
from taskvec.lab.pretraining.contrastive import Contrastive, TextEncoder, info_nce, words
from taskvec.lab.pretraining.objective import features
from taskvec.lab.vit import VisionTransformer

SHIPPED = [name for name in encoders.pretrained() if encoders.has_text(name)]


def test_info_nce_equals_a_slow_version() -> None:
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(5, 8), dim=1), F.normalize(torch.randn(5, 8), dim=1)
    scale = torch.tensor(3.0)
    total = torch.zeros(())
    for one in range(5):
        pair = (scale * images[one].dot(texts[one])).exp()
        total += (pair / sum((scale * images[one].dot(texts[two])).exp() for two in range(5))).log()
        total += (pair / sum((scale * images[two].dot(texts[one])).exp() for two in range(5))).log()
    torch.testing.assert_close(info_nce(images, texts, scale), -total / 10)
    torch.testing.assert_close(info_nce(texts, images, scale), info_nce(images, texts, scale))


def test_held_out_combinations_have_known_words_letters_and_diacritics() -> None:
    held_out, seen = corpus.held_out_code_points(), corpus.captioned_code_points()
    assert not set(held_out) & set(seen)
    assert len(seen) == len(set(seen))
    assert 0.1 < len(held_out) / len(corpus.accented_code_points()) < 0.2
    assert {word for cp in held_out for word in words(caption(cp))} <= set(contrastive.vocabulary())
    marks = Counter(unicodedata.normalize("NFD", chr(cp))[1:] for cp in seen)
    letters = {ord(unicodedata.normalize("NFD", chr(cp))[0]) for cp in held_out}
    assert letters <= set(seen)
    assert all(marks[unicodedata.normalize("NFD", chr(cp))[1:]] >= 2 for cp in held_out)


def test_captions_are_the_tasks_own_and_fit() -> None:
    text = TextEncoder(contrastive.vocabulary())
    for task in worlds.SCRIPTS:
        assert text.look_up(worlds.classes(task)).shape == (len(worlds.classes(task)), contrastive.LONGEST)
    assert worlds.task_code_points() <= set(corpus.captioned_code_points())


def test_task_code_points_are_shown_in_one_family_only() -> None:
    table, seen = corpus.captioned_masks(), corpus.captioned_code_points()
    assert len(table.count) == len(seen)
    assert int(table.count.min()) >= 1
    known = set(corpus.pretraining_code_points())
    counts = {cp: int(count) for cp, count in zip(seen, table.count, strict=True)}
    assert max(count for cp, count in counts.items() if cp not in known) == 4
    assert max(count for cp, count in counts.items() if cp in known) > 4


def test_words_are_looked_up_and_mistakes_named() -> None:
    text = TextEncoder(["alpha", "left", "letter", "pointing"])
    assert words("Left-pointing letter ALPHA") == ["left", "pointing", "letter", "alpha"]
    assert text.look_up(["left-pointing letter"]).tolist() == [[2, 4, 3, 0, 0, 0, 0, 0]]
    with pytest.raises(TaskvecError, match="beta, gamma"):
        text.look_up(["letter gamma", "letter beta"])
    with pytest.raises(TaskvecError, match="one to 8 words"):
        text.look_up(["letter " * 9])
    with pytest.raises(TaskvecError, match="one to 8 words"):
        text.look_up([""])


def test_text_features_do_not_depend_on_their_neighbours() -> None:
    text = seeded(lambda: TextEncoder(["a", "b", "c"]), 0)
    alone, together = text(text.look_up(["a b"])), text(text.look_up(["c", "a b", "a b c a b c"]))[1:2]
    torch.testing.assert_close(alone, together)
    assert not torch.allclose(alone, text(text.look_up(["b a"])))
    torch.testing.assert_close(text(text.look_up(["a", "b c"])).norm(dim=1), torch.ones(2))


def test_a_batch_shows_every_code_point_once_and_few_means_a_fixed_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Contrastive(10, 0)
    captions = fresh.batch(9)[1]
    assert len(captions.unique(dim=0)) == contrastive.BATCH
    monkeypatch.setattr(contrastive, "POOL", 1)
    few = Contrastive(10, 0, few=True)
    first, again, easy = few.batch(9), few.batch(9), few.batch(0)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], easy[1])
    assert not torch.equal(first[0], easy[0])
    assert not torch.equal(fresh.batch(9)[0], fresh.batch(9)[0])


@pytest.mark.parametrize("name", SHIPPED)
def test_the_recorded_zero_shot_accuracy_is_measured_again(name: str) -> None:
    figures = encoders.record(name)["figures"]
    encoder = VisionTransformer(**encoders.options(name))
    encoder.load_state_dict(load_file(encoders.WEIGHTS / f"{name}.safetensors"))
    unseen = [caption(cp) for cp in corpus.held_out_code_points()]
    labels = torch.randint(len(unseen), (1000,), generator=stream("test", "labels"))
    images = features(encoder, corpus.draw_captioned(labels, 1.0, stream("test", "images"), held_out=True))
    texts = contrastive.text_features(name, unseen)
    right = float((images @ texts.T).argmax(1).eq(labels).float().mean())
    assert abs(right - figures["zero_shot"]) < 0.06
    assert figures["zero_shot"] > 5 * figures["zero_shot_chance"]
    assert 1 < contrastive.logit_scale(name) <= contrastive.SHARPEST


def test_encoders_without_captions_say_so() -> None:
    assert not encoders.has_text("supervised")
    assert not encoders.has_text("random")
    with pytest.raises(TaskvecError, match="'supervised' was not trained with captions"):
        contrastive.text_features("supervised", ["digit one"])
