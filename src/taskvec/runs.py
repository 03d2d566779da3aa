"""Running a study: its steps, then the run folder with rows, tables, figures, page and models."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from taskvec import pipeline
from taskvec.addresses import default_name
from taskvec.backbones import AROUND
from taskvec.cells import Cell
from taskvec.costs import costs
from taskvec.errors import TaskvecError
from taskvec.executors import cores, open_executor
from taskvec.folders import SPLIT_NAMES
from taskvec.locks import holding, sweep, workspace
from taskvec.merging.buffers import DIRECTIONS
from taskvec.notes import listen
from taskvec.pipeline import Watcher
from taskvec.plan import plan, view_sizes
from taskvec.publishing import Known, check_outside, check_place, inside, mark, obstacle, owned, publish, refuse
from taskvec.results import Done, heatmaps, negations, results
from taskvec.store import (
    Store,
    digests,
    disk_errors,
    file_digest,
    fingerprint,
    gigabytes,
    present,
    read_json,
    write_json,
    write_text,
)
from taskvec.study import StudyFile
from taskvec.tasks import parse, resolve

LOCK = "study.lock.json"
"""The file that is written last: a run folder that has it is whole."""
MARKER = ".taskvec"
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
MODEL = ("encoder.safetensors", "heads.safetensors", AROUND, DIRECTIONS, "model.json")
"""What a run folder may hold of ours, and each folder of a model."""
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
    """Counts the steps that were run now, and passes everything on to another watcher."""

    def __init__(self, watcher: Watcher) -> None:
        self.ran = 0
        self.watcher = watcher

    def __getattr__(self, name: str) -> Any:
        """Pass on what is not counted."""
        return getattr(self.watcher, name)

    def finished(self, step: pipeline.Step, seconds: float) -> None:
        """Count a step that was done now."""
        self.ran += 1
        self.watcher.finished(step, seconds)


def default_workers(device: str, threads: int) -> int:
    """Return how many steps run at once: one on a GPU, one for every ``threads`` cores of a CPU."""
    return 1 if device != "cpu" else max(1, cores() // threads)


def run_study(file: StudyFile, out: Path, store: Store, workers: int | None, watcher: Watcher, command: str) -> Outcome:
    """Run what is not done yet and write the run folder; a run with nothing to do leaves the folder as it is."""
    check_inputs(file, out, store.folder)
    with writing(out):
        check_free(file, out)
        store.open()
        store.sweep()
        return _run(file, out, store, workers, watcher, command)


def _run(file: StudyFile, out: Path, store: Store, workers: int | None, watcher: Watcher, command: str) -> Outcome:
    """Run the steps, and write the run folder where it is not written yet."""
    from taskvec.compute import choose_device

    device = choose_device(file.study.device)
    cells = plan(file, store)
    if not (out / MARKER).exists():
        mark(out, MARKER, {})
    counter = Counter(watcher)
    steps = [step for cell in cells for step in cell.steps()]
    say_size(view_sizes(pipeline.ordered(steps)), store, watcher)
    executor = open_executor(workers or default_workers(device, file.study.threads))
    done = pipeline.run(steps, store, executor, counter)
    with present(artifact.folder for artifact in done.values()), listen() as heard:
        lock = make_lock(file, cells, done, device, command)
        fresh = not is_written(out, lock)
        if fresh:
            write_run(file, cells, done, out, lock)
    for line in heard:
        watcher.noted("run folder", line)
    return Outcome(out, len(done), counter.ran, fresh)


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
    for left in out.glob(".fresh-*"):  # as runs of an older version called it
        if left.name.removeprefix(".fresh-").isdecimal():
            shutil.rmtree(left, ignore_errors=True)


def say_size(views: float, store: Store, watcher: Watcher) -> None:
    """Say before the work how much room decoded images take, where that is much."""
    if views >= LARGE:
        free = gigabytes(shutil.disk_usage(store.folder if store.folder.exists() else Path()).free)
        watcher.noted(
            "decoded images",
            f"about {gigabytes(views)} of evaluation views, and whole training images beside them, in '{store.folder}' "
            f"({free} free there); taskvec store lists and clears them",
        )


def check_folder(out: Path) -> None:
    """Raise if the run folder cannot be one, or holds anything and was none before: it stays as it is."""
    check_place(out)
    with disk_errors(out):
        held = [path.name for path in out.iterdir()] if out.exists() else []
    if MARKER not in held and any(not name.startswith(".") for name in held):
        raise TaskvecError(f"'{out}' is not empty and not a run folder", "choose another with --out")


def check_free(file: StudyFile, out: Path) -> None:
    """Raise, before any work, if something of the user's stands in a run folder where a file of ours may have to go."""
    own = owned(out, MARKER, LOCK)
    backbones = [choice.name or default_name(choice.address) for choice in file.study.backbones]
    names = [*FILES, *(f"models/{name}/{part}" for name in backbones for part in MODEL), *beside(out, own)]
    found = [out / name for name in FOLDERS if os.path.lexists(out / name) and not is_folder(out / name)]
    found += [place for name in names if (place := obstacle(out, name, own))]
    if found:
        raise refuse(found[0])


def beside(out: Path, own: Known) -> Iterator[str]:
    """Yield what others have put among the figures and tables under a name that could be one of ours."""
    others = [p for folder in ("figures", "tables") if is_folder(out / folder) for p in (out / folder).iterdir()]
    names = [name for path in others if (name := path.relative_to(out).as_posix()) not in own]
    if names:
        from taskvec.page import READING  # slow, and seldom needed

        kinds = "|".join(READING)
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
    for given in (*folders, *weights(file)):
        for name in (*FILES, *FOLDERS):
            if inside(given, out / name):
                raise TaskvecError(f"the study reads '{given}', where '{out}' has results", "choose another --out")


def image_folders(file: StudyFile) -> list[Path]:
    """Return the folders of images that a study reads all of: a task's splits, or the task's own folder."""
    found = []
    for task in file.study.tasks:
        kind, rest = parse(resolve(task.address, file.folder, file.study.data))
        root = Path(rest if kind == "folder" else rest.partition("@")[0])
        splits = [root / name for name in SPLIT_NAMES if (root / name).is_dir()] if kind == "folder" else []
        found += splits or ([root] if kind in ("folder", "hf") and root.is_dir() else [])
    return found


def weights(file: StudyFile) -> list[Path]:
    """Return the files of weights, and folders with them, that a study names."""
    given = [name for task in file.study.tasks for name in (task.finetuned, task.head) if name]
    for choice in file.study.backbones:
        kind, _, rest = choice.address.partition(":")
        given.append(rest if kind == "hf" else rest.partition("@")[2])
    return [path for name in given if name and (path := file.folder / Path(name).expanduser()).exists()]


def make_lock(file: StudyFile, cells: list[Cell], done: Done, device: str, command: str) -> dict[str, Any]:
    """Return what is needed to get the same numbers again: study, versions, seeds, threads, device, fingerprints."""
    study = file.study
    tuned = {f"{c.backbone}, {t}": done[s].json("metrics.json") for c in cells for t, s in c.finetuned.items()}
    left_out = {cell.backbone: done[cell.encoder].json("backbone.json")["left_out"] for cell in cells}
    lock = {
        "study": study.model_dump(mode="json"),
        "command": command,
        "versions": {"taskvec": metadata.version("taskvec")} | pipeline.versions(),
        "seeds": list(study.seeds),
        "threads": study.threads,
        "device": device,
        "precision": sorted({metrics["precision"] for metrics in tuned.values() if "precision" in metrics}),
        "left_out": left_out | {name: metrics["left_out"] for name, metrics in tuned.items() if "left_out" in metrics},
        "steps": {step.label: artifact.id for step, artifact in done.items()},
    }
    records = {cell.backbone: done[cell.encoder].json("backbone.json") for cell in cells}
    if weights := {name: record["sha256"] for name, record in records.items() if "sha256" in record}:
        lock["weights"] = weights
    return lock | {"fingerprint": fingerprint(lock)}


def is_written(out: Path, lock: dict[str, Any]) -> bool:
    """Say whether the folder holds all files of exactly this run, undamaged; others may lie beside them."""
    try:
        written = read_json(out / LOCK)
        files = written["files"].items()
        same = (not obstacle(out, name, [name]) and file_digest(out / name) == digest for name, digest in files)
        return bool(written["fingerprint"] == lock["fingerprint"] and all(same))
    except (OSError, TaskvecError, KeyError, TypeError, AttributeError):
        return False


def write_run(file: StudyFile, cells: list[Cell], done: Done, out: Path, lock: dict[str, Any]) -> None:
    """Write the whole run into a hidden folder, then move it into place; a failure leaves the old run as it was."""
    with disk_errors(out), workspace(out / "run") as fresh:
        write_text(fresh / "study.yaml", file.text)
        rows, heat = results(file.study.name, cells, done), heatmaps(cells, done)
        write_text(fresh / "results.csv", rows.to_csv(index=False, lineterminator="\n"))
        if heat is not None:
            write_text(fresh / "disentanglement.csv", heat.to_csv(index=False, lineterminator="\n"))
        if (forgotten := negations(cells, done)) is not None:
            write_text(fresh / "negation.csv", forgotten.to_csv(index=False, lineterminator="\n"))
        spent = costs(cells, done)
        write_text(fresh / "costs.csv", spent.to_csv(index=False, lineterminator="\n"))
        write_models(cells, done, fresh / "models")
        write_report(rows, heat, spent, fresh, lock, file)
        write_json(fresh / LOCK, lock | {"files": digests(fresh)})
        publish(fresh, out, MARKER, LOCK)


def write_report(
    rows: pd.DataFrame, heat: pd.DataFrame | None, spent: pd.DataFrame, out: Path, lock: dict[str, Any], file: StudyFile
) -> None:
    """Write tables.md, leaderboard.md, the paper's tables as LaTeX, the figures and report.html."""
    from taskvec import comparison, figures, leaderboard, page, tables  # matplotlib is slow, and not always needed

    roles = {b.name or default_name(b.address): b.paper for b in file.study.backbones if b.paper}
    write_text(out / "tables.md", tables.markdown(rows, heat, roles, file.study.notes))
    if found := leaderboard.boards(rows, spent):
        write_text(out / "leaderboard.md", leaderboard.markdown_boards(found))
    for name, text in comparison.latex_tables(rows, heat, roles).items():
        (out / "tables").mkdir(exist_ok=True)
        write_text(out / "tables" / f"{name}.tex", text)
    (out / "figures").mkdir()
    figures.write(rows, heat, out / "figures", roles, spent)
    how = (lock, file.text, roles, spent, file.study.notes)
    write_text(out / "report.html", page.render(rows, heat, out / "figures", *how))


def write_models(cells: list[Cell], done: Done, out: Path) -> None:
    """Copy the best model of every backbone, by validation, into its folder: of the regimes with the most tasks."""
    best: dict[str, tuple[int, float, Path]] = {}
    for cell in cells:
        if cell.model is not None:
            artifact = done[cell.model]
            value = len(cell.tasks), float(artifact.json("model.json")["validation"])
            if cell.backbone not in best or value > best[cell.backbone][:2]:
                best[cell.backbone] = *value, artifact.folder
    for backbone, (*_, source) in best.items():
        (out / backbone).mkdir(parents=True)
        for name in MODEL:
            if (source / name).exists():
                shutil.copyfile(source / name, out / backbone / name)
