"""Modules made without values: no random numbers are drawn and no memory is taken for what a file holds anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taskvec.core.compute import seeded

RANDOM = {torch.rand, torch.randn}
FILLED = {torch.zeros, torch.ones, torch.full}
LARGE = 2**20
"""Numbers that a tensor of one value may have, to be made with it: larger ones are parameters, such as tables."""
INITIALISERS = {
    "uniform_", "normal_", "trunc_normal_", "erfinv_", "fill_", "zero_", "mul_", "add_", "sub_", "div_", "clamp_",
    "copy_", "constant_", "ones_", "zeros_", "kaiming_uniform_", "kaiming_normal_",
}  # fmt: skip
"""Functions that set the values of their first argument and leave its shape."""


class Uninitialised(TorchFunctionMode):
    """Inside, parameters are not initialised, and what is random, or one large value, is made on the meta device.

    What is computed (tables of positions, indices, masks) has its values. The mode is its thread's alone.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, or not."""
        kwargs = kwargs or {}
        if func in RANDOM | FILLED and kwargs.get("device") is None and kwargs.get("out") is None:
            hollow = func(*args, **kwargs | {"device": "meta"})
            if func in RANDOM or hollow.numel() > LARGE:
                return hollow
        elif getattr(func, "__name__", "") in INITIALISERS:
            first = args[0] if args else kwargs.get("tensor")
            if isinstance(first, nn.Parameter) or (isinstance(first, Tensor) and first.is_meta):
                return first
        return func(*args, **kwargs)


def skeleton(make: Callable[[], nn.Module]) -> nn.Module | None:
    """Return a module whose parameters have no values, and all else has; None where that cannot be.

    Tensors that no file holds need values: where one of them is random, only a module made as ever has it.
    """
    try:
        with Uninitialised():
            module = seeded(make, 0)
    except Exception:  # modules of many libraries, which may compute with what has no values
        return None
    for parameter in module.parameters():
        hollow = torch.empty_like(parameter, device="meta")
        torch.utils.swap_tensors(parameter, nn.Parameter(hollow, parameter.requires_grad))
    return None if any(tensor.is_meta for tensor in unkept(module)) else module


def unkept(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a module that its state dictionary does not hold."""
    kept = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    for part in module.modules():
        for tensor in tensors_in(vars(part).values()):
            if id(tensor) not in kept:
                yield tensor


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among values and in the dictionaries, lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from tensors_in(value.values())
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
