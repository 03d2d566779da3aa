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
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from taskvec.core.locks import replacing
from taskvec.core.machine import cores
from taskvec.core.notes import library_warnings, listen, note
from taskvec.merging.registry import PER_TASK
from taskvec.paper import numbers as paper
from taskvec.report.figures.costs import cost_panels
from taskvec.report.figures.counts import by_count, combinations, error_by_count, with_sets
from taskvec.report.figures.curves import lambda_curve, lambda_curves, lambda_methods
from taskvec.report.figures.dots import accuracies, method_gains, scales, with_own_scales
from taskvec.report.figures.emergence import emergence, snapshots
from taskvec.report.figures.maps import by_backbone, heatmaps
from taskvec.report.figures.style import STYLE
from taskvec.report.leaderboard import boards
from taskvec.report.texts import short_backbone
from taskvec.report.views import View, error_rows, views

Rows = tuple[pd.DataFrame, pd.DataFrame | None, Mapping[str, str] | None, pd.DataFrame | None]
"""What figures are drawn from: results, heatmaps, roles of backbones in the paper, costs."""
SHARE = 16
"""Figures that make it worth while to start another process."""
FIGURE_6 = "vit-b16-in21k"
UNDATED: dict[str, dict[str, None]] = {  # endings, and what would differ between two days or two installations
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}


class Planned(NamedTuple):
    """One figure of a run: the stem of its file names, what it is, and whose rows it draws (empty: all)."""

    stem: str
    kind: str
    backbone: str
    regime: str
    draw: Callable[[], Figure]


class Compared(NamedTuple):
    """Backbones that are compared in one figure, and in what they differ."""

    name: str
    what: str
    backbones: list[str]


def groups(results: pd.DataFrame, roles: Mapping[str, str]) -> list[Compared]:
    """List the comparisons of the paper's figures; the backbone without pre-training stands beside the algorithms."""
    named = paper.backbone_of(paper.checked(roles))
    algorithms = [found[0] for keys in paper.ALGORITHMS if (found := [named[key] for key in keys if key in named])]
    control = [str(name) for name in results["backbone"].unique() if name not in roles and paper.is_control(str(name))]
    data, scale = (
        [named[key] for pair in pairs if set(pair) <= set(named) for key in pair]
        for pairs in (paper.MORE_DATA, paper.LARGER)
    )
    everything = [str(name) for name in results["backbone"].unique()]
    return [
        Compared("algorithm", "by pre-training algorithm", algorithms + control if algorithms else []),
        Compared("data", "by size of the pre-training data", data),
        Compared("scale", "by model scale", scale),
        Compared("all", "all backbones", everything),
    ]


def plan(
    results: pd.DataFrame,
    heatmap: pd.DataFrame | None = None,
    roles: Mapping[str, str] | None = None,
    costs: pd.DataFrame | None = None,
) -> list[Planned]:
    """List the figures of a run in reading order, comparisons first; files are the stem with .png and .pdf."""
    found = [one for one in views(results) if one.methods]
    compared = groups(results, roles or {})
    out: list[Planned] = []
    for regime in dict.fromkeys(one.regime for one in found):
        if snapshots(results, regime):
            out.append(_of_regime("emergence", regime, partial(emergence, results, heatmap, regime)))
        out += _curves([one for one in found if one.regime == regime], results, regime)
        out += _heatmaps(compared, heatmap, regime)
        out += _counts(compared, results, regime, roles or {})
        if with_own_scales(found, regime):
            out.append(_of_regime("scales", regime, partial(scales, results, regime)))
    for board in boards(results, costs):
        place = board.view.backbone, board.view.regime
        out.append(Planned(_stem("leaderboard", *place), "leaderboard", *place, partial(cost_panels, board)))
    return out + [planned for one in found for planned in _of_view(one, results, heatmap)]


def _of_regime(kind: str, regime: str, draw: Callable[[], Figure], backbone: str = "") -> Planned:
    return Planned(_stem(kind, *(name for name in (backbone, regime) if name)), kind, "", regime, draw)


def _curves(found: list[View], results: pd.DataFrame, regime: str) -> list[Planned]:
    """Plan the paper's Figure 2 where a regime has several backbones."""
    return [_of_regime("backbones", regime, partial(lambda_curves, results, regime))] if len(found) > 1 else []


def _heatmaps(compared: list[Compared], heatmap: pd.DataFrame | None, regime: str) -> list[Planned]:
    """Plan the paper's Figures 1, 3, 4 and 5, or one of all backbones where no comparison of the paper can be drawn."""
    if heatmap is None:
        return []
    measured = set(heatmap.loc[heatmap["regime"] == regime, "backbone"])
    present = [one for one in _among(compared, measured) if one.name != "all"] or _among(compared, measured)
    return [
        _of_regime(f"heatmaps-{one.name}", regime, partial(by_backbone, heatmap, one.backbones, regime, one.what))
        for one in present
    ]


def _counts(compared: list[Compared], results: pd.DataFrame, regime: str, roles: Mapping[str, str]) -> list[Planned]:
    """Plan the paper's Figures 6 to 9, and the disentanglement error by the number of tasks."""
    measured = with_sets(results, regime)
    out: list[Planned] = []
    if measured:
        one = next((name for name in measured if roles.get(name) == FIGURE_6), measured[0])
        out.append(_of_regime("combinations", regime, partial(combinations, results, one, regime)))
    for group in sorted(_among(compared, measured), key=lambda one: one.name != "all"):  # Figures 7, 8, 9
        if group.name != "algorithm":
            draw = partial(by_count, results, group.backbones, regime, group.what)
            out.append(_of_regime(f"counts-{group.name}", regime, draw))
    erring = with_sets(results, regime, ["disentanglement_error"])
    if erring:
        out.append(_of_regime("errors", regime, partial(error_by_count, results, erring, regime, "all backbones")))
    return out


def _among(compared: list[Compared], measured: Collection[str]) -> list[Compared]:
    """Keep of each group what was measured, and the groups that still compare something."""
    present = [one._replace(backbones=[name for name in one.backbones if name in measured]) for one in compared]
    return [one for one in present if len(one.backbones) > 1]


def _of_view(one: View, results: pd.DataFrame, heatmap: pd.DataFrame | None) -> list[Planned]:
    """Plan the figures of one backbone in one regime."""
    kinds: dict[str, Callable[..., Figure]] = {"accuracies": accuracies}
    kinds |= {"gains": method_gains} if one.methods[1:] else {}
    kinds |= {"lambda": lambda_curve}
    searched = [method for method in one.methods if method != PER_TASK]
    kinds |= {"lambdas": lambda_methods} if searched[1:] else {}
    out = [_planned(kind, draw, results, one) for kind, draw in kinds.items()]
    if heatmap is not None and len(error_rows(heatmap, one.backbone, one.regime)):
        out.append(_planned("heatmap", heatmaps, heatmap, one))
    return out


def _planned(kind: str, draw: Callable[..., Figure], rows: pd.DataFrame, one: View) -> Planned:
    stem = _stem(kind, one.backbone, one.regime)
    return Planned(stem, kind, one.backbone, one.regime, lambda: draw(rows, one.backbone, one.regime))


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
) -> list[str]:
    """Write every figure of a run as PNG (200 dpi) and PDF, the same bytes for the same rows; return the file names.

    Many are drawn by several processes at once; those of a trial run say in their titles that they are. What libraries
    warn of, such as letters that no font has, is noted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = (results, heatmap, roles, costs)
    planned = plan(*rows)
    others = min(cores(), len(planned) // SHARE) - 1
    jobs = [(rows, folder, place, others + 1, smoke) for place in range(1, others + 1)]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(_begin(job)) for job in jobs]
        noted = draw_share(rows, folder, 0, max(1, others + 1), smoke)
        for process in running:
            noted += _end(process)
    for _, text in sorted(noted, key=lambda one: one[0]):  # in the order of figures, whoever drew them
        note(text)
    return [f"{one.stem}.{ending}" for one in planned for ending in UNDATED]


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
