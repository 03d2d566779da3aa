"""The invariants of merging methods, to hold a method of one's own to (``taskvec.testing``).

Methods are tried on small random models with ties, zeros, huge and tiny numbers, scalars, empty tensors and kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from taskvec.core.errors import TaskvecError
from taskvec.merging import in_memory
from taskvec.merging.entries import Entries, Entry, Masked, describe
from taskvec.merging.matching import match
from taskvec.merging.on_disk import Streams
from taskvec.merging.recipes import Law, Method, Recipe, add_up, apply, join
from taskvec.merging.registry import find_method
from taskvec.weights import vectors
from taskvec.weights.flat import pack, save
from taskvec.weights.reader import Checkpoint

SHAPES: dict[str, tuple[int, ...]] = {
    "patch_embed.proj.weight": (4, 3, 2, 2),
    "pos_embed": (1, 5, 4),
    "blocks.0.norm.weight": (4,),
    "blocks.0.fc.weight": (6, 4),
    "blocks.1.fc.weight": (4, 6),
    "blocks.1.square": (3, 3),
    "bn.running_var": (4,),
    "scale": (),
    "nothing": (0, 3),
}
"""The entries of the random models."""
VALUES = ("normal", "few", "zeros", "huge", "tiny", "equal")
"""What numbers task vectors have: ``few`` are -1, 0 and 1, with many ties."""
CASES = 12
"""Random models that a method is tried on."""
SLICE = 7
"""Elements of a slice."""
ROUNDING = 2e-5
"""The difference that counts as rounding, relative to the largest number that went in or came out."""

Statistics = Callable[[Entry, int, torch.Generator], "Tensor | None"]
"""Makes up what a method would measure on data, for an entry and a number of tasks."""


class InvariantError(AssertionError):
    """A method that breaks an invariant; the message names the invariant, the case and the numbers."""


@dataclass(frozen=True)
class Case:
    """A random model to try a method on: which values its first task vector has, how many tasks, and the seed."""

    values: str
    tasks: int
    seed: int


@dataclass(frozen=True)
class Model:
    """The entries of a random model with their task vectors, one stacked on the other."""

    entries: tuple[Entry, ...]
    stacks: tuple[Tensor, ...]

    def __iter__(self) -> Iterator[tuple[Entry, Tensor]]:
        """Yield every entry with its task vectors."""
        return zip(self.entries, self.stacks, strict=True)

    def with_vectors(self, change: Callable[[Tensor], Tensor]) -> Model:
        """Return the model with every stack of task vectors changed."""
        return Model(self.entries, tuple(change(stack) for stack in self.stacks))

    def permuted(self, order: list[int]) -> Model:
        """Return the model with its tasks in another order."""
        measured = [(entry, entry.statistics) for entry in self.entries]
        entries = (entry if known is None else replace(entry, statistics=known[order]) for entry, known in measured)
        return Model(tuple(entries), tuple(stack[order] for stack in self.stacks))

    def gathered(self, method: Method, config: Any) -> Model:
        """Return the model with sums over tasks in the place of what was measured of each, for methods that add up."""
        if method.summand is None:
            return self
        sums: dict[str, Tensor] = {}
        for task in range(len(self.stacks[0])):
            measured = {entry.name: entry.statistics[task] for entry in self.entries if entry.statistics is not None}
            vector = {entry.name: stack[task] for entry, stack in self}
            add_up(sums, method.summand(measured, vector, config))
        return Model(tuple(replace(entry, statistics=sums.get(entry.name)) for entry in self.entries), self.stacks)

    def sliced(self, seed: int) -> Model:
        """Return the model with its entries in slices of a few elements, in random order."""
        slices = [
            (
                replace(entry, base=entry.base.flatten()[start : start + SLICE], start=start),
                rows[:, start : start + SLICE],
            )
            for entry, rows in ((entry, stack.reshape(len(stack), -1)) for entry, stack in self if stack.numel())
            for start in range(0, entry.base.numel(), SLICE)
        ]
        order = torch.randperm(len(slices), generator=torch.Generator().manual_seed(seed)).tolist()
        entries, stacks = zip(*(slices[place] for place in order), strict=True)
        return Model(entries, stacks)


def check_method(
    method: Method | str,
    config: Mapping[str, Any] | None = None,
    statistics: Statistics | None = None,
    cases: int = CASES,
) -> None:
    """Raise an ``InvariantError`` if a method (or one that is registered by name) breaks an invariant.

    Every method moves nothing for zero vectors, gives finite numbers of its entry's shape, the same ones twice and over
    files, and leaves what it is given as it was. What it declares holds as well: ``laws``, and that slices
    (``elementwise``) or numpy's arrays (``arrays``) give the same bits. ``config`` has hyperparameters, such as few
    steps. ``statistics(entry, tasks, generator)`` makes up what a method with ``measure`` would measure of an entry.
    """
    for number in range(cases):
        check_case(method, Case(VALUES[number % len(VALUES)], 1 + number % 4, number), config, statistics)


def check_case(
    method: Method | str, case: Case, config: Mapping[str, Any] | None = None, statistics: Statistics | None = None
) -> None:
    """Raise an ``InvariantError`` if a method breaks an invariant on one random model."""
    method = find_method(method) if isinstance(method, str) else method
    case = replace(case, tasks=method.tasks or case.tasks)
    if method.measure and statistics is None:
        raise TaskvecError(
            f"'{method.name}' measures on data, which there is none of", "make up what it measures: statistics=..."
        )
    trial = Trial(join([method], config), method, case, make_model(case, statistics))
    for check in (check_basics, check_zero, *(DECLARED[law] for law in sorted(method.laws))):
        check(trial)
    if method.arrays:
        check_arrays(trial)
    if not method.measure:
        check_files(trial)
    if method.elementwise and not method.measure:
        check_slices(trial)


def make_model(case: Case, statistics: Statistics | None = None) -> Model:
    """Return the random model of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    about = describe(SHAPES)
    entries, stacks = [], []
    for name, shape in SHAPES.items():
        entry = Entry(name, torch.randn(shape, generator=generator), *about[name], seed=case.seed)
        measured = statistics(entry, case.tasks, generator) if statistics else None
        entries.append(replace(entry, statistics=measured))
        others = VALUES[case.seed % len(VALUES)]
        values = [case.values, *[others] * (case.tasks - 1)]
        values = ["huge"] * case.tasks if "huge" in values else values
        stacks.append(torch.stack([make_numbers(shape, each, generator) for each in values]))
    return Model(tuple(entries), tuple(stacks))


def make_numbers(shape: tuple[int, ...], values: str, generator: torch.Generator) -> Float32[Tensor, " *shape"]:
    """Return random numbers of one of ``VALUES``."""
    normal = torch.randn(shape, generator=generator)
    few = torch.randint(-1, 2, shape, generator=generator).float()
    made = {"normal": normal, "few": few, "zeros": normal * 0, "huge": normal * 1e15, "tiny": normal * 1e-12}
    return (made | {"equal": torch.ones(shape)})[values]


@dataclass(frozen=True)
class Trial:
    """A method that is tried on the model of a case; its recipe adds the vectors up after a transform."""

    recipe: Recipe
    method: Method
    case: Case
    model: Model

    def directions(self, entries: Entries, invariant: str = "a direction for every entry") -> list[Tensor]:
        """Return the direction of every entry of the model, made of entries or slices; of each task if they differ.

        Whatever keeps the method from giving them breaks the ``invariant``.
        """
        try:
            return self._directions(entries)
        except InvariantError:
            raise
        except Exception as error:
            raise self.broken(invariant, f"{type(error).__name__}: {error}") from error

    def _directions(self, entries: Entries) -> list[Tensor]:
        tasks = len(self.model.stacks[0])
        lead = (tasks,) if self.recipe.per_task else ()
        made = {entry.name: torch.zeros((*lead, *entry.base.shape)) for entry in self.model.entries}
        method, config = self.recipe.stages[-1]
        known = entries.gathered(method, config) if isinstance(entries, Model) else entries
        for entry, result in apply(self.recipe, known):
            each = [result.of(task) for task in range(tasks)] if isinstance(result, Masked) else []
            tensor = torch.stack(each) if isinstance(result, Masked) else torch.as_tensor(result)
            if tensor.dtype != torch.float32:
                raise self.broken("float32", f"'{entry.name}' has {tensor.dtype}")
            flat = tensor.reshape(*lead, -1)
            made[entry.name].view(*lead, -1)[..., entry.start : entry.start + flat.shape[-1]] = flat
        return list(made.values())

    def broken(self, invariant: str, what: str) -> InvariantError:
        """Return the error that names the method, an invariant, the case, and what is wrong."""
        case = f"values {self.case.values}, tasks {len(self.model.stacks[0])}, seed {self.case.seed}"
        return InvariantError(f"method '{self.method.name}' breaks '{invariant}' ({case}): {what}")

    def compare(
        self,
        invariant: str,
        results: Sequence[Tensor],
        wanted: Sequence[Tensor],
        allowed: Sequence[Tensor] | None = None,
    ) -> None:
        """Raise if directions differ from those wanted by more than is allowed: nothing by default."""
        bars = allowed or [torch.zeros(()) for _ in wanted]
        for entry, result, want, bar in zip(self.model.entries, results, wanted, bars, strict=True):
            excess = ((result - want).abs() - bar).nan_to_num(nan=torch.inf).flatten()
            if excess.numel() and float(excess.max()) > 0:
                place = int(excess.argmax())
                numbers = f"{result.flatten()[place]:.9g} instead of {want.flatten()[place]:.9g}"
                most = float(bar.expand_as(want).flatten()[place])
                raise self.broken(invariant, f"'{entry.name}' has {numbers} at element {place} (allowed: {most:.2g})")

    def rounding(self, wanted: Sequence[Tensor]) -> list[Tensor]:
        """Return what counts as rounding for every entry, relative to the largest number that went in or comes out."""
        sizes = (
            [each.abs().max() for each in pair if each.numel()] for pair in zip(self.model.stacks, wanted, strict=True)
        )
        return [ROUNDING * torch.stack(size).max() + 1e-30 if size else torch.zeros(()) for size in sizes]


# ---------------------------------------------------------------- invariants of all methods


def check_basics(trial: Trial) -> None:
    """Raise unless directions are finite and the same twice, and what the method is given stays as it is."""
    model = trial.model
    before = [(entry.base.clone(), stack.clone()) for entry, stack in model]
    results = trial.directions(model)
    for (entry, stack), (base, vector), result in zip(model, before, results, strict=True):
        if not bool(result.isfinite().all()):
            raise trial.broken("finite", f"'{entry.name}' has {result[~result.isfinite()][0]:g} for finite vectors")
        if not (torch.equal(entry.base, base) and torch.equal(stack, vector)):
            raise trial.broken("inputs stay as they are", f"'{entry.name}' was changed in place")
    trial.compare("the same twice", trial.directions(model), results)


def check_zero(trial: Trial) -> None:
    """Raise unless zero vectors give a zero direction."""
    results = trial.directions(trial.model.with_vectors(torch.zeros_like))
    trial.compare("zero vectors move nothing", results, [torch.zeros_like(result) for result in results])


def check_arrays(trial: Trial) -> None:
    """Raise unless numpy's arrays give the bits that torch's tensors do."""
    bare: Any = [replace(entry, base=entry.base.numpy()) for entry, _ in trial.model]  # type: ignore[arg-type]
    arrays: Any = [(entry, stack.numpy()) for entry, stack in zip(bare, trial.model.stacks, strict=True)]
    trial.compare("arrays", trial.directions(arrays, "arrays"), trial.directions(trial.model))


def check_slices(trial: Trial) -> None:
    """Raise unless slices of entries, in any order, give the bits that whole entries do; rounding after a survey."""
    wanted = trial.directions(trial.model)
    allowed, sliced = trial.rounding(wanted) if trial.method.survey else None, trial.model.sliced(trial.case.seed)
    trial.compare("elementwise", trial.directions(sliced, "elementwise"), wanted, allowed)


def check_files(trial: Trial) -> None:
    """Raise unless files, read in slices where the method is elementwise, give what memory does."""
    model, recipe, seed = trial.model, trial.recipe, trial.case.seed
    tasks = len(model.stacks[0])
    base = pack({entry.name: entry.base for entry in model.entries})
    tuned = [pack({entry.name: entry.base + stack[task] for entry, stack in model}) for task in range(tasks)]
    wanted = trial.directions(in_memory.Buffers(base, [vectors.subtract(each, base) for each in tuned], seed))
    with TemporaryDirectory() as folder, ExitStack() as stack:
        paths = [Path(folder, f"{number}.safetensors") for number in range(tasks + 1)]
        for weights, path in zip([base, *tuned], paths, strict=True):
            save(weights, path)
        first, *others = [stack.enter_context(Checkpoint(path)) for path in paths]
        matched, sliced = match(first, others), SLICE * tasks
        streams = Streams.of(recipe, first, others, matched, seed=seed, slice=sliced)
        trial.compare("files", trial.directions(streams, "files"), wanted, trial.rounding(wanted))


# ---------------------------------------------------------------- invariants that a method declares


def check_one_task(trial: Trial) -> None:
    """Raise unless the direction of one task is its vector, so that scale 1 gives its weights back."""
    alone = replace(trial, model=trial.model.permuted([0]))
    bases, vectors_of_one = [entry.base for entry, _ in alone.model], [stack[0] for _, stack in alone.model]
    results = [result.view(base.shape) for result, base in zip(alone.directions(alone.model), bases, strict=True)]
    tuned = [base + vector for base, vector in zip(bases, vectors_of_one, strict=True)]
    moved = [base + result for base, result in zip(bases, results, strict=True)]
    eps = 2 * torch.finfo(torch.float32).eps
    allowed = [eps * torch.maximum(want.abs(), base.abs()) for want, base in zip(tuned, bases, strict=True)]
    alone.compare("one task", moved, tuned, allowed)


def check_order(trial: Trial) -> None:
    """Raise unless the order of the tasks does not matter."""
    order = torch.randperm(
        len(trial.model.stacks[0]), generator=torch.Generator().manual_seed(trial.case.seed)
    ).tolist()
    wanted = trial.directions(trial.model)
    wanted = [result[order] for result in wanted] if trial.recipe.per_task else wanted
    trial.compare("order", trial.directions(trial.model.permuted(order)), wanted, trial.rounding(wanted))


def check_homogeneous(trial: Trial) -> None:
    """Raise unless twice the vectors give twice the direction."""
    wanted = [2 * result for result in trial.directions(trial.model)]
    twice = trial.directions(trial.model.with_vectors(lambda stack: 2 * stack))
    trial.compare("homogeneous", twice, wanted, trial.rounding(wanted))


DECLARED: Mapping[Law, Callable[[Trial], None]] = {
    "one task": check_one_task,
    "order": check_order,
    "homogeneous": check_homogeneous,
}
"""The checks of invariants that a method declares as its ``laws``."""
