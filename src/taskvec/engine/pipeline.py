"""Steps: a named function, a frozen configuration and the steps it reads; run in order, skipped when done before.

A step's fingerprint holds what can change its result and nothing else: its name, version and configuration, the
versions of the packages that it computes with, threads where they change bits, and the *content* of its inputs.
A step whose inputs come out the same is not run again, whatever was done to make them. Where its function lives,
output paths and the number of workers are not part of it.
"""

from __future__ import annotations

import functools
import itertools
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from taskvec.core.errors import TaskvecError
from taskvec.core.files import disk_errors, fingerprint, write_json
from taskvec.core.notes import library_warnings, listen
from taskvec.engine.store import NOTES, Artifact, Store, present

PACKAGES = ("torch", "timm", "numpy", "pillow", "matplotlib", "scikit-learn", "safetensors")


Config = Mapping[str, Any]
Function = Callable[..., None]


@dataclass(frozen=True)
class StepType:
    """A kind of step: the name that stands in fingerprints, its function, and what its result depends on.

    ``version`` is raised when the same configuration would give another result. ``packages`` are those that the
    function computes with. ``threaded`` says of a configuration whether the number of threads changes bits.
    """

    name: str
    function: Function
    version: int
    packages: tuple[str, ...]
    threaded: Callable[[Config], bool]

    def __call__(
        self, config: Config, inputs: Mapping[str, Sequence[Path]], out: Path, progress: Callable[[float], None]
    ) -> None:
        """Do the step's work in this process."""
        self.function(config, inputs, out, progress)

    @property
    def place(self) -> str:
        """Return where the function is, as ``module:name``, for a worker to import."""
        return f"{self.function.__module__}:{self.function.__qualname__}"


STEP_TYPES: dict[str, StepType] = {}
"""Every kind of step by name, registered beside its function."""


def never(config: Config) -> bool:
    """Say of a step whose bits no number of threads changes that they do not count."""
    return False


def always(config: Config) -> bool:
    """Say of a step that computes on the CPU, whatever the device of the study, that threads count."""
    return True


def on_cpu(config: Config) -> bool:
    """Say whether a step computes on the CPU, where the number of threads changes the last bits of sums."""
    return bool(config.get("device", "cpu") == "cpu")


def step_type(
    version: int, packages: Iterable[str] = (), threaded: Callable[[Config], bool] = never, name: str = ""
) -> Callable[[Function], StepType]:
    """Make a function a kind of step, and register it by its own name unless told; two of one name raise."""

    def register(function: Function) -> StepType:
        found = StepType(name or function.__name__, function, version, tuple(packages), threaded)
        if STEP_TYPES.setdefault(found.name, found).place != found.place:
            raise ValueError(f"two kinds of step are named '{found.name}'")
        return found

    return register


@dataclass(frozen=True, eq=False)
class Step:
    """One unit of work: the function of its type gets the config, input folders and an empty output folder.

    ``untracked`` is given to the function with the config, goes before it, and is no part of the fingerprint: where
    files are, or how something is called in messages.
    """

    label: str
    type: StepType
    config: Config
    inputs: Mapping[str, Sequence[Step]] = field(default_factory=dict)
    threads: int = 1
    cost: float = 1.0
    untracked: Mapping[str, Any] = field(default_factory=dict)

    def dependencies(self) -> list[Step]:
        """List the steps that it reads, in order."""
        return [step for steps in self.inputs.values() for step in steps]


@dataclass(frozen=True)
class Job:
    """A step that is ready to run: everything a worker process needs, and nothing live."""

    step: Step
    id: str
    inputs: dict[str, list[str]]
    folder: Path


@dataclass(frozen=True)
class Finished:
    """What an executor hands back for a job: the seconds it took."""

    job: Job
    seconds: float


class Executor(Protocol):
    """Runs jobs, several at once where it can."""

    slots: int

    def start(self, job: Job, progress: Callable[[float], None], noted: Callable[[str], None]) -> None:
        """Begin a job; at most ``slots`` are under way at once. ``noted`` gets what the step has to tell, at once."""

    def wait(self) -> list[Finished]:
        """Wait until at least one job is done; raise what it raised."""

    def close(self) -> None:
        """Stop whatever is under way."""


class Watcher(Protocol):
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

    def noted(self, label: str, note: str) -> None:
        """What a step has to tell the user: at once when it runs, and again whenever what it did is used."""


def step_id(step: Step, inputs: Mapping[str, Sequence[Artifact]]) -> str:
    """Return the fingerprint of a step whose inputs are known."""
    identity = {
        "step": step.type.name,
        "version": step.type.version,
        "config": step.config,
        "packages": versions(step.type.packages),
        "inputs": {role: [artifact.digest for artifact in artifacts] for role, artifacts in inputs.items()},
    }
    return fingerprint(identity | ({"threads": step.threads} if step.type.threaded(step.config) else {}))


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


def run(steps: Iterable[Step], store: Store, executor: Executor, watcher: Watcher) -> dict[Step, Artifact]:
    """Run what is not done yet, as many steps at once as the executor has slots, and return every step's artifact."""
    plan = ordered(steps)
    watcher.planned(plan)
    waiting, done, running = list(plan), dict[Step, Artifact](), dict[str, list[Step]]()
    try:
        while waiting or running:
            for step in [s for s in waiting if all(d in done for d in s.dependencies())]:
                _advance(step, waiting, done, running, store, executor, watcher)
            if running and (len(running) >= executor.slots or not _ready(waiting, done)):
                for finished in executor.wait():
                    artifact = store.finish(finished.job.id, finished.job.folder, about(finished))
                    first, *joined = running.pop(finished.job.id)
                    done |= dict.fromkeys([first, *joined], artifact)
                    watcher.finished(first, finished.seconds)
                    for step in joined:
                        watcher.reused(step)
                        _tell(step, artifact, watcher)
    finally:
        executor.close()
    return {step: done[step] for step in plan}


def _ready(waiting: list[Step], done: dict[Step, Artifact]) -> bool:
    return any(all(d in done for d in step.dependencies()) for step in waiting)


def _advance(
    step: Step,
    waiting: list[Step],
    done: dict[Step, Artifact],
    running: dict[str, list[Step]],
    store: Store,
    executor: Executor,
    watcher: Watcher,
) -> None:
    """Reuse a ready step, join it to the same work under way, or start it if there is room."""
    inputs = {role: [done[s] for s in steps] for role, steps in step.inputs.items()}
    id = step_id(step, inputs)
    if id in running:
        running[id].append(step)
        waiting.remove(step)
    elif (artifact := _find(id, step, store, watcher)) is not None:
        done[step] = artifact
        waiting.remove(step)
        watcher.reused(step)
        _tell(step, artifact, watcher)
    elif len(running) < executor.slots:
        folders = {role: [str(a.folder) for a in artifacts] for role, artifacts in inputs.items()}
        job = Job(step, id, folders, store.begin())
        running[id] = [step]
        waiting.remove(step)
        watcher.started(step)
        executor.start(job, lambda share: watcher.advanced(step, share), lambda text: watcher.noted(step.label, text))


def _find(id: str, step: Step, store: Store, watcher: Watcher) -> Artifact | None:
    with listen() as heard:
        artifact = store.find(id)
    for line in heard:
        watcher.noted(step.label, line)
    return artifact


def _tell(step: Step, artifact: Artifact, watcher: Watcher) -> None:
    for note in artifact.notes():
        watcher.noted(step.label, note)


def about(finished: Finished) -> dict[str, Any]:
    """Say what made an artifact: step, configuration, threads, versions, seconds."""
    step = finished.job.step
    return {
        "label": step.label,
        "step": step.type.name,
        "version": step.type.version,
        "config": step.config,
        "untracked": step.untracked,
        "threads": step.threads,
        "inputs": {role: [Path(folder).name for folder in folders] for role, folders in finished.job.inputs.items()},
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


def perform(job: Job, progress: Callable[[float], None], noted: Callable[[str], None]) -> Finished:
    """Run a job in this process, and keep what is noted beside its result.

    When it fails its folder is removed, and a user's mistake is told with its label.
    """
    start = time.perf_counter()
    inputs = {role: [Path(folder) for folder in folders] for role, folders in job.inputs.items()}
    try:
        reading = present(itertools.chain(*inputs.values()), job.folder)
        with disk_errors(job.folder), reading, listen(noted) as heard, library_warnings():
            job.step.type({**job.step.config, **job.step.untracked}, inputs, job.folder, progress)
            if heard:
                write_json(job.folder / NOTES, heard)
    except BaseException as error:
        shutil.rmtree(job.folder, ignore_errors=True)
        if isinstance(error, TaskvecError):
            raise TaskvecError(f"{job.step.label}: {error.problem}", error.fix) from None
        raise
    return Finished(job, time.perf_counter() - start)
