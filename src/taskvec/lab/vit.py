"""The lab's encoder: a small vision transformer whose feature is the mean of its tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def sine_positions(rows: int, columns: int, width: int, extent: int) -> Float[Tensor, "{rows*columns} {width}"]:
    """Return two-dimensional sine-cosine positions of a grid laid over ``extent`` x ``extent`` units.

    A quarter of the ``width`` channels each holds sine and cosine of the row and of the column (as in MoCo v3); a grid
    with fewer or more patches covers the same square, so that a smaller view is a coarser look at the same place.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    vertical = (torch.arange(rows) + 0.5) * (extent / rows)
    horizontal = (torch.arange(columns) + 0.5) * (extent / columns)
    places = torch.cartesian_prod(vertical, horizontal)
    angles = places[:, :, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)


class Block(nn.Module):
    """One pre-norm transformer block: self-attention, then a GELU network four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        """Make a block of ``width`` channels; ``heads`` divides it."""
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def attend(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Mix the tokens of each image by multi-head self-attention."""
        batch, count, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, count, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        heads = F.scaled_dot_product_attention(query, key, value)
        mixed: Tensor = self.projection(heads.transpose(1, 2).reshape(batch, count, width))
        return mixed

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Apply both residual branches."""
        tokens = tokens + self.attend(self.norm1(tokens))
        change: Tensor = self.contract(F.gelu(self.expand(self.norm2(tokens))))
        return tokens + change


class VisionTransformer(nn.Module):
    """Images in, one feature vector each out: the mean over patches after the final norm, no class token."""

    positions: Tensor

    def __init__(self, size: int = 32, patch: int = 8, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        """Draw Xavier-uniform weights and zero biases; ``size`` and ``patch`` are in pixels."""
        super().__init__()
        for number, most in ((size, 4096), (patch, 64), (width, 2048), (depth, 48), (heads, 64)):
            if not isinstance(number, int) or not 0 < number <= most:
                raise ValueError(f"size, patch, width, depth or heads of {str(number)[:20]}, and not 1 to {most}")
        if size % patch or width % heads or width % 4:
            raise ValueError(f"{patch} must divide {size}, and {heads} and 4 must divide {width}")
        self.architecture = {"size": size, "patch": patch, "width": width, "depth": depth, "heads": heads}
        self.patch, self.width, self.extent = patch, width, size // patch
        self.embedding = nn.Sequential(nn.Linear(3 * patch * patch, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("positions", self.grid_positions(self.extent, self.extent), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def grid_positions(self, rows: int, columns: int) -> Float[Tensor, "{rows*columns} {self.width}"]:
        """Return the positions of a grid of patches that covers the same square as the full image."""
        return sine_positions(rows, columns, self.width, self.extent)

    def patches(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens pixels"]:
        """Cut images into square patches, row by row, each flattened with its channels first."""
        batch, channels, height, width = images.shape
        rows, columns = height // self.patch, width // self.patch
        cut = images.reshape(batch, channels, rows, self.patch, columns, self.patch)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * self.patch**2)

    def embed(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens channels"]:
        """Embed every patch and add its position; height and width are multiples of the patch size."""
        rows, columns = images.shape[2] // self.patch, images.shape[3] // self.patch
        usual = rows == columns == self.extent
        positions = self.positions if usual else self.grid_positions(rows, columns).to(self.positions)
        tokens: Tensor = self.embedding(self.patches(images)) + positions
        return tokens

    def encode(self, tokens: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
        """Run the blocks and the final norm on embedded tokens, all of them or a chosen few."""
        final: Tensor = self.norm(self.blocks(tokens))
        return final

    def tokens(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens channels"]:
        """Return the final token of every patch, row by row."""
        return self.encode(self.embed(images))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels"]:
        """Return one feature vector an image; pixels are normalised with mean 0.5 and deviation 0.5 a channel."""
        return self.tokens(images).mean(1)
