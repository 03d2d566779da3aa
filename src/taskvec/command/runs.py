"""Running a study: its steps, then the run folder with rows, tables, figures, page and models."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from taskvec.core.compute import choose_device, processor
from taskvec.core.errors import TaskvecError
from taskvec.core.files import disk_errors, file_digest, fingerprint, read_json, write_json, write_text
from taskvec.core.formatting import bytes_text
from taskvec.core.locks import holding, sweep, workspace
from taskvec.core.machine import cores
from taskvec.core.notes import library_warnings, listen, note_lines, some
from taskvec.data import sources
from taskvec.data.folders import folders_in, splits_in
from taskvec.deploy.model import ABOUT, ENCODER, HEADS
from taskvec.encoders.addresses import parse, split_key
from taskvec.encoders.records import BASE
from taskvec.engine import pipeline
from taskvec.engine.executors import open_executor
from taskvec.engine.pipeline import Reporter
from taskvec.engine.publishing import Known, check_outside, check_place, inside, mark, obstacle, owned, publish, refuse
from taskvec.engine.store import Artifact, Store, digests, present
from taskvec.merging import plugins
from taskvec.merging.in_memory import DIRECTIONS
from taskvec.merging.variants import DIFFERENCES
from taskvec.report.costs import costs
from taskvec.report.rows import Done, heatmaps, negations, results
from taskvec.report.verdict import SMOKE
from taskvec.study.experiment import Experiment
from taskvec.study.forecast.estimate import decoded_bytes
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile

LOCK = "study.lock.json"
"""The file that is written last: a run folder that has it is whole."""
MARKER = ".taskvec"
PLANNING, FIGURES, FOLDER = "plan", "figures", "run folder"
"""Who tells what is noted while a study is planned, while its figures are drawn, and while its folder is written."""
FILES = (
    "study.yaml",
    "results.csv",
    "disentanglement.csv",
    "negation.csv",
    "costs.csv",
    "tables.md",
    "leaderboard.md",
    "report.html",
    LOCK,
)
FOLDERS = ("tables", "figures", "models")
MODEL = (ENCODER, HEADS, BASE, DIRECTIONS, ABOUT)
"""What a run folder may hold of ours, and each folder of a model."""
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


def default_workers(device: str, threads: int) -> int:
    """Return how many steps run at once: one on a GPU, one for every ``threads`` cores of a CPU."""
    return 1 if device != "cpu" else max(1, cores() // threads)


def run_study(
    file: StudyFile, out: Path, store: Store, workers: int | None, reporter: Reporter, command: str
) -> Outcome:
    """Run what is not done yet and write the run folder; a run with nothing to do leaves the folder as it is."""
    check_inputs(file, out, store.folder)
    counter, device = Counter(reporter), choose_device(file.study.device)
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
        executor = open_executor(workers or default_workers(device, file.study.threads))
        done = pipeline.run(steps, store, executor, counter)
        with present(artifact.folder for artifact in done.values()), listen(functools.partial(counter.note, FOLDER)):
            lock = make_lock(file, experiments, done, device, command)
            lock |= {"notes": all_notes(planned, steps, done)} | plugins_used
            fresh = not is_written(out, lock)
            if fresh:
                write_run(file, experiments, done, out, lock)
        for note in of_figures(read_json(out / LOCK)["notes"]):
            counter.note(note["label"], note["text"])
    counter.repeat()
    return Outcome(out, len(done), counter.ran, fresh)


def used_plugins(file: StudyFile) -> dict[str, Any]:
    """Return what the lock says of a study's plugins: the digest of each by its name in the study."""
    used = {plugin.path: plugin.digest for plugin in plugins.use(file.plugins)}
    digests = {name: used[path.resolve()] for name, path in zip(file.study.plugins, file.plugins, strict=True)}
    return {"plugins": digests} if digests else {}


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Make a run folder this process's own during a block; what killed runs left in it goes, and it goes if empty."""
    check_folder(out)
    busy = TaskvecError(f"another run is writing to '{out}'", "wait for it to end, or choose another with --out")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        with contextlib.ExitStack() as stack:
            with disk_errors(out):
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(holding(out / f"{MARKER}-lock", busy))
                tidy(out)
            yield
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def tidy(out: Path) -> None:
    """Remove what killed runs have left in a run folder."""
    sweep(out)
    for left in out.glob(".fresh-*"):  # as runs of an older version called it, with nothing else in it
        is_ours = left.name.removeprefix(".fresh-").isdecimal() and is_folder(left)
        if is_ours and {path.name for path in left.iterdir()} <= {*FILES, *FOLDERS}:
            shutil.rmtree(left, ignore_errors=True)


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


def of_figures(notes: list[dict[str, str]], figures: bool = True) -> list[dict[str, str]]:
    """Return the notes that were told while figures were drawn, or the others."""
    return [entry for entry in notes if (entry["label"] == FIGURES) == figures]


def check_folder(out: Path) -> None:
    """Raise if the run folder cannot be one, or holds anything and was none before: it stays as it is."""
    check_place(out)
    with disk_errors(out):
        held = [path.name for path in out.iterdir()] if out.exists() else []
    if MARKER not in held and any(not name.startswith(".") for name in held):
        raise TaskvecError(f"'{out}' is not empty and not a run folder", "choose another with --out")


def check_free(file: StudyFile, out: Path) -> None:
    """Raise, before any work, if something of the user's stands in a run folder where a file of ours may have to go."""
    ours = owned(out, MARKER, LOCK) | {MARKER: set()}
    backbones = [choice.called for choice in file.study.backbones]
    names = [MARKER, *FILES, *(f"models/{name}/{part}" for name in backbones for part in MODEL), *beside(out, ours)]
    blocking = [out / name for name in FOLDERS if os.path.lexists(out / name) and not is_folder(out / name)]
    blocking += [place for name in names if (place := obstacle(out, name, ours))]
    if blocking:
        raise refuse(blocking[0])


def beside(out: Path, ours: Known) -> Iterator[str]:
    """Yield what others have put among the figures and tables under a name that could be one of ours."""
    others = [p for folder in ("figures", "tables") if is_folder(out / folder) for p in (out / folder).iterdir()]
    names = [name for path in others if (name := path.relative_to(out).as_posix()) not in ours]
    if names:
        from taskvec.report.figures.drawing import OF_REGIMES, OF_VIEWS  # slow, and seldom needed

        kinds = "|".join(type.name for type in (*OF_REGIMES, *OF_VIEWS))
        form = re.compile(rf"figures/({kinds})--.*\.(png|pdf)|tables/table\d+\.tex")
        yield from filter(form.fullmatch, names)


def is_folder(path: Path) -> bool:
    """Say whether there is a folder itself, and no link to one."""
    return path.is_dir() and not path.is_symlink()


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


def make_lock(file: StudyFile, experiments: list[Experiment], done: Done, device: str, command: str) -> dict[str, Any]:
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
        "left_out": left_out | {name: metrics["left_out"] for name, metrics in tuned.items() if "left_out" in metrics},
        "steps": {step.label: artifact.id for step, artifact in done.items()},
    }
    records = {exp.backbone: done[exp.encoder].json("backbone.json") for exp in experiments}
    lock |= {"models": {backbone: about for backbone, (about, _) in best_models(experiments, done).items()}}
    lock |= {"smoke": True} if file.smoke else {}
    if weights := {name: record["sha256"] for name, record in records.items() if "sha256" in record}:
        lock["weights"] = weights
    return lock | {"fingerprint": fingerprint(lock), "processor": processor(device)}  # tells, and decides nothing


def is_written(out: Path, lock: dict[str, Any]) -> bool:
    """Say whether the folder holds all files of exactly this run, undamaged; others may lie beside them."""
    try:
        written = read_json(out / LOCK)
        files = written["files"].items()
        same = (not obstacle(out, name, [name]) and file_digest(out / name) == digest for name, digest in files)
        known = written["fingerprint"] == lock["fingerprint"] and of_figures(written["notes"], False) == lock["notes"]
        return bool(known and all(same))
    except (OSError, TaskvecError, KeyError, TypeError, AttributeError):
        return False


def write_run(file: StudyFile, experiments: list[Experiment], done: Done, out: Path, lock: dict[str, Any]) -> None:
    """Write the whole run into a hidden folder, then move it into place; a failure leaves the old run as it was."""
    with disk_errors(out), workspace(out / "run") as fresh:
        write_text(fresh / "study.yaml", file.text)
        rows, heat = results(file.study.name, experiments, done), heatmaps(experiments, done)
        write_text(fresh / "results.csv", rows.to_csv(index=False, lineterminator="\n"))
        if heat is not None:
            write_text(fresh / "disentanglement.csv", heat.to_csv(index=False, lineterminator="\n"))
        if (forgotten := negations(experiments, done)) is not None:
            write_text(fresh / "negation.csv", forgotten.to_csv(index=False, lineterminator="\n"))
        spent = costs(experiments, done)
        write_text(fresh / "costs.csv", spent.to_csv(index=False, lineterminator="\n"))
        write_models(experiments, done, fresh / "models")
        lock = lock | {"notes": lock["notes"] + draw_figures(rows, heat, spent, fresh / "figures", file)}
        write_report(rows, heat, spent, fresh, lock, file)
        write_json(fresh / LOCK, lock | {"files": digests(fresh)})
        publish(fresh, out, MARKER, LOCK)


def roles_of(file: StudyFile) -> dict[str, str]:
    """Return which backbones stand for rows of the paper's tables."""
    return {b.called: b.paper for b in file.study.backbones if b.paper}


def draw_figures(
    rows: pd.DataFrame, heat: pd.DataFrame | None, spent: pd.DataFrame, out: Path, file: StudyFile
) -> list[dict[str, str]]:
    """Draw the figures, and return what was noted meanwhile."""
    from taskvec.report.figures import drawing as figures  # matplotlib is slow, and not always needed

    with listen() as heard:
        figures.write(rows, heat, out, roles_of(file), spent, file.smoke)
    return [{"label": FIGURES, "text": text} for text in heard]


def write_report(
    rows: pd.DataFrame, heat: pd.DataFrame | None, spent: pd.DataFrame, out: Path, lock: dict[str, Any], file: StudyFile
) -> None:
    """Write tables.md, leaderboard.md, the paper's tables as LaTeX, and report.html with the figures."""
    from taskvec.report import leaderboard, page, tables
    from taskvec.report import paper_tables as comparison

    roles, noted = roles_of(file), note_lines(lock["notes"])
    write_text(out / "tables.md", tables.markdown(rows, heat, roles, file.study.notes, spent, lock, noted))
    if boards := leaderboard.boards(rows, spent):
        write_text(out / "leaderboard.md", leaderboard.markdown_boards(boards, file.smoke))
    banner = f"% {SMOKE}\n" if file.smoke else ""
    for name, text in comparison.latex_tables(rows, heat, roles).items():
        (out / "tables").mkdir(exist_ok=True)
        write_text(out / "tables" / f"{name}.tex", banner + text)
    how = (lock, file.text, roles, spent, file.study.notes)
    write_text(out / "report.html", page.render(rows, heat, out / "figures", *how))


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


def write_models(experiments: list[Experiment], done: Done, out: Path) -> None:
    """Copy the best model of every backbone into its folder."""
    for backbone, (_, artifact) in best_models(experiments, done).items():
        source = artifact.folder
        (out / backbone).mkdir(parents=True)
        for name in MODEL:
            if (source / name).exists():
                shutil.copyfile(source / name, out / backbone / name)
