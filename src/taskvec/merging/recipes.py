"""Merging methods, and recipes that join them.

Every method gives a direction along which a scale moves the encoder, entry by entry:
theta = theta_pre + scale * direction. A *transform* changes the vectors and leaves one a task, a *combiner* makes one
of them, a *per-task* method gives each task its own (``Masked``). A recipe is any number of transforms and then one of
the others, written with + (``lines+dare+ties``); transforms alone are added up (``dare`` is ``dare+task_arithmetic``).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from taskvec.core.errors import TaskvecError, did_you_mean, unknown
from taskvec.core.settings import Settings, parse_scales
from taskvec.merging.entries import Entries, Entry, Masked

if TYPE_CHECKING:  # the command lists methods without loading torch
    from jaxtyping import Float32
    from torch import Tensor

    Function = Callable[[Float32[Tensor, " tasks *shape"], Entry, Any], Tensor | Masked]
    Summand = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Any], Iterator[tuple[str, Tensor]]]

Role = Literal["transform", "combiner", "per-task"]
Need = Literal["inputs", "heads", "seed"]
Law = Literal["one task", "order", "homogeneous"]
"""The invariants that a method may declare, beside those of all (``taskvec.testing``):

- "one task": the direction of one task is its vector, so that scale 1 gives the fine-tuned weights back;
- "order": the order of the tasks does not matter, up to rounding;
- "homogeneous": the direction of c * tau is c times that of tau, for c > 0.
"""


@dataclass(frozen=True)
class Method:
    """One entry of the registry.

    ``function(vectors, entry, config)`` is called for one entry at a time with " tasks *shape" in float32. It returns
    " tasks *shape" for a transform, "*shape" for a combiner and ``Masked`` for a per-task method. ``survey(entries,
    config)`` is a global pass: it goes over all entries before that, as often as it needs to, and what it returns is
    ``entry.global_statistics``. ``elementwise`` functions may be given slices of an entry, in any order and by several
    threads: they share no state, and draw random numbers by ``entry.uniform``.
    """

    name: str
    function: Function
    description: str
    reference: str
    scales: str = "0:1:0.05"
    role: Role = "combiner"
    config: type[Settings] = Settings
    survey: Callable[[Entries, Any], Any] | None = None
    needs: frozenset[Need] = frozenset()
    measure: str = ""
    """``module:function`` that takes ``Data`` and the configuration and returns the statistics of entries by name."""
    summand: Summand | None = None
    """What a task adds to the statistics of entries, by name, from what was measured of it, its vector, and the
    configuration. ``entry.statistics`` are sums over tasks then, and nobody holds what was measured of two tasks."""
    laws: frozenset[Law] = frozenset()
    """The invariants that it keeps; ``taskvec.testing.check_method`` tries them."""
    elementwise: bool = False
    arrays: bool = False
    """Whether function and survey use only what numpy's arrays and torch's tensors share: files need no torch then."""
    matrices: bool = False
    """Whether it treats linear maps as matrices and averages all other entries."""
    heavy: bool = False
    """Whether it computes so much for an entry that a GPU is faster, the way there and back included."""
    tasks: int | None = None
    """The number of tasks that it can merge; any number if None."""

    @property
    def about(self) -> str:
        """Say in one line what it does, needs, keeps to and by whom it is."""
        needs = f"; needs {', '.join(sorted(self.needs))}" if self.needs else ""
        only = f"; {self.tasks} tasks" if self.tasks else ""
        kind = "; gives each task its own weights" if self.role == "per-task" else ""
        laws = f"; laws: {', '.join(sorted(self.laws))}" if self.laws else ""
        return f"{self.description}{kind}{only}{needs}{laws} ({self.reference})"


METHODS: dict[str, Method] = {}
ADDITION = "task_arithmetic"
"""The paper's method, by its name in the registry and in results."""
FIXED = "1:1:1"
"""The scale of methods whose direction leads to the merged weights themselves: no other makes sense."""
MIDDLE, WIDE = "0:2:0.1", "0:3:0.15"
"""The scales of methods whose direction is shorter, or much shorter, than the sum of the vectors."""
RESERVED = ("probing", "zero_shot", "fine_tuned", "joint")
"""Methods of results that merge nothing by a recipe."""


def add_up(sums: dict[str, Tensor], summands: Iterable[tuple[str, Tensor]]) -> None:
    """Add what a task adds to the statistics of entries, in place."""
    for name, summand in summands:
        sums[name] = sums[name].add_(summand) if name in sums else summand


def register(method: Method) -> None:
    """Add a method to the registry; a name that is taken, that results use otherwise, or that is no word raises."""
    if "+" in method.name:
        raise ValueError(f"'{method.name}': + joins methods and cannot be in a name")
    if not re.fullmatch(r"\w[\w.-]*", method.name):
        raise ValueError(f"'{method.name}' is no name of letters, digits and _ . -")
    if method.name in RESERVED:
        raise ValueError(f"'{method.name}' names something else in results")
    if method.name in METHODS:
        raise ValueError(f"a method named '{method.name}' is registered already")
    if not (isinstance(method.config, type) and issubclass(method.config, Settings)):
        raise ValueError(f"the config of '{method.name}' is no class of taskvec.settings.Settings")
    parse_scales(method.scales)
    METHODS[method.name] = method


def find_method(name: str) -> Method:
    """Return a method by name, or raise with the nearest names."""
    if name not in METHODS:
        raise unknown("merging method", name, METHODS)
    return METHODS[name]


@dataclass(frozen=True)
class Recipe:
    """Transforms and then one method that ends them, each with its configuration, and the scales that suit the last."""

    name: str
    stages: tuple[tuple[Method, Settings], ...]
    scales: str

    @property
    def last(self) -> Method:
        """The combiner or per-task method at its end."""
        return self.stages[-1][0]

    @property
    def transforms(self) -> Recipe:
        """Return the recipe of what stands before its last method, which gives a vector a task."""
        return replace(self, stages=self.stages[:-1])

    @property
    def per_task(self) -> bool:
        """Whether it gives each task a direction of its own (``Masked``)."""
        return self.last.role == "per-task"

    @property
    def needs(self) -> frozenset[Need]:
        """What its methods need beside the vectors."""
        return frozenset(itertools.chain(*(method.needs for method, _ in self.stages)))

    @property
    def measures(self) -> tuple[tuple[Method, Settings], ...]:
        """Its methods that measure something on data before they merge."""
        return tuple(stage for stage in self.stages if stage[0].measure)

    @property
    def elementwise(self) -> bool:
        """Whether it may be applied to slices of entries."""
        return all(method.elementwise for method, _ in self.stages)

    @property
    def matrices(self) -> bool:
        """Whether a method in it treats linear maps alone as matrices."""
        return any(method.matrices for method, _ in self.stages)

    @property
    def heavy(self) -> bool:
        """Whether a method in it computes so much that a GPU is faster."""
        return any(method.heavy for method, _ in self.stages)

    @property
    def arrays(self) -> bool:
        """Whether numpy's arrays will do for it."""
        return all(method.arrays for method, _ in self.stages)

    def check_tasks(self, count: int) -> None:
        """Raise if its last method cannot merge so many tasks."""
        wanted = self.last.tasks
        if wanted is not None and count != wanted:
            raise TaskvecError(
                f"'{self.name}' merges {wanted} tasks, and there are {count}", "give as many, or choose another method"
            )

    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters that differ from the authors' defaults, for a fingerprint and for results."""
        return {
            k: v for _, config in self.stages for k, v in config.model_dump(mode="json", exclude_defaults=True).items()
        }


def find_recipe(name: str, settings: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe of a name such as ``lines+dare+ties`` with hyperparameters by name, the authors' by default.

    Raises for an unknown method, one that stands where it cannot, and a hyperparameter that no method has.
    """
    return join([find_method(method.strip()) for method in name.split("+")], settings, name)


def join(methods: Sequence[Method], settings: Mapping[str, Any] | None = None, name: str = "") -> Recipe:
    """Return the recipe of methods one after the other; they need not be registered."""
    name = name or "+".join(method.name for method in methods)
    for method in methods[:-1]:
        if method.role != "transform":
            raise TaskvecError(
                f"'{name}': '{method.name}' can only stand at the end", f"put it last: ...+{method.name}"
            )
    if len({method.name for method in methods}) < len(methods):
        raise TaskvecError(f"'{name}' names a method twice", "name each once")
    last = methods[-1]
    stages = [*methods, METHODS[ADDITION]] if last.role == "transform" else methods
    return Recipe(name, _configured(name, stages, dict(settings or {})), last.scales)


def _configured(name: str, methods: Sequence[Method], settings: dict[str, Any]) -> tuple[tuple[Method, Settings], ...]:
    known = [key for method in methods for key in method.config.model_fields]
    for key in settings:
        if key not in known:
            raise TaskvecError(f"'{name}' has no hyperparameter '{key}'", did_you_mean(key, known))
    stages = []
    for method in methods:
        chosen = {key: value for key, value in settings.items() if key in method.config.model_fields}
        try:
            stages.append((method, method.config.model_validate(chosen)))
        except ValidationError as error:
            first = error.errors()[0]
            message = first["msg"].removeprefix("Value error, ")
            about = "".join(f"'{key}': " for key in (".".join(map(str, first["loc"])),) if key)
            raise TaskvecError(
                f"{method.name}: {about}{message} (given: {first['input']!r})", "see docs/methods.md"
            ) from None
    return tuple(stages)


@dataclass(frozen=True)
class Stage:
    """A method of a recipe with its hyperparameters and global statistics, and how many methods drew before it."""

    method: Method
    config: Settings
    global_statistics: Any
    drawn: int

    def __call__(self, entry: Entry, vectors: Any) -> Any:
        """Return what the method makes of an entry; what has another shape, which could be stretched to it, raises."""
        known = replace(entry, global_statistics=self.global_statistics, drawn=self.drawn)
        result = self.method.function(vectors, known, self.config)
        tensor = result.common if isinstance(result, Masked) else result
        wanted = tuple(vectors.shape[self.method.role != "transform" :])
        if (shape := tuple(getattr(tensor, "shape", ("nothing",)))) != wanted:
            problem = f"method '{self.method.name}' makes {shape} of '{entry.name}', where {wanted} belongs"
            raise TaskvecError(problem, "a transform returns a tensor a task, all others one (docs/methods.md)")
        return result


@dataclass(frozen=True)
class Applied:
    """Entries after some stages; it can be iterated over as often as what it reads."""

    entries: Entries
    stages: Sequence[Stage]

    def __iter__(self) -> Iterator[tuple[Entry, Any]]:
        """Yield every entry after the stages, anew each time."""
        for entry, vectors in self.entries:
            for stage in self.stages:
                vectors = stage(entry, vectors)  # what went in is not kept
            yield entry, vectors
            del entry, vectors  # nor is this while the next entry is read


def prepare(recipe: Recipe, entries: Entries) -> tuple[Stage, ...]:
    """Return a recipe's stages, after their global passes over all entries, which are finite."""
    ready: tuple[Stage, ...] = ()
    for method, config in recipe.stages:
        global_statistics = method.survey(Applied(entries, ready), config) if method.survey else None
        ready += (Stage(method, config, global_statistics, sum("seed" in stage.method.needs for stage in ready)),)
    return ready


def apply(recipe: Recipe, entries: Entries) -> Iterator[tuple[Entry, Tensor | Masked]]:
    """Yield every entry with its direction (``Masked`` for a per-task recipe), in the order of ``entries``.

    ``entries`` are finite; they are iterated over once, and once more for every global pass. Nothing is kept in
    memory but one entry of all tasks.
    """
    yield from Applied(entries, prepare(recipe, entries))
