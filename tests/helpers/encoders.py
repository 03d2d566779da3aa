"""A tiny encoder."""

from __future__ import annotations

import torch
from torch import nn


class TinyEncoder(nn.Module):
    """A two-layer encoder with batch norm, so that it has float and integer buffers, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 4, stride=4)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.third.weight = self.second.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(images)).relu().mean((2, 3))
        return self.third(self.second(hidden).tanh())


class Planted(TinyEncoder):
    """A tiny encoder whose features, in lower precision, overflow or lose what tells classes apart."""

    def __init__(self, factor: float, offset: float) -> None:
        super().__init__()
        self.last = nn.Linear(6, 6)
        self.last.weight.data = factor * torch.eye(6)
        nn.init.constant_(self.last.bias, offset)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(super().forward(images))
