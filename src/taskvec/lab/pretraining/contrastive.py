"""Contrastive pre-training of images with captions (CLIP, arXiv 2103.00020): glyphs and their Unicode names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from safetensors.torch import load_file
from torch import Tensor, nn

from taskvec.core.compute import seeded, threads
from taskvec.core.errors import TaskvecError
from taskvec.lab import encoders
from taskvec.lab.drawing.glyphs import caption
from taskvec.lab.drawing.looks import stream
from taskvec.lab.pretraining import objective
from taskvec.lab.pretraining.corpus import captioned_code_points, draw_captioned, held_out_code_points
from taskvec.lab.pretraining.objective import BATCH, Objective, features, normalised
from taskvec.lab.vit import Block, VisionTransformer

POOL = 312
"""Batches in the small data set: 19968 images."""
LONGEST = 8
"""Words of a caption at most."""
SHARPEST = 100.0
"""The logit scale at most."""

Batch = tuple[Tensor, Tensor]
"""Normalised images and the words of their captions."""


def words(caption: str) -> list[str]:
    """Split a caption into words, at hyphens too."""
    return caption.lower().replace("-", " ").split()


def vocabulary() -> tuple[str, ...]:
    """Return the words of all captions that contrastive pre-training sees, in alphabetical order."""
    return tuple(sorted({word for code_point in captioned_code_points() for word in words(caption(code_point))}))


class TextEncoder(nn.Module):
    """Captions in, one feature vector each out: two transformer blocks over learned word embeddings, then the mean."""

    def __init__(self, vocabulary: Sequence[str], width: int = 128, depth: int = 2, heads: int = 4) -> None:
        """Make a text encoder; index 0 stands for no word."""
        super().__init__()
        self.indices = {word: index for index, word in enumerate(vocabulary, start=1)}
        self.embedding = nn.Embedding(len(vocabulary) + 1, width)
        self.places = nn.Parameter(torch.zeros(LONGEST, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def look_up(self, captions: Sequence[str]) -> Int64[Tensor, "captions 8"]:
        """Return the indices of the words of captions, filled up with zeros; an unknown word raises."""
        split = [words(caption) for caption in captions]
        if unknown := sorted({word for caption in split for word in caption} - self.indices.keys()):
            raise TaskvecError(f"no caption in pre-training had: {', '.join(unknown)}", "name what it has seen")
        if any(not 1 <= len(caption) <= LONGEST for caption in split):
            raise TaskvecError(f"a caption has one to {LONGEST} words", "shorten it")
        rows = [[self.indices[word] for word in caption] + [0] * (LONGEST - len(caption)) for caption in split]
        return torch.tensor(rows)

    def forward(self, indices: Int64[Tensor, "captions 8"]) -> Float[Tensor, "captions width"]:
        """Return L2-normalised features: the mean over each caption's words, projected."""
        there = (indices > 0).float()[:, :, None]
        tokens = self.norm(self.blocks(self.embedding(indices) + self.places))
        return F.normalize(self.projection((tokens * there).sum(1) / there.sum(1)), dim=1)

    def scale(self) -> Float[Tensor, ""]:
        """Return the logit scale, the inverse of the temperature."""
        return self.log_scale.exp().clamp(max=SHARPEST)


def info_nce(
    images: Float[Tensor, "batch width"], texts: Float[Tensor, "batch width"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return the symmetric InfoNCE loss of L2-normalised pairs: each finds its partner among all of the batch."""
    logits = scale * images @ texts.T
    partners = torch.arange(len(images))
    return (F.cross_entropy(logits, partners) + F.cross_entropy(logits.T, partners)) / 2


@cache
def load_text(name: str) -> TextEncoder:
    """Load the text encoder that belongs to a shipped contrastive encoder; one without captions raises."""
    path = encoders.text_path(name)
    if path is None:
        known = ", ".join(filter(encoders.has_text, encoders.DESCRIPTIONS))
        raise TaskvecError(f"the encoder '{name}' was not trained with captions", f"choose one of: {known}")
    text = seeded(lambda: TextEncoder(encoders.record(name)["vocabulary"].split()), 0)
    text.load_state_dict(load_file(path))
    return text.eval().requires_grad_(False)


def text_features(name: str, captions: Sequence[str]) -> Float[Tensor, "captions width"]:
    """Return the L2-normalised features of captions from the text encoder of ``name``, such as ``contrastive``.

    A zero-shot head holds ``logit_scale(name)`` times these and is applied to L2-normalised image features. An encoder
    without captions, an unknown word or more than eight words raise ``TaskvecError``.
    """
    text = load_text(name)
    with threads(1):
        features: Tensor = text(text.look_up(captions))
    return features


def logit_scale(name: str) -> float:
    """Return by what a contrastive encoder multiplies cosine similarities to get logits."""
    return float(load_text(name).scale())


class Contrastive(Objective[Batch]):
    """Tell which caption goes with which image; the code points of one batch are distinct, so others are negatives.

    Every image is new (as good as for LAION-2B), or, with ``few``, one of 19968 scenes that are shown again and again:
    glyphs, fonts and all nuisances are fixed, and only their strength follows the curriculum.
    """

    def __init__(self, steps: int, seed: int, few: bool = False) -> None:
        """Make image and text encoder from ``seed`` and look up all captions."""
        super().__init__("contrastive", steps, seed)
        self.few = few
        self.encoder, self.text = seeded(lambda: (VisionTransformer(), TextEncoder(vocabulary())), seed)
        self.modules = nn.ModuleList([self.encoder, self.text])
        self.captions = self.text.look_up([caption(code_point) for code_point in captioned_code_points()])

    def batch(self, step: int) -> Batch:
        """Draw images of distinct code points with their captions, new ones or a batch of the pool."""
        generator = self.generator
        if self.few:
            index = int(torch.randint(POOL, (), generator=generator))
            generator = stream("contrastive", "pool", self.seed, index)
        labels = torch.randperm(len(self.captions), generator=generator)[:BATCH]
        return normalised(draw_captioned(labels, self.difficulty(step), generator)), self.captions[labels]

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the symmetric InfoNCE loss."""
        return info_nce(F.normalize(self.encoder(batch[0]), dim=1), self.text(batch[1]), self.text.scale())

    def figures(self) -> dict[str, float]:
        """Measure zero-shot accuracy on new images of seen code points and of the held-out combinations."""
        generator = self.held_out()
        unseen = self.text.look_up([caption(code_point) for code_point in held_out_code_points()])
        return {
            "captions": len(self.captions),
            "zero_shot_seen": self.zero_shot(self.captions, generator),
            "held_out_captions": len(unseen),
            "zero_shot_chance": 1 / len(unseen),
            "zero_shot": self.zero_shot(unseen, generator, held_out=True),
        }

    @torch.no_grad()
    def zero_shot(self, captions: Tensor, generator: torch.Generator, held_out: bool = False) -> float:
        """Return the share of hard images that are nearest to their own caption among all of ``captions``."""
        labels = torch.randint(len(captions), (objective.HELD_OUT,), generator=generator)
        images = features(self.encoder, draw_captioned(labels, 1.0, generator, held_out))
        return float((images @ self.text(captions).T).argmax(1).eq(labels).float().mean())
