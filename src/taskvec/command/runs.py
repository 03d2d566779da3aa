"""Running a study: its steps, then the run folder with rows, tables, figures, page and models."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from taskvec.core.compute import processor, study_device, uses_tf32
from taskvec.core.errors import TaskvecError
from taskvec.core.files import disk_errors, fingerprint, read_json
from taskvec.core.formatting import bytes_text
from taskvec.core.machine import gpus_of
from taskvec.core.notes import library_warnings, listen, some
from taskvec.data import sources
from taskvec.data.folders import folders_in, splits_in
from taskvec.deploy.model import ABOUT, ENCODER, HEADS
from taskvec.encoders.addresses import parse, split_key
from taskvec.encoders.records import BASE
from taskvec.engine import pipeline
from taskvec.engine.executors import open_executor
from taskvec.engine.pipeline import Reporter
from taskvec.engine.publishing import check_outside, check_place, inside, mark, obstacle, owned, refuse
from taskvec.engine.store import Artifact, Store, present
from taskvec.merging import plugins
from taskvec.merging.in_memory import DIRECTIONS
from taskvec.merging.variants import DIFFERENCES
from taskvec.report.rows import Done
from taskvec.report.run_folder import (
    FILES,
    FOLDERS,
    LOCK,
    MARKER,
    beside,
    is_folder,
    is_written,
    of_figures,
    write_run,
    writing,
)
from taskvec.study import artifacts
from taskvec.study.artifacts import AGREEMENTS
from taskvec.study.experiment import Experiment
from taskvec.study.forecast.estimate import decoded_bytes
from taskvec.study.forecast.workers import cpu_workers, gpu_workers
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile
from taskvec.study.steps.loading import compare_precisions

PLANNING, FOLDER = "plan", "run folder"
"""The labels of what is noted while a study is planned, and while its folder is written."""
MODEL = (ENCODER, HEADS, BASE, DIRECTIONS, ABOUT)
"""The files that the folder of a model may hold."""
KEPT = ("method", *DIFFERENCES, "config", "heads", "scale", "scales")
"""What the lock says of a model, as model.json does."""
LARGE = 1e9
"""Bytes of decoded images from which their size is said."""


@dataclass(frozen=True)
class Outcome:
    """What a run did: its folder, how many steps it has and ran now, and whether the folder was written anew."""

    folder: Path
    steps: int
    ran: int
    written: bool


class Counter:
    """Counts the steps that were run now, tells each note once, and passes everything on to another reporter."""

    def __init__(self, reporter: Reporter) -> None:
        self.ran = 0
        self.reporter = reporter
        self.labels: dict[str, list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        """Pass on what is not counted."""
        return getattr(self.reporter, name)

    def finished(self, step: pipeline.Step, seconds: float) -> None:
        """Count a step that was done now."""
        self.ran += 1
        self.reporter.finished(step, seconds)

    def note(self, label: str, text: str) -> None:
        """Pass on a note, unless the same was told before."""
        labels = self.labels.setdefault(text, [])
        if not labels:
            self.reporter.note(label, text)
        if label not in labels:
            labels.append(label)

    def repeat(self) -> None:
        """Name those that told the same as another step, in one line for each note."""
        for text, labels in self.labels.items():
            if others := [label for label in labels if label != PLANNING][1:]:
                self.reporter.note(f"also {some(others)}", text)


def run_study(
    file: StudyFile, out: Path, store: Store, workers: int | None, reporter: Reporter, command: str
) -> Outcome:
    """Run what is not done yet and write the run folder; a run with nothing to do leaves the folder as it is."""
    check_inputs(file, out, store.folder)
    counter, device = Counter(reporter), study_device(file.study.device)
    with writing(out):
        check_free(file, out)
        store.open()
        store.sweep()
        with listen(functools.partial(counter.note, PLANNING)) as planned, library_warnings():
            experiments = plan(file, store)
        if not (out / MARKER).exists():
            mark(out, MARKER, {})
        plugins_used, steps = used_plugins(file), [step for exp in experiments for step in exp.steps()]
        say_size(decoded_bytes(steps, store), store, reporter)
        chips = gpus_of(device)
        workers = workers or (gpu_workers(steps, chips) if chips else cpu_workers(file.study.threads))
        executor = open_executor(workers, [chip.id for chip in chips])
        with contextlib.closing(artifacts):
            done = pipeline.run(steps, store, executor, counter)
        with present(artifact.folder for artifact in done.values()), listen(functools.partial(counter.note, FOLDER)):
            models = best_models(experiments, done)
            lock = make_lock(file, experiments, done, models, device, command)
            lock |= {"notes": all_notes(planned, steps, done)} | plugins_used
            fresh = not is_written(out, lock)
            if fresh:
                paths = {name: [model.folder / part for part in MODEL] for name, (_, model) in models.items()}
                files = {name: [path for path in parts if path.exists()] for name, parts in paths.items()}
                write_run(file, experiments, done, files, out, lock)
        for note in of_figures(read_json(out / LOCK)["notes"]):
            counter.note(note["label"], note["text"])
    counter.repeat()
    return Outcome(out, len(done), counter.ran, fresh)


def used_plugins(file: StudyFile) -> dict[str, Any]:
    """Return what the lock says of a study's plugins: the digest of each by its name in the study."""
    used = {plugin.path: plugin.digest for plugin in plugins.use(file.plugins)}
    digests = {name: used[path.resolve()] for name, path in zip(file.study.plugins, file.plugins, strict=True)}
    return {"plugins": digests} if digests else {}


def say_size(views: float, store: Store, reporter: Reporter) -> None:
    """Say before the work how much room decoded images take, where that is much."""
    if views >= LARGE:
        free = bytes_text(shutil.disk_usage(store.folder if store.folder.exists() else Path()).free)
        reporter.note(
            "decoded images",
            f"about {bytes_text(views)} of evaluation views, and whole training images beside them, in "
            f"'{store.folder}' ({free} free there); taskvec store lists and clears them",
        )


def all_notes(planned: list[str], steps: list[pipeline.Step], done: Done) -> list[dict[str, str]]:
    """List what was noted and by whom, in the order of the plan; what a step tells as well, the plan does not."""
    notes_of_steps = [(step.label, text) for step in pipeline.ordered(steps) for text in done[step].notes()]
    known = {text for _, text in notes_of_steps}
    notes = dict.fromkeys([*((PLANNING, text) for text in planned if text not in known), *notes_of_steps])
    return [{"label": label, "text": text} for label, text in notes]


def check_free(file: StudyFile, out: Path) -> None:
    """Raise, before any work, if something of the user's stands in a run folder where a file of ours may have to go."""
    ours = owned(out, MARKER, LOCK) | {MARKER: set()}
    backbones = [choice.called for choice in file.study.backbones]
    names = [MARKER, *FILES, *(f"models/{name}/{part}" for name in backbones for part in MODEL), *beside(out, ours)]
    blocking = [out / name for name in FOLDERS if os.path.lexists(out / name) and not is_folder(out / name)]
    blocking += [place for name in names if (place := obstacle(out, name, ours))]
    if blocking:
        raise refuse(blocking[0])


def check_inputs(file: StudyFile, out: Path, store: Path) -> None:
    """Raise if the store and the run folder lie in each other or in images, or outputs would replace what is read."""
    check_place(out)
    check_place(store, "--store")
    if inside(out, store) or inside(store, out):
        problem = f"the run folder '{out}' and the store '{store}' lie one in the other"
        raise TaskvecError(problem, "choose another --out or --store")
    folders = image_folders(file)
    check_outside(out, folders)
    check_outside(store, folders, "--store")
    for given in (*folders, *named_files(file)):
        for name in (*FILES, *FOLDERS):
            if inside(given, out / name):
                raise TaskvecError(f"the study reads '{given}', where '{out}' has results", "choose another --out")


def image_folders(file: StudyFile) -> list[Path]:
    """Return the folders of images that a study reads all of: a task's splits or own folder, and classes elsewhere."""
    roots: list[Path] = []
    for task in file.study.tasks:
        address = sources.parse(task.address, file.folder, file.study.data)
        root = address.source.folder(address.rest)
        if root is not None and root.is_dir():
            with disk_errors(root):
                folders = (address.source.class_folders and splits_in(root)) or [root]
                roots += [*folders, *(link for folder in folders for link in folders_in(folder) if link.is_symlink())]
    return roots


def named_files(file: StudyFile) -> list[Path]:
    """Return the files of weights, folders with them and plugins that a study names."""
    given = [name for task in file.study.tasks for name in (task.finetuned, task.head) if name]
    paths = [Path(split_key(str(file.folder / Path(name).expanduser()))[0]) for name in given]
    weights = [path for choice in file.study.backbones if (path := parse(choice.address, file.folder).path)]
    return [path for path in (*paths, *weights, *file.plugins) if path.exists()]


def make_lock(
    file: StudyFile,
    experiments: list[Experiment],
    done: Done,
    models: dict[str, tuple[dict[str, Any], Artifact]],
    device: str,
    command: str,
) -> dict[str, Any]:
    """Return what is needed to get the same numbers again: study, versions, seeds, threads, device, fingerprints."""
    study = file.study
    tuned = {f"{c.backbone}, {t}": done[s].json("metrics.json") for c in experiments for t, s in c.finetuned.items()}
    left_out = {exp.backbone: done[exp.encoder].json("backbone.json")["left_out"] for exp in experiments}
    lock = {
        "study": study.model_dump(mode="json"),
        "command": command,
        "versions": {"taskvec": metadata.version("taskvec")} | pipeline.all_versions(),
        "seeds": list(study.seeds),
        "threads": study.threads,
        "device": device,
        "precision": sorted({metrics["precision"] for metrics in tuned.values() if "precision" in metrics}),
        **evaluation_precisions(experiments, done, device),
        "left_out": left_out | {name: metrics["left_out"] for name, metrics in tuned.items() if "left_out" in metrics},
        "steps": {step.label: artifact.id for step, artifact in done.items()},
    }
    records = {exp.backbone: done[exp.encoder].json("backbone.json") for exp in experiments}
    lock |= {"models": {backbone: about for backbone, (about, _) in models.items()}}
    lock |= {"smoke": True} if file.smoke else {}
    if weights := {name: record["sha256"] for name, record in records.items() if "sha256" in record}:
        lock["weights"] = weights
    return lock | {"fingerprint": fingerprint(lock), "processor": processor(device)}  # tells, and decides nothing


def evaluation_precisions(experiments: list[Experiment], done: Done, device: str) -> dict[str, Any]:
    """Return in what numbers a GPU computed: by backbone the precision of passes, and how both TF32 switches stood.

    A CPU has one arithmetic, and the lock says nothing of it. On a GPU a backbone without a choice is float32.
    """
    if not device.startswith("cuda"):
        return {}
    chosen = {exp.backbone: "float32" for exp in experiments}
    compared = (step for step in done if step.type == compare_precisions)
    chosen |= {step.config.backbone_name: done[step].json(AGREEMENTS)["precision"] for step in compared}
    switches = {name: uses_tf32(precision) for name, precision in chosen.items()}
    return {"evaluation_precision": chosen, "tf32": {"evaluation": switches, "else": uses_tf32("float32")}}


def best_models(experiments: list[Experiment], done: Done) -> dict[str, tuple[dict[str, Any], Artifact]]:
    """Return the best model of every backbone, by validation, of the regimes with the most tasks, and what it is."""
    best: dict[str, tuple[int, float]] = {}
    models: dict[str, tuple[dict[str, Any], Artifact]] = {}
    for exp in experiments:
        if exp.model is not None:
            artifact = done[exp.model]
            record = artifact.json("model.json")
            value = len(exp.tasks), float(record["validation"])
            if exp.backbone not in best or value > best[exp.backbone]:
                about = {"regime": exp.regime, "seed": exp.seed} | {key: record[key] for key in KEPT if key in record}
                best[exp.backbone], models[exp.backbone] = value, (about, artifact)
    return models
