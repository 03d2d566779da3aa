"""The run folder: its files, whose it is while a run writes to it, and how rows become tables, figures and a page."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from taskvec.core.errors import TaskvecError
from taskvec.core.files import disk_errors, file_digest, read_json, write_json, write_text
from taskvec.core.locks import holding, sweep, workspace
from taskvec.core.notes import listen, note_lines
from taskvec.engine.publishing import Known, check_place, obstacle, publish
from taskvec.engine.store import digests
from taskvec.report.costs import costs
from taskvec.report.rows import Done, heatmaps, negations, results
from taskvec.report.training import training
from taskvec.report.verdict import SMOKE
from taskvec.study.experiment import Experiment
from taskvec.study.schema import StudyFile

LOCK = "study.lock.json"
"""The file that is written last: a run folder that has it is whole."""
MARKER = ".taskvec"
FIGURES = "figures"
"""The label of what is noted while figures are drawn."""
TABLES = ("results.csv", "disentanglement.csv", "negation.csv", "costs.csv", "training.csv")
FILES = ("study.yaml", *TABLES, "tables.md", "leaderboard.md", "report.html", LOCK)
FOLDERS = ("tables", "figures", "models")
"""What a run folder may hold of ours."""
Models = Mapping[str, list[Path]]
"""The files of the model that is kept, by backbone."""


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


def write_run(
    file: StudyFile, experiments: list[Experiment], done: Done, models: Models, out: Path, lock: dict[str, Any]
) -> None:
    """Write the whole run into a hidden folder, then move it into place; a failure leaves the old run as it was."""
    with disk_errors(out), workspace(out / "run") as fresh:
        write_text(fresh / "study.yaml", file.text)
        rows, heat = results(file.study.name, experiments, done), heatmaps(experiments, done)
        spent, losses = costs(experiments, done), training(experiments, done)
        for name, frame in zip(TABLES, (rows, heat, negations(experiments, done), spent, losses), strict=True):
            if frame is not None:
                write_text(fresh / name, frame.to_csv(index=False, lineterminator="\n"))
        for backbone, paths in models.items():
            (fresh / "models" / backbone).mkdir(parents=True)
            for path in paths:
                shutil.copyfile(path, fresh / "models" / backbone / path.name)
        from taskvec.report.figures import drawing  # matplotlib is slow, and not always needed

        roles = {choice.called: choice.paper for choice in file.study.backbones if choice.paper}
        with listen() as warnings:
            drawing.write(rows, heat, fresh / "figures", roles, spent, file.smoke, losses)
        lock = lock | {"notes": [*lock["notes"], *({"label": FIGURES, "text": text} for text in warnings)]}
        write_report(rows, heat, spent, losses, fresh, lock, file, roles)
        write_json(fresh / LOCK, lock | {"files": digests(fresh)})
        publish(fresh, out, MARKER, LOCK)


def write_report(
    rows: pd.DataFrame,
    heat: pd.DataFrame | None,
    spent: pd.DataFrame,
    losses: pd.DataFrame | None,
    out: Path,
    lock: dict[str, Any],
    file: StudyFile,
    roles: dict[str, str],
) -> None:
    """Write tables.md, leaderboard.md, the paper's tables as LaTeX, and report.html with the figures."""
    from taskvec.report import leaderboard, page, paper_tables, tables

    study_notes, step_notes = file.study.notes, note_lines(lock["notes"])
    write_text(out / "tables.md", tables.markdown(rows, heat, roles, study_notes, spent, lock, step_notes))
    if boards := leaderboard.boards(rows, spent):
        write_text(out / "leaderboard.md", leaderboard.markdown_boards(boards, file.smoke))
    banner = f"% {SMOKE}\n" if file.smoke else ""
    for name, text in paper_tables.latex_tables(rows, heat, roles).items():
        (out / "tables").mkdir(exist_ok=True)
        write_text(out / "tables" / f"{name}.tex", banner + text)
    html = page.render(rows, heat, out / "figures", lock, file.text, roles, spent, study_notes, losses)
    write_text(out / "report.html", html)
