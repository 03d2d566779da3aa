"""Adapters of low rank on an encoder's layers (LoRA, arXiv 2106.09685), by peft; their product is added in the end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from taskvec.core.errors import TaskvecError, did_you_mean
from taskvec.core.settings import Lora
from taskvec.weights.flat import Weights, align

ABLE = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
"""Layers that may have an adapter."""


def library() -> Any:
    """Import peft, or name the extra that brings it."""
    try:
        import peft
    except ImportError:
        raise TaskvecError("the regime lora needs peft", "pip install 'taskvec[lora]'") from None
    return peft


def add(module: nn.Module, lora: Lora, name: str) -> nn.Module:
    """Put adapters on a module's layers, in place, and return what trains and merges them; only they learn."""
    peft, chosen = library(), adapted_layers(module, lora, name)
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=exactly(chosen), lora_dropout=0.0)
    adapted: nn.Module = peft.LoraModel(module, config, "default")
    return adapted


def exactly(names: Sequence[str]) -> str:
    """Return the regular expression of some names and no others; peft takes a list for the ends of names."""
    return "|".join(re.escape(name) for name in names)


def adapted_layers(module: nn.Module, lora: Lora, name: str) -> list[str]:
    """Return the names of the layers that get an adapter: all linear ones, or those whose names end as is asked.

    Raises for an end that no layer has, and for two layers that share a weight, which two adapters would tear apart.
    """
    able = {path: part for path, part in module.named_modules() if isinstance(part, ABLE) and not is_part(path, module)}
    if not lora.layers:
        chosen = [path for path, part in able.items() if not isinstance(part, nn.Conv2d)]
    else:
        for end in lora.layers:
            if not any(ends(path, end) for path in able):
                known = sorted({path.rpartition(".")[2] for path in able})
                raise TaskvecError(f"lora.layers: '{name}' has no layer '{end}'", did_you_mean(end, known))
        chosen = [path for path in able if any(ends(path, end) for end in lora.layers)]
    if not chosen:
        raise TaskvecError(f"'{name}' has no linear layer for an adapter", "name convolutions in lora.layers")
    check_shared(module, chosen, name)
    return chosen


def is_part(path: str, module: nn.Module) -> bool:
    """Say whether a layer belongs to torch's own multi-head attention, which reads its weight and does not call it."""
    above = path.rpartition(".")[0]
    return bool(above) and isinstance(module.get_submodule(above), nn.MultiheadAttention)


def ends(path: str, end: str) -> bool:
    """Say whether a layer's name is ``end`` or ends with it, whole parts only."""
    return path == end or path.endswith(f".{end}")


def check_shared(module: nn.Module, chosen: list[str], name: str) -> None:
    """Raise where a layer with an adapter shares a weight with another layer."""
    owners = [(id(weight), path) for path, weight in module.named_parameters(remove_duplicate=False)]
    counts = Counter(weight for weight, _ in owners)
    shared = [path for weight, path in owners if counts[weight] > 1]
    for path in shared:
        if any(path.startswith(f"{layer}.") for layer in chosen):
            raise TaskvecError(
                f"'{name}' shares '{path}' between layers, to which adapters of their own cannot be added",
                "name other layers in lora.layers",
            )


def parameters(adapted: nn.Module) -> Iterator[nn.Parameter]:
    """Yield what learns."""
    return (parameter for parameter in adapted.parameters() if parameter.requires_grad)


def merged(adapted: nn.Module, like: Weights) -> Weights:
    """Add alpha / rank * B A to every layer with an adapter; return the encoder's weights in ``like``'s layout."""
    merging: Any = adapted
    return align(merging.merge_and_unload().state_dict(), like, "the encoder with its adapters")
