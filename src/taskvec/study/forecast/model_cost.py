"""What an encoder costs, without a weight of it: parameters, FLOPs of an image, activations, and the view it wants.

The lab's and the paper's transformers follow a formula; any other architecture is built on torch's meta device and its
operations are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from taskvec.core.errors import TaskvecError
from taskvec.data.images import Preprocessing
from taskvec.encoders.addresses import BackboneAddress, parse
from taskvec.encoders.backbone import check_size, checked_features
from taskvec.encoders.loaders import families
from taskvec.encoders.loaders.requests import Outline
from taskvec.lab import encoders
from taskvec.paper.checkpoints import PAPER as CHECKPOINTS

KEPT = 18
"""Numbers that a transformer block keeps of every channel of every token for its backward pass, with fused attention:
two norms, queries, keys and values, attention and its projection, four times the width twice, and three sums."""


@dataclass(frozen=True)
class ModelCost:
    """What one forward pass of one image costs, and what an encoder takes; a multiply-add is two FLOPs.

    ``activations`` are the numbers kept for the backward pass; ``view`` is what it wants decoded, None if unknown.
    """

    parameters: int
    flops: float
    activations: float
    width: int
    size: int
    view: Preprocessing | None = None


@dataclass(frozen=True)
class Transformer:
    """The shape of a vision transformer: ``projection`` is the width of CLIP's embedding, 0 for none.

    ``stem`` is the width of a hidden layer in the patch embedding (the lab's), 0 for a single linear layer.
    """

    width: int
    depth: int
    patch: int
    class_token: bool = True
    projection: int = 0
    stem: int = 0

    def cost(self, size: int, crop: float = 1.0) -> ModelCost:
        """Count a square input of ``size`` pixels: 24 n w^2 + 4 n^2 w FLOPs a block of n tokens, w channels."""
        patches, width, pixels = (size // self.patch) ** 2, self.width, 3 * self.patch**2
        tokens = patches + self.class_token
        embedding = pixels * self.stem + self.stem * width if self.stem else pixels * width
        blocks = self.depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
        places = tokens * width + width if self.class_token else 0
        parameters = self.depth * (12 * width**2 + 13 * width) + embedding + self.stem + 3 * width + places
        return ModelCost(
            parameters + width * self.projection,
            float(blocks + 2 * patches * embedding + 2 * width * self.projection),
            float(KEPT * tokens * width * self.depth),
            self.projection or width,
            size,
            Preprocessing(size, crop),
        )


PAPER: Mapping[str, Transformer] = MappingProxyType(
    {name: Transformer(*row.shape, projection=row.projection) for name, row in CHECKPOINTS.items()}
)
"""The encoders of the paper's tables, by the names of ``paper.MODELS``."""


def model_cost(address: str | BackboneAddress, size: int | None, projection: bool | None = None) -> ModelCost | None:
    """Return what a backbone costs at an input size, its own by default; None where nothing here tells its shape.

    An encoder that cannot look at images of that size raises.
    """
    address = parse(address)
    if address.kind == "paper":
        shape = PAPER[address.name] if projection is not False else replace(PAPER[address.name], projection=0)
        return shape.cost(size or 224, CHECKPOINTS[address.name].crop)
    if address.kind == "lab":
        return lab_cost(encoders.split_step(address.name)[0], size)
    try:
        record, seen = architecture(address, size, projection)
    except (TaskvecError, OSError):
        return None
    return counted(record, seen, str(address), size)


def lab_cost(name: str, size: int | None) -> ModelCost:
    """Count one of the lab's transformers."""
    options = encoders.options(name) | ({"size": size} if size else {})
    width = options["width"]
    shape = Transformer(width, options["depth"], options["patch"], class_token=False, stem=2 * width)
    return shape.cost(options["size"])


def architecture(address: str | BackboneAddress, size: int | None, projection: bool | None = None) -> Outline:
    """Return the record from which a module can be built, and how it sees images; of most families from files."""
    family, asked = families.find(address, size, allow_pickle=True, projection=projection)
    if family.outline is not None:
        return family.outline(asked)
    if family.missing(asked):
        raise TaskvecError(f"'{address}' is not on this machine", "give a file")
    loaded = families.load(asked, family)
    return loaded.architecture, loaded.preprocessing


def counted(
    record: Mapping[str, Any],
    seen: Callable[[Any], Preprocessing] | None = None,
    name: str = "the encoder",
    asked: int | None = None,
) -> ModelCost:
    """Build an encoder on the meta device, which holds shapes and no numbers, and count one forward pass.

    A size that is ``asked`` for must be one that the encoder can look at.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        module = families.build(record).eval()
    check_size(module, asked, name)
    size, kept = record["options"]["size"], [0]

    def count(part: torch.nn.Module, _: Any, out: Any) -> None:
        if not isinstance(part, torch.nn.Identity | torch.nn.Dropout) and isinstance(out, torch.Tensor):
            kept[0] += out.numel()

    for part in module.modules():
        if not list(part.children()):
            part.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        features = checked_features(module, torch.zeros(1, 3, size, size, device="meta"), name)
    parameters = sum(value.numel() for value in module.state_dict().values() if value.is_floating_point())
    view = seen(module) if seen else None
    return ModelCost(parameters, float(counter.get_total_flops()), float(kept[0]), features.shape[1], size, view)
