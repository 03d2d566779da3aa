"""Running a study: its steps, then the run folder with rows, tables, figures, page and models."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from taskvec import pipeline
from taskvec.errors import TaskvecError
from taskvec.executors import open_executor
from taskvec.pipeline import Watcher
from taskvec.plan import Cell, plan
from taskvec.results import Done, heatmaps, results
from taskvec.store import Store, disk_errors, fingerprint, read_json, write_json, write_text
from taskvec.study import StudyFile

LOCK = "study.lock.json"
MARKER = ".taskvec"


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


def default_store() -> Path:
    """Return where artifacts are kept unless told: ``$TASKVEC_STORE``, or ``~/.cache/taskvec``."""
    return Path(os.environ.get("TASKVEC_STORE") or Path.home() / ".cache" / "taskvec")


def default_workers(device: str, threads: int) -> int:
    """Return how many steps run at once: one on a GPU, one for every ``threads`` cores of a CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if device != "cpu" else max(1, cores // threads)


def run_study(file: StudyFile, out: Path, store: Store, workers: int | None, watcher: Watcher, command: str) -> Outcome:
    """Run what is not done yet and write the run folder; a run with nothing to do leaves the folder as it is."""
    from taskvec.compute import choose_device

    _check_folder(out)
    store.sweep()
    device = choose_device(file.study.device)
    cells = plan(file, store)
    counter = Counter(watcher)
    steps = [step for cell in cells for step in cell.steps()]
    executor = open_executor(workers or default_workers(device, file.study.threads))
    done = pipeline.run(steps, store, executor, counter)
    lock = make_lock(file, done, device, command)
    fresh = not is_written(out, lock)
    if fresh:
        with disk_errors(out):
            write_run(file, cells, done, out, lock)
    return Outcome(out, len(done), counter.ran, fresh)


def _check_folder(out: Path) -> None:
    """Make the run folder and mark it as ours; a folder that holds anything else is refused and stays as it is."""
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if not (out / MARKER).exists():
            if any(not path.name.startswith(".") for path in out.iterdir()):
                raise TaskvecError(f"'{out}' is not empty and not a run folder", "choose another with --out")
            write_text(
                out / MARKER, "a run folder of taskvec: report.html, tables.md and results.csv are the results\n"
            )


def make_lock(file: StudyFile, done: Done, device: str, command: str) -> dict[str, Any]:
    """Return what is needed to get the same numbers again: study, versions, seeds, threads, device, fingerprints."""
    study = file.study
    lock = {
        "study": study.model_dump(mode="json"),
        "command": command,
        "versions": pipeline.versions(),
        "seeds": list(study.seeds),
        "threads": study.threads,
        "device": device,
        "precision": sorted(
            {done[s].json("metrics.json").get("precision", "") for s in done if s.function.endswith(":finetune")}
        ),
        "steps": {step.label: artifact.id for step, artifact in done.items()},
    }
    return lock | {"fingerprint": fingerprint(lock)}


def is_written(out: Path, lock: dict[str, Any]) -> bool:
    """Say whether the folder holds exactly this run, whole."""
    try:
        written = read_json(out / LOCK)
    except (OSError, ValueError):
        return False
    return written.get("fingerprint") == lock["fingerprint"] and all((out / name).exists() for name in written["files"])


def write_run(file: StudyFile, cells: list[Cell], done: Done, out: Path, lock: dict[str, Any]) -> None:
    """Write the whole run folder; the lock, which says that it is complete, comes last."""
    (out / LOCK).unlink(missing_ok=True)
    write_text(out / "study.yaml", file.text)
    rows, heat = results(file.study.name, cells, done), heatmaps(cells, done)
    write_text(out / "results.csv", rows.to_csv(index=False, lineterminator="\n"))
    if heat is not None:
        write_text(out / "disentanglement.csv", heat.to_csv(index=False, lineterminator="\n"))
    models = write_models(cells, done, out / "models")
    names = ["study.yaml", "results.csv", *models, *write_report(rows, heat, out, lock, file.text)]
    write_json(out / LOCK, lock | {"files": names + (["disentanglement.csv"] if heat is not None else [])})


def write_report(
    rows: pd.DataFrame, heat: pd.DataFrame | None, out: Path, lock: dict[str, Any], text: str
) -> list[str]:
    """Write tables.md, the figures and report.html, and return their names."""
    from taskvec import figures, page, tables  # matplotlib is slow to import and a finished run does not need it

    write_text(out / "tables.md", tables.markdown(rows, heat))
    pictures = out / "figures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    names = figures.write(rows, heat, pictures)
    write_text(out / "report.html", page.render(rows, heat, pictures, lock, text))
    return ["tables.md", "report.html", *(f"figures/{name}" for name in names)]


def write_models(cells: list[Cell], done: Done, out: Path) -> list[str]:
    """Copy the best model of every backbone (over regimes and seeds, by validation) into its folder."""
    best: dict[str, tuple[float, Path]] = {}
    for cell in cells:
        if cell.model is not None:
            artifact = done[cell.model]
            value = float(artifact.json("model.json")["validation"])
            if cell.backbone not in best or value > best[cell.backbone][0]:
                best[cell.backbone] = value, artifact.folder
    fresh = out.with_name(f".models-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    for backbone, (_, source) in best.items():
        shutil.copytree(source, fresh / backbone, ignore=shutil.ignore_patterns("record.json"))
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    return [file.relative_to(out.parent).as_posix() for file in sorted(out.rglob("*")) if file.is_file()]
