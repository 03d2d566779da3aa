"""What a merging method sees of a model: one entry of all task vectors at a time, and what it may know beside it.

The same functions serve a study, whose vectors are flat buffers in memory, and files that are streamed.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the command lists methods without loading torch
    from jaxtyping import Bool, Float32, Shaped
    from numpy import ndarray
    from torch import Tensor

    from taskvec.core.progress import Progress
    from taskvec.data.tasks import Task
    from taskvec.encoders.backbone import Backbone
    from taskvec.learning.heads import Head
    from taskvec.weights.flat import Weights

Kind = Literal["matrix", "embedding", "vector"]
"""What an entry is: a linear map (linear layer, convolution), a table of vectors, or anything of fewer dimensions."""
TABLES = re.compile(
    r"pos(ition(al)?)?_?embed|(cls|reg|class|mask|register|dist)_?tokens?|class_embedding|text_projection"
    r"|embeddings\.(word|position|token)|word_embedding|embed_(tokens|positions|in)\b|(^|\.)w[tp]e\."
    r"|(tok(en)?|token_type|query|rel|relative)_?embed(?!.*\bproj)|(^|\.)emb(ed|edding|eddings)?\.weight"
    r"|(^|(^|\.)(model|encoder|decoder|transformer)\.)shared\.weight|bias_table|attention_bias(es)?\b"
    r"|rel_pos_([hw]|bias|emb)"
)
"""Names of entries with two or more dimensions that are no linear maps (a row stands for a position or a token), and of
CLIP's text projection, which the authors of the spectral methods leave out too."""
EXPERTS = re.compile(r"(^|[._])experts?[._]")
"""Names of what a mixture has for each expert, in a stack if it has three dimensions."""
NUMBERED = re.compile(r"(?:^|\.)((?:\d+\.)+)")
"""Numbered modules, one inside another (torchvision's features.3.0)."""
LAYERS = re.compile(r"(?:^|[._])(?:res)?(?:blocks?|layers?|stages?|levels?|h)[._]?(\d+)(?=\.)")
"""Where a name says which layer it belongs to; what has several numbers (stages.1.blocks.2) has all of them."""


@dataclass(frozen=True)
class Entry:
    """One named tensor of a model, or a slice of its flattened elements if a recipe is elementwise.

    ``base`` is the pre-trained tensor in float32; ``depth`` is l / (L - 1) for layer l of L, 0 outside of the layers,
    None where no name tells a layer; ``start`` is the position of a slice in its entry. ``global_statistics`` is what
    the method's global pass returned, ``statistics`` what was measured on data for this entry, tasks first or summed
    over them, ``drawn`` how many methods before this one of the recipe have drawn numbers.
    """

    name: str
    base: Float32[Tensor, " *shape"]
    kind: Kind
    depth: float | None = None
    seed: int = 0
    start: int = 0
    global_statistics: Any = None
    statistics: Tensor | None = None
    drawn: int = 0

    @property
    def whole(self) -> Any:
        """The global statistics, by the name that plugins know."""
        return self.global_statistics

    def uniform(self, task: int) -> Float32[Tensor, " *shape"]:
        """Return numbers in [0, 1) of 24 bits each, drawn from the seed, the entry's name and the task's place.

        Methods that draw one after the other have numbers of their own. A counter (Philox) gives them, so that neither
        the order of entries, nor slices, nor the device matter.
        """
        import numpy as np
        import torch

        after = f"\n{self.drawn}" if self.drawn else ""
        key = hashlib.sha256(f"{self.seed}\n{self.name}\n{task}{after}".encode()).digest()[:16]
        source = np.random.Philox(key=int.from_bytes(key, "little"))
        source.advance(self.start // 4)
        skip = self.start % 4
        bits = source.random_raw(self.base.numel() + skip)[skip:] >> np.uint64(40)
        return torch.from_numpy(bits.astype(np.float32) / 2.0**24).view(self.base.shape).to(self.base.device)


def array(values: Any) -> Shaped[ndarray, " *shape"]:
    """Return the numbers of a tensor on any device, or those of an array."""
    import numpy as np

    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)


Part = Entry
"""The name by which plugins know an entry."""
Entries = Iterable[tuple[Entry, "Float32[Tensor, ' tasks ...']"]]
"""All entries of all task vectors, in any order; it can be iterated over as often as a method needs passes."""


@dataclass(frozen=True)
class Masked:
    """What a per-task method gives for one entry: task t moves by rescales[t] * masks[t] * common, a shared vector."""

    common: Float32[Tensor, " *shape"]
    masks: Bool[Tensor, " tasks *shape"]
    rescales: Float32[Tensor, " tasks"]

    def of(self, task: int) -> Float32[Tensor, " *shape"]:
        """Return one task's direction."""
        return self.common * self.masks[task] * self.rescales[task]


@dataclass(frozen=True)
class Data:
    """What a method that looks at data is given: the tasks' vectors, images and heads, in one order.

    A vector is read when it is asked for: who goes over them holds one.
    """

    backbone: Backbone
    vectors: Sequence[Weights]
    tasks: Sequence[Task]
    heads: Sequence[Head]
    seed: int = 0
    progress: Progress = lambda share: None


def kind_of(name: str, shape: Sequence[int]) -> Kind:
    """Say what an entry is, by its name and shape alone, so that a study and a file agree.

    A matrix has two dimensions or more, its first and the product of its others both above 1, and no table's name. The
    stacked maps of several experts are no single one.
    """
    if len(shape) < 2:
        return "vector"
    rows, columns = shape[0], math.prod(shape[1:])
    table = TABLES.search(name) or (len(shape) == 3 and EXPERTS.search(name))
    return "matrix" if min(rows, columns) > 1 and not table else "embedding"


def depths(names: Iterable[str]) -> dict[str, float | None]:
    """Return the relative depth l / (L - 1) of every entry; None for all where no name tells a layer.

    Layers are counted within a tower (what stands before the first number). What has no number, such as a patch
    embedding or a final norm, is at 0, as in the code of LiNeS (arXiv 2410.17146).
    """
    names = list(names)
    numbered = {_before(name) for name in names if LAYERS.search(name) and NUMBERED.search(_tower(name) + ".")}
    places_of = {name: _place(name, numbered) for name in names}
    towers: dict[str, set[tuple[int, ...]]] = {}
    for tower, layer in places_of.values():
        if layer:
            towers.setdefault(tower, set()).add(layer)
    if not towers:
        return dict.fromkeys(names)
    places = {
        tower: {layer: index / max(1, len(layers) - 1) for index, layer in enumerate(sorted(layers))}
        for tower, layers in towers.items()
    }
    return {name: places[tower][layer] if layer else 0.0 for name, (tower, layer) in places_of.items()}


def _place(name: str, numbered: Container[str]) -> tuple[str, tuple[int, ...]]:
    """Return the tower of an entry and the numbers of its layer, none outside of the layers.

    Where blocks stand inside numbered modules (features.3.0.block.2), those modules are the layers.
    """
    outer = NUMBERED.search(name)
    if outer and _before(name) in numbered:
        return _before(name), tuple(int(number) for number in outer.group(1).split(".") if number)
    return _tower(name), tuple(int(match.group(1)) for match in LAYERS.finditer(name))


def _before(name: str) -> str:
    match = NUMBERED.search(name)
    return name[: match.start(1)] if match else ""


def _tower(name: str) -> str:
    match = LAYERS.search(name)
    return name[: match.start(1)].rstrip("0123456789.") if match else ""


def describe(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[Kind, float | None]]:
    """Return the kind and the relative depth of every floating-point entry of a model."""
    by_name = depths(shapes)
    return {name: (kind_of(name, shape), by_name[name]) for name, shape in shapes.items()}
