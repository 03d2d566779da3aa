"""Masked pre-training (MAE, arXiv 2111.06377): see a few patches of a glyph and paint the others."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor, nn

from taskvec.core.compute import seeded
from taskvec.lab.pretraining import objective
from taskvec.lab.pretraining.corpus import draw_pretraining
from taskvec.lab.pretraining.objective import BATCH, Objective, normalised
from taskvec.lab.vit import Block, VisionTransformer, sine_positions

MASKED = 8
"""Patches of the 16 that are hidden."""
DECODER_WIDTH = 64
FLAT = 1e-2
"""Variance of the pixels of a patch below which it counts as flat, so that its noise is not enlarged."""

Batch = tuple[Tensor, Tensor]
"""Normalised images and, for each, a random order of its patches; the first ``MASKED`` are hidden."""


def choose(tokens: Float[Tensor, "batch tokens width"], places: Int64[Tensor, "batch chosen"]) -> Tensor:
    """Take from every row of tokens those at its own places: [batch, chosen, width]."""
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))


def random_orders(count: int, tokens: int, generator: Generator) -> Int64[Tensor, "count tokens"]:
    """Draw a random order of the tokens of every image."""
    return torch.rand(count, tokens, generator=generator).argsort(1)


def standardised(patches: Float[Tensor, "batch tokens pixels"]) -> Float[Tensor, "batch tokens pixels"]:
    """Give every patch zero mean and, unless it is flat, unit variance (section 3 of the paper)."""
    variance, mean = torch.var_mean(patches, 2, correction=0, keepdim=True)
    return (patches - mean) / (variance + FLAT).sqrt()


class Decoder(nn.Module):
    """Latents of the visible patches in, pixels of all patches out: one narrow transformer block."""

    positions: Tensor

    def __init__(self, encoder: VisionTransformer, width: int = DECODER_WIDTH, heads: int = 4) -> None:
        """Make a decoder of ``width`` channels for the patches of ``encoder``."""
        super().__init__()
        self.entrance = nn.Linear(encoder.width, width)
        self.mask = nn.Parameter(0.02 * torch.randn(width))
        self.block = Block(width, heads)
        self.norm = nn.LayerNorm(width)
        self.exit = nn.Linear(width, 3 * encoder.patch**2)
        positions = sine_positions(encoder.extent, encoder.extent, width, encoder.extent)
        self.register_buffer("positions", positions, persistent=False)

    def forward(
        self, latents: Float[Tensor, "batch visible width"], visible: Int64[Tensor, "batch visible"]
    ) -> Float[Tensor, "batch tokens pixels"]:
        """Put the latents in their places and mask tokens in all others, and predict the pixels of each."""
        entering = self.entrance(latents)
        masks = self.mask.expand(len(latents), len(self.positions), -1)
        tokens = masks.scatter(1, visible[:, :, None].expand_as(entering), entering)
        pixels: Tensor = self.exit(self.norm(self.block(tokens + self.positions)))
        return pixels


class MaskedAutoencoder(Objective[Batch]):
    """Mean squared error on the standardised pixels of the hidden patches; the encoder gets the visible ones only."""

    def __init__(self, steps: int, seed: int) -> None:
        """Make encoder and decoder from ``seed``."""
        super().__init__("mae", steps, seed)
        self.encoder, self.decoder = seeded(self.make, seed)
        self.modules = nn.ModuleList([self.encoder, self.decoder])

    def make(self) -> tuple[VisionTransformer, Decoder]:
        """Make the encoder, then the decoder."""
        encoder = VisionTransformer()
        return encoder, Decoder(encoder)

    def batch(self, step: int) -> Batch:
        """Draw images of the few classes, from clean to full difficulty, and what to hide of each."""
        return self.draw(BATCH, self.difficulty(step), self.generator)

    def draw(self, count: int, difficulty: float, generator: Generator) -> Batch:
        """Draw images and orders of their patches."""
        images, _ = draw_pretraining(count, difficulty, generator, few=True)
        return normalised(images), random_orders(count, self.encoder.extent**2, generator)

    def reconstruct(
        self, images: Float[Tensor, "batch 3 32 32"], visible: Int64[Tensor, "batch visible"]
    ) -> Float[Tensor, "batch tokens pixels"]:
        """Predict the standardised pixels of every patch from the visible ones."""
        latents = self.encoder.encode(choose(self.encoder.embed(images), visible))
        patches: Tensor = self.decoder(latents, visible)
        return patches

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the mean squared error on the hidden patches."""
        images, order = batch
        hidden, visible = order[:, :MASKED], order[:, MASKED:]
        guess = choose(self.reconstruct(images, visible), hidden)
        truth = choose(standardised(self.encoder.patches(images)), hidden)
        return (guess - truth).square().mean()

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Measure the error on clean and on hard images of another random stream."""
        generator = self.held_out()
        clean, hard = (self.draw(objective.HELD_OUT, level, generator) for level in (0.0, 1.0))
        return {"held_out_error_clean": float(self.loss(clean)), "held_out_error": float(self.loss(hard))}
