"""Metric rows in, PNG and PDF out: every figure of the paper, and accuracy for each task at a glance."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from taskvec.core.locks import replacing
from taskvec.core.machine import cores
from taskvec.core.notes import library_warnings, listen, note
from taskvec.report.figures.costs import LEADERBOARD
from taskvec.report.figures.counts import COMBINATIONS, COUNTS, ERRORS
from taskvec.report.figures.curves import BACKBONES, LAMBDA, LAMBDAS
from taskvec.report.figures.dots import ACCURACIES, GAINS, SCALES
from taskvec.report.figures.emergence import EMERGENCE
from taskvec.report.figures.heatmaps import HEATMAP, HEATMAPS
from taskvec.report.figures.registry import Draw, FigureType, Run
from taskvec.report.figures.style import STYLE
from taskvec.report.figures.training import TRAINING
from taskvec.report.texts import short_backbone
from taskvec.report.views import View

Rows = tuple[pd.DataFrame, pd.DataFrame | None, Mapping[str, str] | None, pd.DataFrame | None, pd.DataFrame | None]
"""What figures are drawn from: results, heatmaps, roles of backbones in the paper, costs, losses of training."""
SHARE = 16
"""Figures that make it worth while to start another process."""
OF_REGIMES = (EMERGENCE, BACKBONES, *HEATMAPS, COMBINATIONS, *COUNTS, ERRORS, SCALES)
"""Every kind of figure that a regime has, in reading order."""
OF_VIEWS = (LEADERBOARD, ACCURACIES, GAINS, LAMBDA, LAMBDAS, TRAINING, HEATMAP)
"""Every kind of figure that one backbone has in one regime, in reading order."""
UNDATED: dict[str, dict[str, None]] = {  # endings, and what would differ between two days or two installations
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}


class Planned(NamedTuple):
    """One figure of a run: the stem of its file names, what it is, and whose rows it draws (empty: all)."""

    stem: str
    type: FigureType[str] | FigureType[View]
    backbone: str
    regime: str
    draw: Draw

    @property
    def kind(self) -> str:
        """Return the name of its type."""
        return self.type.name


def plan(
    results: pd.DataFrame,
    heatmap: pd.DataFrame | None = None,
    roles: Mapping[str, str] | None = None,
    costs: pd.DataFrame | None = None,
    training: pd.DataFrame | None = None,
) -> list[Planned]:
    """List the figures of a run in reading order, comparisons first; files are the stem with .png and .pdf."""
    run = Run(results, heatmap, roles or {}, costs, training)
    regimes = dict.fromkeys(view.regime for view in run.views)
    return [
        Planned(_stem(type.name, regime), type, "", regime, draw)
        for regime in regimes
        for type in OF_REGIMES
        if (draw := type.plan(run, regime))
    ] + [
        Planned(_stem(type.name, view.backbone, view.regime), type, view.backbone, view.regime, draw)
        for view in run.views
        for type in OF_VIEWS
        if (draw := type.plan(run, view))
    ]


def _stem(kind: str, *names: str) -> str:
    """Make a file name that stays the same from run to run; names that lose characters get a digest of the whole."""
    short = [short_backbone(name) for name in names]
    parts = [re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:48] for name in short]
    plain = all(part == name.replace(":", "-", 1) for part, name in zip(parts, names, strict=True))
    digest = [] if plain else [hashlib.blake2b("\0".join(names).encode(), digest_size=3).hexdigest()]
    return "--".join([kind, *(part for part in parts if part), *digest])


def write(
    results: pd.DataFrame,
    heatmap: pd.DataFrame | None,
    folder: Path,
    roles: Mapping[str, str] | None = None,
    costs: pd.DataFrame | None = None,
    smoke: bool = False,
    training: pd.DataFrame | None = None,
) -> list[str]:
    """Write every figure of a run as PNG (200 dpi) and PDF, the same bytes for the same rows; return the file names.

    Many are drawn by several processes at once; those of a trial run say in their titles that they are. What libraries
    warn of, such as letters that no font has, is noted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = (results, heatmap, roles, costs, training)
    planned = plan(*rows)
    others = min(cores(), len(planned) // SHARE) - 1
    jobs = [(rows, folder, place, others + 1, smoke) for place in range(1, others + 1)]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(_begin(job)) for job in jobs]
        noted = draw_share(rows, folder, 0, max(1, others + 1), smoke)
        for process in running:
            noted += _end(process)
    for _, text in sorted(noted, key=lambda entry: entry[0]):  # in the order of figures, whoever drew them
        note(text)
    return [f"{figure.stem}.{ending}" for figure in planned for ending in UNDATED]


def draw_share(rows: Rows, folder: Path, place: int, of: int, smoke: bool) -> list[tuple[int, str]]:
    """Draw every ``of``-th figure of a run, from the one at ``place`` on; return what was noted, by figure."""
    noted: list[tuple[int, str]] = []
    for number, planned in list(enumerate(plan(*rows)))[place::of]:
        with listen() as heard, library_warnings():
            figure = planned.draw()
            if smoke:
                with matplotlib.rc_context(STYLE):
                    figure.suptitle(f"SMOKE RUN: {figure.get_suptitle()}", x=0.01, ha="left")
            save(figure, folder, planned.stem)
        noted += [(number, text) for text in heard]
    return noted


@contextlib.contextmanager
def _begin(job: tuple[Rows, Path, int, int, bool]) -> Iterator[subprocess.Popen[bytes]]:
    """Let another process draw its share (``figures.__main__``); it does not outlive this one's block."""
    # -P: no import from the folder one happens to be in
    command = [sys.executable, "-P", "-m", "taskvec.report.figures"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # one that died at once: its code tells
                pickle.dump(job, pipe)
            yield process
        finally:
            process.kill()


def _end(process: subprocess.Popen[bytes]) -> list[tuple[int, str]]:
    """Wait until a process has drawn its share, and return what it noted."""
    assert process.stdout is not None
    answer = process.stdout.read()
    if process.wait():
        raise RuntimeError("a process that drew figures has failed; what it says is above")
    return [(number, text) for number, text in json.loads(answer)]


def save(figure: Figure, folder: Path, stem: str) -> list[str]:
    """Write a figure as PNG and PDF; return the file names."""
    names = [f"{stem}.{ending}" for ending in UNDATED]
    for name, ending in zip(names, UNDATED, strict=True):
        _write_whole(folder / name, _encode(figure, ending))
        figure.set_layout_engine("none")  # the PDF keeps the layout of the PNG
    return names


def _encode(figure: Figure, ending: str) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=ending, dpi=200, metadata=UNDATED[ending])
    return buffer.getvalue()


def _write_whole(path: Path, data: bytes) -> None:
    """Write a figure so that no reader meets half of it."""
    with replacing(path) as new:
        new.write_bytes(data)
