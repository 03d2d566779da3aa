"""Settings of probing, fine-tuning and heatmaps: typed, with the paper's values as defaults (paper, appendix C)."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

Rate = Annotated[float, Field(gt=0, le=100)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Frozen values; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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
    """How an encoder is fine-tuned with its head frozen; ``accumulate`` splits a batch into so many passes."""

    steps: Count = 2000
    batch_size: Count = 128
    accumulate: Count = 1
    learning_rate: Rate = 1e-5
    warmup: Annotated[int, Field(ge=0)] = 200
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.1


class Heatmap(Settings):
    """Which disentanglement errors to measure: ``points`` coefficients in [-range, range] an axis, some pairs."""

    pairs: Annotated[int, Field(ge=0)] = 2
    points: Annotated[int, Field(ge=2, le=201)] = 11
    range: Annotated[FiniteFloat, Field(gt=0, le=100)] = 3.0
    samples: Count = 256

    def scales(self) -> list[float]:
        """Return the coefficients of one axis; an odd number of points includes 0."""
        step = 2 * self.range / (self.points - 1)
        return [round(-self.range + index * step, 10) + 0.0 for index in range(self.points)]


def parse_scales(text: str) -> list[float]:
    """Return the scales of ``start:stop:step``, both ends included, without rounding drift; at most 1001 of them."""
    start, stop, step = (float(part) for part in text.split(":"))
    if not all(map(math.isfinite, (start, stop, step))) or step <= 0 or stop < start or (stop - start) / step > 1000:
        raise ValueError("want start <= stop, step > 0 and at most 1001 scales")
    count = round((stop - start) / step)
    if abs(start + count * step - stop) > 1e-9:
        raise ValueError("the steps do not end at stop")
    return [round(start + index * step, 10) + 0.0 for index in range(count + 1)]
