"""Passes of images through an encoder: batches by rule, and CUDA graphs for encoders that are bound by launches."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from taskvec.core.cuda_steps import capturing
from taskvec.core.errors import first_line
from taskvec.core.notes import note
from taskvec.core.progress import Progress, no_progress
from taskvec.data.uploads import Images, batches

Look = Callable[[Tensor], Tensor]
"""Takes uint8 pixels of a batch on the device and returns float32 features."""
ON_CPU = 256
"""Images a batch on a CPU."""
FEWEST, MOST = 64, 1024
"""Images a batch on a GPU."""
LARGEST = 2**30
"""Bytes that the largest output of a layer may take for a batch, in float32; what lives at once is a few times that."""
SMALL = 2**22
"""Parameters of encoders that are bound by launches: the lab's have 0.8 million, the smallest of timm's more."""
EAGER = 16
"""Batches that pass before a graph is captured: it takes as long as launching about as many."""


@dataclass
class Passes:
    """How the images of one encoder pass a GPU: ``size`` images a batch, 0 until it is measured, and its graphs."""

    size: int = 0
    graphs: dict[Hashable, Recorded] = field(default_factory=dict)

    def halve(self, device: str) -> None:
        """Take half as many images a batch from now on, as memory is short."""
        self.graphs.clear()
        self.size //= 2
        torch.cuda.empty_cache()
        note(f"out of memory on {device}: {self.size} images a batch from here on")


def collect(
    look: Look, images: Images, size: int, device: str, width: int, progress: Progress = no_progress
) -> Float[Tensor, "count *patches width"]:
    """Return what ``look`` returns for all images, ``size`` at a time; nothing waits for the device."""
    out, start = torch.empty(0, width, device=device), 0
    for pixels in batches(images, size, device):
        features = look(pixels)
        out = out if start else torch.empty(len(images), *features.shape[1:], device=device)
        out[start : start + len(features)] = features
        start += len(features)
        progress(start / len(images))
    return out


def images_per_batch(module: nn.Module, look: Look, size: int, device: str) -> int:
    """Return how many images of ``size`` pixels a batch has on a GPU: a power of two that its memory does not change.

    It is the largest, from ``FEWEST`` to ``MOST``, for which no layer's output takes more than ``LARGEST`` bytes.
    """
    numbers = [1]

    def measure(_module: nn.Module, _inputs: object, output: object) -> None:
        numbers.extend([output.numel()] if isinstance(output, Tensor) else [])

    hooks = [part.register_forward_hook(measure) for part in module.modules()]
    try:
        look(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    fitting = LARGEST // (4 * max(numbers))
    return int(min(max(2 ** (fitting.bit_length() - 1), FEWEST), MOST)) if fitting else FEWEST


def is_small(module: nn.Module) -> bool:
    """Return whether an encoder is so small that launching its kernels takes longer than they do."""
    return sum(parameter.numel() for parameter in module.parameters()) <= SMALL


def has_hooks(module: nn.Module) -> bool:
    """Return whether something listens to a module's layers, which a recording would not tell."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class Recorded:
    """A ``look`` for batches of one size, as a CUDA graph once it has run often enough; shorter ones are filled up.

    The graph reads the encoder's weights where they lie, so that it sees them move. What it returns is overwritten by
    the next call. Batches have one size before it is captured too, so that features do not depend on when that is.
    """

    def __init__(self, look: Look, module: nn.Module, size: int) -> None:
        self.look, self.module, self.size = look, module, size
        self.pixels: UInt8[Tensor, "size 3 side side"] | None = None
        self.features: Float[Tensor, "size *patches width"] | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self, pixels: UInt8[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch *patches width"]:
        """Return the features of at most ``size`` images."""
        if self.pixels is None:
            self.pixels = torch.zeros(self.size, *pixels.shape[1:], dtype=pixels.dtype, device=pixels.device)
        self.pixels[: len(pixels)].copy_(pixels)
        if has_hooks(self.module):
            return self.look(self.pixels)[: len(pixels)]
        self.calls += 1
        if self.calls == EAGER + 1:
            self.capture(self.pixels)
        if self.graph is None or self.features is None:
            return self.look(self.pixels)[: len(pixels)]
        self.graph.replay()
        return self.features[: len(pixels)]

    def capture(self, pixels: UInt8[Tensor, "size 3 side side"]) -> None:
        """Record the launches of one batch; where that fails they are made each time, with a note."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(pixels.device)
        try:
            with torch.cuda.device(pixels.device), capturing(graph, stream):
                self.features = self.look(pixels)
        except RuntimeError as error:
            note(f"no CUDA graph of a {type(self.module).__name__}, which runs as before: {first_line(error)}")
        else:
            self.graph = graph
