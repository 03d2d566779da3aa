"""Encoders linearised in their weights: the first-order Taylor expansion around the pre-trained ones.

A linearised encoder has no deeper structure than its gradient features, so that task vectors trained on it interfere
less (Ortiz-Jimenez et al., "Task arithmetic in the tangent space", arXiv 2305.12827, section 5).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from taskvec.core.errors import TaskvecError
from taskvec.weights.flat import Weights

Function = Callable[[nn.Module, Tensor], Tensor]
"""What an encoder computes of a batch of images: features of images, or of their patches."""
DERIVING = threading.RLock()
"""Who has it may take a forward derivative."""


class Applied(nn.Module):
    """A function of a module and of images as a module, so that its parameters can be replaced for one call."""

    def __init__(self, module: nn.Module, function: Function) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, images: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch *patches width"]:
        """Apply the function."""
        return self.function(self.module, images)


def jvp_features(
    module: nn.Module, function: Function, images: Float[Tensor, "batch ..."], base: Weights
) -> Float[Tensor, "batch *patches width"]:
    """Return f(x; theta_0) + J(x; theta_0) (theta - theta_0) of a module with parameters theta; ``base`` is theta_0.

    One forward pass carries the derivative along (arXiv 2305.12827, equation 6); it is differentiable in theta.
    Buffers, such as the statistics of batch norm, are those of theta_0: only parameters have a direction.
    Raises for an encoder with an operation that has no forward derivative.
    """
    applied, state = Applied(module, function), base.state()
    fixed = {f"module.{name}": state[name] for name, _ in module.named_buffers() if name in state}
    start = {f"module.{name}": state[name] for name, _ in module.named_parameters()}
    change = {f"module.{name}": (parameter - state[name]) for name, parameter in module.named_parameters()}
    try:
        with differentiable():
            outputs = jvp(lambda weights: functional_call(applied, weights | fixed, images), (start,), (change,))
            value, slope = outputs[0], outputs[1]
    except NotImplementedError as error:
        raise TaskvecError(
            f"a {type(module).__name__} cannot be linearised: {str(error).splitlines()[0]}",
            "leave out the regime linearised for this backbone",
        ) from None
    total: Tensor = value + slope
    return total


@contextmanager
def differentiable() -> Iterator[None]:
    """Take the plain paths of attention inside: the fused ones have no forward derivative.

    The first derivative makes torch script some of its own functions, and warn of that. These switches, and the level
    of a derivative, are the whole process's: one thread at a time is inside.
    """
    with DERIVING:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"`torch\.jit\.script", FutureWarning)
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)
