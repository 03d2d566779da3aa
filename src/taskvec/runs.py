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
from taskvec.compute import choose_device, processor
from taskvec.costs import costs
from taskvec.errors import TaskvecError
from taskvec.executors import cores, open_executor
from taskvec.forecast import decoded_bytes
from taskvec.merging.buffers import DIRECTIONS
from taskvec.pipeline import Watcher
from taskvec.plan import plan
from taskvec.results import Done, heatmaps, negations, results
from taskvec.store import (
    Artifact,
    Store,
    digests,
    disk_errors,
    fingerprint,
    gigabytes,
    read_json,
    write_json,
    write_text,
)
from taskvec.study import StudyFile
from taskvec.verdict import SMOKE

LOCK = "study.lock.json"
MARKER = ".taskvec"
KEPT = ("method", "config", "heads", "scale", "scales")
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
    check_folder(out)
    store.sweep()
    device = choose_device(file.study.device)
    cells = plan(file, store)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if not (out / MARKER).exists():
            write_text(
                out / MARKER, "a run folder of taskvec: report.html, tables.md and results.csv are the results\n"
            )
    counter = Counter(watcher)
    steps = [step for cell in cells for step in cell.steps()]
    say_size(decoded_bytes(steps, store), store, watcher)
    executor = open_executor(workers or default_workers(device, file.study.threads))
    done = pipeline.run(steps, store, executor, counter)
    lock = make_lock(file, cells, done, device, command)
    fresh = not is_written(out, lock)
    if fresh:
        with disk_errors(out):
            write_run(file, cells, done, out, lock)
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
    lock |= {"models": {backbone: about for backbone, (about, _) in best_models(cells, done).items()}}
    lock |= {"smoke": True} if file.smoke else {}
    if weights := {name: record["sha256"] for name, record in records.items() if "sha256" in record}:
        lock["weights"] = weights
    return lock | {"fingerprint": fingerprint(lock), "processor": processor(device)}  # tells, and decides nothing


def is_written(out: Path, lock: dict[str, Any]) -> bool:
    """Say whether the folder holds exactly this run, whole and undamaged."""
    try:
        written = read_json(out / LOCK)
        return bool(written["fingerprint"] == lock["fingerprint"] and written["files"] == held(out))
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


def write_report(
    rows: pd.DataFrame, heat: pd.DataFrame | None, spent: pd.DataFrame, out: Path, lock: dict[str, Any], file: StudyFile
) -> None:
    """Write tables.md, leaderboard.md, the paper's tables as LaTeX, the figures and report.html."""
    from taskvec import comparison, figures, leaderboard, page, tables  # matplotlib is slow, and not always needed

    roles = {b.name or default_name(b.address): b.paper for b in file.study.backbones if b.paper}
    write_text(out / "tables.md", tables.markdown(rows, heat, roles, file.study.notes, spent, lock))
    if found := leaderboard.boards(rows, spent):
        write_text(out / "leaderboard.md", leaderboard.markdown_boards(found, file.smoke))
    banner = f"% {SMOKE}\n" if file.smoke else ""
    for name, text in comparison.latex_tables(rows, heat, roles).items():
        (out / "tables").mkdir(exist_ok=True)
        write_text(out / "tables" / f"{name}.tex", banner + text)
    (out / "figures").mkdir()
    figures.write(rows, heat, out / "figures", roles, spent, file.smoke)
    how = (lock, file.text, roles, spent, file.study.notes)
    write_text(out / "report.html", page.render(rows, heat, out / "figures", *how))


def best_models(cells: list[Cell], done: Done) -> dict[str, tuple[dict[str, Any], Artifact]]:
    """Return the best model of every backbone, by validation, of the regimes with the most tasks, and what it is."""
    best: dict[str, tuple[int, float]] = {}
    found: dict[str, tuple[dict[str, Any], Artifact]] = {}
    for cell in cells:
        if cell.model is not None:
            artifact = done[cell.model]
            record = artifact.json("model.json")
            value = len(cell.tasks), float(record["validation"])
            if cell.backbone not in best or value > best[cell.backbone]:
                about = {"regime": cell.regime, "seed": cell.seed} | {key: record[key] for key in KEPT if key in record}
                best[cell.backbone], found[cell.backbone] = value, (about, artifact)
    return found


def write_models(cells: list[Cell], done: Done, out: Path) -> None:
    """Copy the best model of every backbone into its folder."""
    for backbone, (_, artifact) in best_models(cells, done).items():
        source = artifact.folder
        (out / backbone).mkdir(parents=True)
        for name in ("encoder.safetensors", "heads.safetensors", AROUND, DIRECTIONS, "model.json"):
            if (source / name).exists():
                shutil.copyfile(source / name, out / backbone / name)
