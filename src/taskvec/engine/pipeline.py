"""Steps: a named function, a frozen configuration and the steps it reads; run in order, skipped when done before.

A step's fingerprint holds what can change its result and nothing else: its name, version and configuration, the
versions of the packages that it computes with, threads where they change bits, and the *content* of its inputs.
A step whose inputs come out the same is not run again, whatever was done to make them. Where its function lives,
output paths and the number of workers are not part of it.
"""

from __future__ import annotations

import functools
import heapq
import inspect
import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from taskvec.core.files import fingerprint
from taskvec.core.notes import listen
from taskvec.engine.store import Artifact, Content, Store
from taskvec.engine.work import LITTLE, Work

PACKAGES = ("torch", "timm", "numpy", "pillow", "matplotlib", "scikit-learn", "safetensors")
UNTRACKED = "untracked"
Value = TypeVar("Value")
Untracked = Annotated[Value, UNTRACKED]
"""Marks a field of a configuration that is no part of the fingerprint: where files are, or a name in messages."""


class Config(BaseModel):
    """What a kind of step is told: frozen values that JSON can hold; each kind has a class of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def tracked(self) -> dict[str, Any]:
        """Return what counts in the fingerprint: neither what is untracked, nor what has its default."""
        fields = type(self).model_fields.items()
        counted = {n for n, f in fields if UNTRACKED not in f.metadata and getattr(self, n) != f.default}
        return self.model_dump(mode="json", include=counted, exclude=self.unused())

    def unused(self) -> dict[str, set[str]]:
        """Return which parts of its fields a step does not depend on, by field."""
        return {}

    def threaded(self) -> bool:
        """Return whether the number of threads changes the bits of the step's result."""
        return False


Inputs = Mapping[str, Any]
"""What a step reads by role: steps, or what stands for them (folders, digests), in nested lists; None where absent."""
Function = Callable[[Any, Inputs, Path, Callable[[float], None]], None]


def leaves(tree: Any) -> Iterator[Any]:
    """Yield what is in nested lists, in order, but None."""
    if isinstance(tree, list | tuple):
        for branch in tree:
            yield from leaves(branch)
    elif tree is not None:
        yield tree


def mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Return nested lists with ``function`` of everything in them but None."""
    if isinstance(tree, list | tuple):
        return [mapped(branch, function) for branch in tree]
    return None if tree is None else function(tree)


@dataclass(frozen=True)
class StepType:
    """A kind of step: the one record of what it is called, told, reads, does, writes, takes, and depends on.

    ``version`` is raised when the same configuration would give another result. ``packages`` are those that the
    function computes with.
    ``reads`` are the roles of inputs; ``writes`` returns the files that it must leave by its configuration, and
    ``work`` what a step takes by the sizes of what it reads. ``heading`` is what its seconds are for in costs.
    """

    name: str
    function: Function
    config: type[Config]
    version: int
    packages: tuple[str, ...]
    reads: tuple[str, ...]
    writes: Callable[[Any], Sequence[str]]
    work: Callable[[Step, Any], Work]
    heading: str

    @property
    def place(self) -> str:
        """Return where the function is, as ``module:name``, for a worker to import."""
        return f"{self.function.__module__}:{self.function.__qualname__}"


STEP_TYPES: dict[str, StepType] = {}
"""Every kind of step by name, registered beside its function."""


def little(step: Step, sizes: Any) -> Work:
    """Return the work of a step that passes no image and writes some numbers."""
    return LITTLE


def step_type(
    version: int,
    packages: Iterable[str] = (),
    *,
    reads: Iterable[str] = (),
    writes: Sequence[str] | Callable[[Any], Sequence[str]] = (),
    work: Callable[[Step, Any], Work] = little,
    heading: str = "",
    name: str = "",
) -> Callable[[Function], StepType]:
    """Make a function a kind of step, and register it by its own name unless told; two of one name raise.

    The annotation of the function's first parameter is the class of the configuration.
    """
    files = writes if callable(writes) else lambda _: writes

    def register(function: Function) -> StepType:
        config = next(iter(inspect.get_annotations(function, eval_str=True).values()))
        how = (version, tuple(packages), tuple(reads), files, work, heading)
        kind = StepType(name or function.__name__, function, config, *how)
        if STEP_TYPES.setdefault(kind.name, kind).place != kind.place:
            raise ValueError(f"two kinds of step are named '{kind.name}'")
        return kind

    return register


@dataclass(frozen=True, eq=False)
class Step:
    """One unit of work: the function of its type gets the configuration, input folders and an empty output folder."""

    label: str
    type: StepType
    config: Any
    inputs: Inputs = field(default_factory=dict)
    threads: int = 1
    cost: float = 1.0

    def __post_init__(self) -> None:
        """Refuse inputs and configurations that are not of its type."""
        if unknown := self.inputs.keys() - set(self.type.reads):
            raise ValueError(f"a step '{self.type.name}' reads no {', '.join(sorted(unknown))}")
        if type(self.config) is not self.type.config:
            raise TypeError(f"a step '{self.type.name}' takes {self.type.config.__name__}")

    def dependencies(self) -> list[Step]:
        """List the steps that it reads, in order."""
        return list(leaves(list(self.inputs.values())))

    def inputs_as(self, function: Callable[[Step], Any]) -> dict[str, Any]:
        """Return its inputs with ``function`` of each step in its place."""
        return {role: mapped(tree, function) for role, tree in self.inputs.items()}


@dataclass(frozen=True)
class Job:
    """A step that is ready to run, the folders that it reads, and the one to write: nothing live."""

    step: Step
    id: str
    inputs: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Finished:
    """What an executor hands back for a job: the seconds it took, and what is in its folder."""

    job: Job
    seconds: float
    content: Content


class Executor(Protocol):
    """Runs jobs, several at once where it can."""

    slots: int

    def start(self, job: Job, progress: Callable[[float], None], note: Callable[[str], None]) -> None:
        """Begin a job; at most ``slots`` are under way at once. ``note`` gets what the step has to tell, at once."""

    def wait(self) -> list[Finished]:
        """Wait until at least one job is done; raise what it raised."""

    def close(self) -> None:
        """Stop whatever is under way."""


class Reporter(Protocol):
    """Is told what happens, to show it."""

    def planned(self, steps: Sequence[Step]) -> None:
        """All steps of the run, once at the start."""

    def reused(self, step: Step) -> None:
        """A step that was done before."""

    def started(self, step: Step) -> None:
        """A step that begins."""

    def advanced(self, step: Step, share: float) -> None:
        """The share of a running step that is done."""

    def finished(self, step: Step, seconds: float) -> None:
        """A step that was done now."""

    def note(self, label: str, text: str) -> None:
        """What a step has to tell the user: at once when it runs, and again whenever what it did is used."""


def step_id(step: Step, inputs: Inputs) -> str:
    """Return the fingerprint of a step by the digests of its inputs; a single one counts as a list of one."""
    identity = {
        "step": step.type.name,
        "version": step.type.version,
        "config": step.config.tracked(),
        "packages": versions(step.type.packages),
        "inputs": {r: tree if isinstance(tree, list) else [tree] for r, tree in inputs.items() if tree is not None},
    }
    return fingerprint(identity | ({"threads": step.threads} if step.config.threaded() else {}))


def ordered(steps: Iterable[Step]) -> list[Step]:
    """List all steps that ``steps`` need, each after what it reads and none twice."""
    done: dict[Step, None] = {}

    def visit(step: Step) -> None:
        if step in done:
            return
        for dependency in step.dependencies():
            visit(dependency)
        done[step] = None

    for step in steps:
        visit(step)
    return list(done)


def run(steps: Iterable[Step], store: Store, executor: Executor, reporter: Reporter) -> dict[Step, Artifact]:
    """Run what is not done yet, as many steps at once as the executor has slots, and return every step's artifact."""
    plan = ordered(steps)
    reporter.planned(plan)
    schedule = Schedule(plan, store, reporter)
    try:
        while True:
            while len(schedule.running) < executor.slots and (job := schedule.next_job()):
                note = functools.partial(reporter.note, job.step.label)
                executor.start(job, functools.partial(reporter.advanced, job.step), note)
            if not schedule.running:
                break
            for finished in executor.wait():
                schedule.finish(finished)
    finally:
        executor.close()
    return {step: schedule.done[step] for step in plan}


class Schedule:
    """The steps of a run that are ready, in the order of the plan, and those under way; steps of one id run once."""

    def __init__(self, plan: Sequence[Step], store: Store, reporter: Reporter) -> None:
        self.store, self.reporter = store, reporter
        self.done: dict[Step, Artifact] = {}
        self.running: dict[str, list[Step]] = {}
        self.places = {step: place for place, step in enumerate(plan)}
        self.unread = {step: len(set(step.dependencies())) for step in plan}
        self.readers = defaultdict[Step, list[Step]](list)
        for step in plan:
            for read in set(step.dependencies()):
                self.readers[read].append(step)
        self.ready = [(place, step) for step, place in self.places.items() if not self.unread[step]]

    def next_job(self) -> Job | None:
        """Return the next step to start; ready steps that are done, or the same as one under way, need none."""
        while self.ready:
            _, step = heapq.heappop(self.ready)
            id = step_id(step, step.inputs_as(lambda read: self.done[read].digest))
            if id in self.running:
                self.running[id].append(step)
            elif artifact := self._find(id, step):
                self._reuse(step, artifact)
            else:
                self.running[id] = [step]
                folders = step.inputs_as(lambda read: str(self.done[read].folder))
                self.reporter.started(step)
                return Job(step, id, folders, self.store.begin())
        return None

    def finish(self, finished: Finished) -> None:
        """Keep what a job has made, for all steps that are the same."""
        artifact = self.store.finish(finished.job.id, finished.job.folder, about(finished), finished.content)
        first, *same = self.running.pop(finished.job.id)
        self._complete(first, artifact)
        self.reporter.finished(first, finished.seconds)
        for step in same:
            self._reuse(step, artifact)

    def _find(self, id: str, step: Step) -> Artifact | None:
        """Return a step's artifact if the store holds it; what is noted meanwhile is the step's."""
        with listen(functools.partial(self.reporter.note, step.label)):
            return self.store.find(id)

    def _reuse(self, step: Step, artifact: Artifact) -> None:
        self._complete(step, artifact)
        self.reporter.reused(step)
        for note in artifact.notes():
            self.reporter.note(step.label, note)

    def _complete(self, step: Step, artifact: Artifact) -> None:
        """Take a step as done: those that wait for nothing else are ready."""
        self.done[step] = artifact
        for reader in self.readers[step]:
            self.unread[reader] -= 1
            if not self.unread[reader]:
                heapq.heappush(self.ready, (self.places[reader], reader))


def look(
    steps: Iterable[Step], store: Store, expect: Callable[[Step, str], str]
) -> dict[Step, tuple[str, Mapping[str, Any] | None]]:
    """Return each step's id and what the record tells of it, None where it is not done: nothing is run or checked.

    ``expect`` returns the digest that the output of a step will have, by the step and its id.
    """
    digests: dict[Step, str] = {}
    looks: dict[Step, tuple[str, Mapping[str, Any] | None]] = {}
    for step in ordered(steps):
        id = step_id(step, step.inputs_as(digests.__getitem__))
        digest, record = store.look(id) or ("", None)
        digests[step], looks[step] = digest or expect(step, id), (id, record)
    return looks


def about(finished: Finished) -> dict[str, Any]:
    """Say what made an artifact: step, configuration, threads, versions, seconds."""
    step = finished.job.step
    tracked = step.config.tracked()
    return {
        "label": step.label,
        "step": step.type.name,
        "version": step.type.version,
        "config": tracked,
        "untracked": step.config.model_dump(mode="json", exclude=set(tracked)),
        "threads": step.threads,
        "inputs": {role: mapped(tree, lambda path: Path(path).name) for role, tree in finished.job.inputs.items()},
        "seconds": round(finished.seconds, 3),
        "versions": all_versions(),
    }


version = functools.cache(metadata.version)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of some packages."""
    return {name: version(name) for name in packages}


def all_versions() -> dict[str, str]:
    """Return the versions of Python and of every package that can change a number, for the record."""
    return {"python": platform.python_version()} | versions(PACKAGES)
