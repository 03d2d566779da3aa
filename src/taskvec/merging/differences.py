"""How fine-tuned weights in files differ from their base: norms by layer, cosines, changed entries. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float64
from numpy import ndarray

from taskvec.merging.entries import LAYERS
from taskvec.merging.on_disk import Streams

NUMBERED = re.compile(r"(?:^|\.)[^.]*\d+(?=\.)")
"""The first numbered part of a name, where it tells no layer otherwise."""
OUTPUT = re.compile(r"^(?!.*embed)(.*\.)?(norm|fc|head|classifier|ln_(f|post|final)|final|pool|post|lm_head|proj)")
"""Names that come after the layers; all others without a number come before."""


@dataclass(frozen=True)
class Differences:
    """Differences from the base: ``tensors`` has a row a tensor and checkpoint, ``products`` <tau_i, tau_j> by layer.

    Columns of ``tensors``: fine_tuned, layer, tensor, entries, base_norm, norm (of tau), changed (entries that differ).
    """

    labels: tuple[str, ...]
    tensors: pd.DataFrame
    products: dict[str, Float64[ndarray, "tasks tasks"]]

    def by_layer(self) -> pd.DataFrame:
        """Return a row for each checkpoint and layer, in the order of the base: fine_tuned, layer, entries, ..."""
        return _summed(self.tensors, ["fine_tuned", "layer"])

    def by_checkpoint(self) -> pd.DataFrame:
        """Return a row for each checkpoint."""
        return _summed(self.tensors, ["fine_tuned"])

    def cosines(self) -> pd.DataFrame:
        """Return a row for each pair of checkpoints and layer ("" for all): layer, first, second, cosine."""
        overall: Float64[ndarray, "tasks tasks"] = sum(self.products.values(), np.zeros((len(self.labels),) * 2))
        rows = [
            (layer, self.labels[i], self.labels[j], cosine(products, i, j))
            for layer, products in {"": overall, **self.products}.items()
            for i in range(len(self.labels))
            for j in range(i + 1, len(self.labels))
        ]
        return pd.DataFrame(rows, columns=["layer", "first", "second", "cosine"])


def cosine(products: Float64[ndarray, "tasks tasks"], i: int, j: int) -> float:
    """Return the cosine of two vectors from all products; 0 where one of them is zero."""
    norms = float(np.sqrt(products[i, i] * products[j, j]))
    return float(products[i, j]) / norms if norms else 0.0


def _summed(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Add up entries, changes and squared norms, and relate the norm to the base's."""
    squared = rows.assign(base_norm=rows["base_norm"] ** 2, norm=rows["norm"] ** 2)
    sums = squared.groupby(keys, sort=False, as_index=False)[["entries", "changed", "base_norm", "norm"]].sum()
    sums[["base_norm", "norm"]] **= 0.5
    sums["relative"] = (sums["norm"] / sums["base_norm"]).where(sums["base_norm"] > 0)
    sums["share"] = sums["changed"] / sums["entries"].clip(lower=1)
    return sums


def layer_of(name: str) -> str:
    """Return the layer that a tensor belongs to: up to the last layer's number, or its module where there is none.

    ``blocks.3.attn.qkv.weight`` is in blocks.3, ``patch_embed.proj.bias`` in patch_embed.proj.
    """
    matches = [*LAYERS.finditer(name)][-1:] or [*NUMBERED.finditer(name)][:1]
    return name[: matches[0].end()] if matches else name.rpartition(".")[0] or name


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names of entries from a model's input to its output, as far as they tell; numbers count as numbers."""

    def key(name: str) -> tuple[float, list[tuple[bool, int, str]]]:
        layered = LAYERS.search(name) or NUMBERED.search(name)
        place = 0.5 if layered else float(bool(OUTPUT.search(name)))
        return place, [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]

    return sorted(names, key=key)


def measure(streams: Streams) -> Differences:
    """Return the differences of checkpoints from their base, measured in one pass over the files and in float64."""
    labels = tuple(checkpoint.label for checkpoint in streams.tuned)
    tasks = len(labels)
    names = in_order(streams.matched.merged)
    products = {layer_of(name): np.zeros((tasks, tasks)) for name in names}
    changed = {name: np.zeros(tasks, np.int64) for name in names}
    squares = {name: np.zeros(tasks + 1) for name in names}
    for entry, vectors in streams:
        exact = np.asarray(vectors, np.float64)
        gram = exact @ exact.T
        products[layer_of(entry.name)] += gram
        changed[entry.name] += np.count_nonzero(vectors, axis=1)
        base = np.asarray(entry.base, np.float64)
        squares[entry.name] += [*np.diagonal(gram), base @ base]
    rows = [
        (labels[i], layer_of(name), name, streams.base.tensors[name].size, squares[name][-1] ** 0.5,
         squares[name][i] ** 0.5, changed[name][i])
        for i in range(tasks)
        for name in names
    ]  # fmt: skip
    columns = ["fine_tuned", "layer", "tensor", "entries", "base_norm", "norm", "changed"]
    return Differences(labels, pd.DataFrame(rows, columns=columns), products)
