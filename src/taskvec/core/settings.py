"""Settings of everything that a study does, typed, with the paper's values as defaults (paper, appendix C)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

Rate = Annotated[float, Field(gt=0, le=100)]
MOST = 10**9
"""The largest count of steps, images or the like."""
Count = Annotated[int, Field(ge=1, le=MOST)]
STRIDE = 5
"""A coarse search tries every fifth scale of the grid, then neighbours two places and one place away."""
MOST_SCALES = 1001
"""The largest number of scales along one direction."""


def check_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the values, or raise if one of them, or of their names, comes twice."""
    counts = Counter(getattr(value, "name", value) for value in values)
    if twice := [str(name) for name, count in counts.items() if name != "" and count > 1]:
        raise ValueError("\n".join(f"{name} is given twice" for name in twice))
    return values


Rates = Annotated[tuple[Rate, ...], Field(max_length=64), AfterValidator(check_distinct)]


class Settings(BaseModel):
    """A frozen group of settings; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, data: Any) -> Any:
        """Refuse true and false where a number belongs; pydantic would take them for 1 and 0."""
        for key, value in data.items() if isinstance(data, dict) else ():
            annotation = str(cls.model_fields[key].annotation) if key in cls.model_fields else ""
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            wrong = [item for item in items if isinstance(item, bool)]
            if wrong and ("int" in annotation or "float" in annotation):
                raise ValueError(f"{key} is {str(wrong[0]).lower()}, where a number belongs")
        return data


class Probe(Settings):
    """Settings of fitting linear heads on frozen features; all learning rates are tried at once.

    One rate serves all tasks of a study (the one with the best mean validation accuracy) unless ``rate_per_task``.
    """

    steps: Count = 2000
    batch_size: Count = 128
    warmup: Annotated[int, Field(ge=0, le=MOST)] = 200
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.1
    learning_rates: Annotated[Rates, Field(min_length=1)] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    rate_per_task: bool = False


class Finetune(Settings):
    """Settings of fine-tuning an encoder; ``accumulate`` splits a batch into so many passes of equal size.

    With ``learning_rates`` one of them is chosen for each backbone and regime, on the validation split of the study's
    first task (paper, appendix C), and ``learning_rate`` is not used.
    """

    steps: Count = 2000
    batch_size: Count = 128
    accumulate: Count = 1
    learning_rate: Rate = 1e-5
    learning_rates: Rates = ()
    warmup: Annotated[int, Field(ge=0, le=MOST)] = 200
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.1

    @model_validator(mode="after")
    def _whole(self) -> Finetune:
        if self.batch_size % self.accumulate:
            near = [count for count in range(1, self.accumulate) if self.batch_size % count == 0][-1]
            raise ValueError(
                f"a batch of {self.batch_size} cannot be split evenly into {self.accumulate} passes; "
                f"accumulate {near} can, or another batch_size"
            )
        return self


class Lora(Settings):
    """Adapters of low rank: each layer W learns W + alpha / rank * B A (LoRA, arXiv 2106.09685).

    ``layers`` are the ends of the names of the layers that have one (``qkv``, ``mlp.fc1``); all linear ones when empty.
    """

    rank: Count = 8
    alpha: Annotated[FiniteFloat, Field(gt=0)] = 16.0
    layers: tuple[str, ...] = ()


class Negation(Settings):
    """Settings of forgetting a task while a control task keeps a share of its accuracy (arXiv 2212.04089, section 3).

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
        """Return the settings of a smoke run: the ends of the scales."""
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
    """Settings of representation surgery, with its authors' values as defaults (arXiv 2402.02705)."""

    rank: Count = 16
    steps: Count = 1000
    batch_size: Count = 16
    learning_rate: Rate = 1e-3


class Heatmap(Settings):
    """Settings of disentanglement errors: some pairs of tasks, ``points`` coefficients in [-range, range] an axis.

    Of a sample of ``samples`` test images a task, as many are looked at as the 95 % half-width of the mean error over
    all pairs takes to be at most ``tolerance`` points (1.5 is 0.015 of xi, which is 0 to 2); 0 looks at all.
    """

    pairs: Annotated[int, Field(ge=0, le=10_000)] = 2
    points: Annotated[int, Field(ge=3, le=201)] = 11
    range: Annotated[FiniteFloat, Field(ge=1, le=100)] = 3.0
    samples: Count = 256
    tolerance: Annotated[FiniteFloat, Field(ge=0, le=200)] = 1.5

    @field_validator("points")
    @classmethod
    def _odd(cls, points: int) -> int:
        if points % 2 == 0:
            raise ValueError(f"an even number of points leaves out 0; give {points - 1} or {points + 1}")
        return points

    def scales(self) -> list[float]:
        """Return the coefficients of one axis, with 0 in the middle."""
        step = 2 * self.range / (self.points - 1)
        return [round(-self.range + index * step, 10) + 0.0 for index in range(self.points)]

    def shortened(self) -> Heatmap:
        """Return the settings of a smoke run: few pairs, points and images."""
        least = {"pairs": min(self.pairs, 2), "points": min(self.points, 3), "samples": min(self.samples, 8)}
        return self.model_copy(update=least)


def _kind_of_sizes(value: Any) -> str:
    return "word" if isinstance(value, str) else "list"


Sizes = Annotated[
    Annotated[Literal["all"], Tag("word")] | Annotated[tuple[Annotated[int, Field(ge=2)], ...], Tag("list")],
    Discriminator(_kind_of_sizes),
]


class Subsets(Settings):
    """Settings of merging fewer tasks: the ``sizes`` of sets (two up to all tasks), and how many sets in all.

    lambda is chosen coarse to fine for every set, on ``samples`` validation images a task. ``points`` of the box
    [-1, 1]^T measure the disentanglement error of T tasks; 0 leaves it out.
    """

    sizes: Sizes = ()
    limit: Annotated[int, Field(ge=1, le=10_000)] = 40
    samples: Count = 256
    points: Annotated[int, Field(ge=0, le=10_000)] = 8

    @field_validator("sizes")
    @classmethod
    def _rising(cls, sizes: Literal["all"] | tuple[int, ...]) -> Literal["all"] | tuple[int, ...]:
        return "all" if sizes == "all" else tuple(sorted(set(sizes)))

    def of(self, count: int) -> tuple[int, ...]:
        """Return the sizes that ``count`` tasks allow."""
        possible = range(2, count + 1)
        return tuple(possible) if self.sizes == "all" else tuple(size for size in self.sizes if size in possible)

    def shortened(self) -> Subsets:
        """Return the settings of a smoke run: few sets, images and points."""
        least = {"limit": min(self.limit, 3), "samples": min(self.samples, 8), "points": min(self.points, 1)}
        return self.model_copy(update=least)


def parse_scales(text: str) -> list[float]:
    """Return the scales of ``start:stop:step``, both ends included, without rounding drift; at most 1001 of them."""
    invalid = f"'{text}' is not start:stop:step, for example 0:1:0.05"
    try:
        start, stop, step = (float(part) for part in text.split(":"))
    except ValueError:
        raise ValueError(f"{invalid} (want three numbers)") from None
    most = MOST_SCALES - 1
    if not all(map(math.isfinite, (start, stop, step))) or step <= 0 or stop < start or (stop - start) / step > most:
        raise ValueError(f"{invalid} (want start <= stop, step > 0 and at most {MOST_SCALES} scales)")
    count = round((stop - start) / step)
    if abs(start + count * step - stop) > 1e-9:
        raise ValueError(f"{invalid} (the steps do not end at stop)")
    return [round(start + index * step, 10) + 0.0 for index in range(count + 1)]


def coarse(grid: Sequence[float]) -> list[float]:
    """Return every fifth scale of the grid and its last."""
    return [s for i, s in enumerate(grid) if i % STRIDE == 0 or i == len(grid) - 1]
