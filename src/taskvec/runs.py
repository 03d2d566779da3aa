"""Running a study: its steps, then the run folder with rows, tables, figures, page and models."""

from __future__ import annotations

import os
import shutil
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
from taskvec.merging import plugins
from taskvec.merging.buffers import DIRECTIONS
from taskvec.notes import library_warnings, listen, note_lines, some
from taskvec.pipeline import Watcher
from taskvec.plan import plan, view_sizes
from taskvec.results import Done, heatmaps, negations, results
from taskvec.store import Store, digests, disk_errors, fingerprint, gigabytes, read_json, write_json, write_text
from taskvec.study import StudyFile

LOCK = "study.lock.json"
MARKER = ".taskvec"
PLANNING, FIGURES = "plan", "figures"
"""Who tells what is noted while a study is planned, and while its figures are drawn."""
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
    """Counts the steps that were run now, tells each note once, and passes everything on to another watcher."""

    def __init__(self, watcher: Watcher) -> None:
        self.ran = 0
        self.watcher = watcher
        self.told: dict[str, list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        """Pass on what is not counted."""
        return getattr(self.watcher, name)

    def finished(self, step: pipeline.Step, seconds: float) -> None:
        """Count a step that was done now."""
        self.ran += 1
        self.watcher.finished(step, seconds)

    def noted(self, label: str, note: str) -> None:
        """Pass on a note, unless the same was told before."""
        labels = self.told.setdefault(note, [])
        if not labels:
            self.watcher.noted(label, note)
        if label not in labels:
            labels.append(label)

    def repeat(self) -> None:
        """Name those that told the same as another step, in one line for each note."""
        for note, labels in self.told.items():
            if others := [label for label in labels if label != PLANNING][1:]:
                self.watcher.noted(f"also {some(others)}", note)


def default_workers(device: str, threads: int) -> int:
    """Return how many steps run at once: one on a GPU, one for every ``threads`` cores of a CPU."""
    return 1 if device != "cpu" else max(1, cores() // threads)


def run_study(file: StudyFile, out: Path, store: Store, workers: int | None, watcher: Watcher, command: str) -> Outcome:
    """Run what is not done yet and write the run folder; a run with nothing to do leaves the folder as it is."""
    from taskvec.compute import choose_device

    check_folder(out)
    store.sweep()
    device = choose_device(file.study.device)
    counter = Counter(watcher)
    with listen(lambda text: counter.noted(PLANNING, text)) as planned, library_warnings():
        cells = plan(file, store)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if not (out / MARKER).exists():
            write_text(
                out / MARKER, "a run folder of taskvec: report.html, tables.md and results.csv are the results\n"
            )
    used = {one.path: one.digest for one in plugins.use(file.plugins)}
    digests = {name: used[path.resolve()] for name, path in zip(file.study.plugins, file.plugins, strict=True)}
    steps = [step for cell in cells for step in cell.steps()]
    say_size(view_sizes(pipeline.ordered(steps)), store, watcher)
    executor = open_executor(workers or default_workers(device, file.study.threads))
    done = pipeline.run(steps, store, executor, counter)
    lock = make_lock(file, cells, done, device, command)
    lock |= {"notes": all_notes(planned, steps, done)} | ({"plugins": digests} if digests else {})
    fresh = not is_written(out, lock)
    if fresh:
        with disk_errors(out):
            write_run(file, cells, done, out, lock)
    for one in of_figures(read_json(out / LOCK)["notes"]):
        counter.noted(one["label"], one["text"])
    counter.repeat()
    return Outcome(out, len(done), counter.ran, fresh)


def say_size(views: float, store: Store, watcher: Watcher) -> None:
    """Say before the work how much room decoded images take, where that is much."""
    if views >= LARGE:
        free = gigabytes(shutil.disk_usage(store.folder if store.folder.exists() else Path()).free)
        watcher.noted(
            "decoded images",
            f"about {gigabytes(views)} of evaluation views, and whole training images beside them, in '{store.folder}' "
            f"({free} free there); taskvec store lists and clears them",
        )


def all_notes(planned: list[str], steps: list[pipeline.Step], done: Done) -> list[dict[str, str]]:
    """List what was noted and by whom, in the order of the plan; what a step tells as well, the plan does not."""
    told = [(step.label, text) for step in pipeline.ordered(steps) for text in done[step].notes()]
    known = {text for _, text in told}
    every = dict.fromkeys([*((PLANNING, text) for text in planned if text not in known), *told])
    return [{"label": label, "text": text} for label, text in every]


def of_figures(notes: list[dict[str, str]], figures: bool = True) -> list[dict[str, str]]:
    """Return the notes that were told while figures were drawn, or the others."""
    return [one for one in notes if (one["label"] == FIGURES) == figures]


def check_folder(out: Path) -> None:
    """Raise if the run folder holds anything that is not ours: it stays as it is."""
    with disk_errors(out):
        held = [path.name for path in out.iterdir()] if out.exists() else []
    if MARKER not in held and any(not name.startswith(".") for name in held):
        raise TaskvecError(f"'{out}' is not empty and not a run folder", "choose another with --out")


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
    """Say whether the folder holds exactly this run, whole and undamaged."""
    try:
        written = read_json(out / LOCK)
        same = written["fingerprint"] == lock["fingerprint"] and of_figures(written["notes"], False) == lock["notes"]
        return bool(same and written["files"] == held(out))
    except (OSError, TaskvecError, KeyError, TypeError):
        return False


def held(out: Path) -> dict[str, str]:
    """Return the digests of the files of a run folder, but for its lock and hidden files."""
    return {name: digest for name, digest in digests(out).items() if name != LOCK and not name.startswith(".")}


def write_run(file: StudyFile, cells: list[Cell], done: Done, out: Path, lock: dict[str, Any]) -> None:
    """Write the whole run into a hidden folder, then move it into place; a failure leaves the old run as it was."""
    fresh = out / f".fresh-{os.getpid()}"
    try:
        fresh.mkdir()
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
        lock = lock | {"notes": lock["notes"] + draw_figures(rows, heat, spent, fresh / "figures", file)}
        write_report(rows, heat, spent, fresh, lock, file)
        write_json(fresh / LOCK, lock | {"files": held(fresh)})
        swap(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def swap(fresh: Path, out: Path) -> None:
    """Replace what the run folder shows by what is in ``fresh``: the lock, which says that it is whole, comes last."""
    (out / LOCK).unlink(missing_ok=True)
    for old in [path for path in out.iterdir() if not path.name.startswith(".")]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    for new in sorted(fresh.iterdir(), key=lambda path: path.name == LOCK):
        new.rename(out / new.name)


def roles_of(file: StudyFile) -> dict[str, str]:
    """Return which backbones stand for rows of the paper's tables."""
    return {b.name or default_name(b.address): b.paper for b in file.study.backbones if b.paper}


def draw_figures(
    rows: pd.DataFrame, heat: pd.DataFrame | None, spent: pd.DataFrame, out: Path, file: StudyFile
) -> list[dict[str, str]]:
    """Draw the figures, and return what was noted meanwhile."""
    from taskvec import figures  # matplotlib is slow, and not always needed

    with listen() as heard:
        figures.write(rows, heat, out, roles_of(file), spent)
    return [{"label": FIGURES, "text": text} for text in heard]


def write_report(
    rows: pd.DataFrame, heat: pd.DataFrame | None, spent: pd.DataFrame, out: Path, lock: dict[str, Any], file: StudyFile
) -> None:
    """Write tables.md, leaderboard.md, the paper's tables as LaTeX, and report.html with the figures."""
    from taskvec import comparison, leaderboard, page, tables

    roles, told = roles_of(file), note_lines(lock["notes"])
    write_text(out / "tables.md", tables.markdown(rows, heat, roles, file.study.notes, told))
    if found := leaderboard.boards(rows, spent):
        write_text(out / "leaderboard.md", leaderboard.markdown_boards(found))
    for name, text in comparison.latex_tables(rows, heat, roles).items():
        (out / "tables").mkdir(exist_ok=True)
        write_text(out / "tables" / f"{name}.tex", text)
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
        for name in ("encoder.safetensors", "heads.safetensors", AROUND, DIRECTIONS, "model.json"):
            if (source / name).exists():
                shutil.copyfile(source / name, out / backbone / name)
