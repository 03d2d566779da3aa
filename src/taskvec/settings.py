"""Settings of probing, fine-tuning and heatmaps: typed, with the paper's values as defaults (paper, appendix C)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationInfo, field_validator, model_validator

Rate = Annotated[float, Field(gt=0, le=100)]
Count = Annotated[int, Field(ge=1)]
STRIDE = 5
"""A coarse search looks at every fifth scale of the grid, then at neighbours two places and one place away."""


class Settings(BaseModel):
    """Frozen values; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, data: Any) -> Any:
        """Refuse yes and no where a number belongs, which would be taken for 1 and 0."""
        for key, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field is not None and "bool" not in str(field.annotation):
                raise ValueError(f"{key} is {str(value).lower()}, not of the kind that belongs there")
        return data


class Probe(Settings):
    """How linear heads are fitted on frozen features; all learning rates are tried at once.

    One rate serves all tasks of a study (the one with the best mean validation accuracy) unless ``rate_per_task``.
    """

    steps: Count = 2000
    batch_size: Count = 128
    warmup: Annotated[int, Field(ge=0)] = 200
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.1
    learning_rates: Annotated[tuple[Rate, ...], Field(min_length=1)] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    rate_per_task: bool = False


class Finetune(Settings):
    """How an encoder is fine-tuned; ``accumulate`` splits a batch into so many passes.

    With ``learning_rates`` one of them is chosen for each backbone and regime, on the validation split of the study's
    first task (paper, appendix C), and ``learning_rate`` is not used.
    """

    steps: Count = 2000
    batch_size: Count = 128
    accumulate: Count = 1
    learning_rate: Rate = 1e-5
    learning_rates: tuple[Rate, ...] = ()
    warmup: Annotated[int, Field(ge=0)] = 200
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.1


class Lora(Settings):
    """Adapters of low rank: each layer W learns W + alpha / rank * B A (LoRA, arXiv 2106.09685).

    ``layers`` are the ends of the names of the layers that have one (``qkv``, ``mlp.fc1``); all linear ones when empty.
    """

    rank: Count = 8
    alpha: Annotated[FiniteFloat, Field(gt=0)] = 16.0
    layers: tuple[str, ...] = ()


class Negation(Settings):
    """Which task to forget, and which control task is to keep a share of its accuracy (arXiv 2212.04089, section 3).

    ``scales`` are those of the negated task vector, ``start:stop:step``.
    """

    forget: str
    control: str
    scales: str = "0:1:0.05"
    keep: Annotated[float, Field(ge=0, le=1)] = 0.95

    @field_validator("scales")
    @classmethod
    def _positive(cls, scales: str) -> str:
        if min(parse_scales(scales)) < 0:
            raise ValueError("scales of negation are 0 or more: negation puts the sign itself")
        return scales

    def shortened(self) -> Negation:
        """Return what a trial run tries: the ends of the scales."""
        scales = parse_scales(self.scales)
        first, last = scales[0], scales[-1]
        return self.model_copy(update={"scales": f"{first}:{last}:{round(last - first, 10) or 1}"})

    @field_validator("control")
    @classmethod
    def _another(cls, control: str, info: ValidationInfo) -> str:
        if control == info.data.get("forget"):
            raise ValueError(f"'{control}' cannot be forgotten and be the control task; name another")
        return control


class Surgery(Settings):
    """How features are corrected by representation surgery, with its authors' values as defaults (arXiv 2402.02705)."""

    rank: Count = 16
    steps: Count = 1000
    batch_size: Count = 16
    learning_rate: Rate = 1e-3


class Heatmap(Settings):
    """Which disentanglement errors to measure: ``points`` coefficients in [-range, range] an axis, some pairs."""

    pairs: Annotated[int, Field(ge=0)] = 2
    points: Annotated[int, Field(ge=2, le=201)] = 11
    range: Annotated[FiniteFloat, Field(ge=1, le=100)] = 3.0
    samples: Count = 256

    def scales(self) -> list[float]:
        """Return the coefficients of one axis; an odd number of points includes 0."""
        step = 2 * self.range / (self.points - 1)
        return [round(-self.range + index * step, 10) + 0.0 for index in range(self.points)]

    def shortened(self) -> Heatmap:
        """Return what a trial run measures: few pairs, points and images."""
        least = {"pairs": min(self.pairs, 2), "points": min(self.points, 3), "samples": min(self.samples, 8)}
        return self.model_copy(update=least)


class Subsets(Settings):
    """Which sets of fewer tasks to merge: their ``sizes`` (two up to all tasks), and how many sets in all.

    lambda is chosen coarse to fine for every set, on ``samples`` validation images a task. ``points`` of the box
    [-1, 1]^T measure the disentanglement error of T tasks; 0 leaves it out.
    """

    sizes: Literal["all"] | tuple[Annotated[int, Field(ge=2)], ...] = ()
    limit: Count = 40
    samples: Count = 256
    points: Annotated[int, Field(ge=0)] = 8

    @field_validator("sizes")
    @classmethod
    def _rising(cls, sizes: Literal["all"] | tuple[int, ...]) -> Literal["all"] | tuple[int, ...]:
        return "all" if sizes == "all" else tuple(sorted(set(sizes)))

    def of(self, count: int) -> tuple[int, ...]:
        """Return the sizes wanted among those that ``count`` tasks allow."""
        possible = range(2, count + 1)
        return tuple(possible) if self.sizes == "all" else tuple(size for size in self.sizes if size in possible)

    def shortened(self) -> Subsets:
        """Return what a trial run measures: few sets, images and points."""
        least = {"limit": min(self.limit, 3), "samples": min(self.samples, 8), "points": min(self.points, 1)}
        return self.model_copy(update=least)


def parse_scales(text: str) -> list[float]:
    """Return the scales of ``start:stop:step``, both ends included, without rounding drift; at most 1001 of them."""
    start, stop, step = (float(part) for part in text.split(":"))
    if not all(map(math.isfinite, (start, stop, step))) or step <= 0 or stop < start or (stop - start) / step > 1000:
        raise ValueError("want start <= stop, step > 0 and at most 1001 scales")
    count = round((stop - start) / step)
    if abs(start + count * step - stop) > 1e-9:
        raise ValueError("the steps do not end at stop")
    return [round(start + index * step, 10) + 0.0 for index in range(count + 1)]


def coarse(grid: Sequence[float]) -> list[float]:
    """Return every fifth scale of the grid and its last."""
    return [s for i, s in enumerate(grid) if i % STRIDE == 0 or i == len(grid) - 1]
