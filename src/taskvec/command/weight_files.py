"""Merging and comparing files of weights: from paths and options to files, tables and the lines that tell of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from taskvec.core.errors import TaskvecError
from taskvec.core.files import disk_errors, write_text
from taskvec.core.locks import workspace
from taskvec.encoders.addresses import split_key
from taskvec.engine.publishing import check_names, check_outside, settle
from taskvec.merging import plugins
from taskvec.merging.entries import Kind
from taskvec.merging.matching import SHOWN, Matched, match
from taskvec.merging.on_disk import SLICE, Streams, Watch, check_new, merge_files, plan_target, unwatched
from taskvec.merging.registry import ADDITION, Recipe, find_recipe
from taskvec.weights.reader import FLOATS, Checkpoint, labels
from taskvec.weights.writer import sole_writer

if TYPE_CHECKING:
    import pandas as pd

    from taskvec.merging.differences import Differences

FILES = ("diff.csv", "cosines.csv", "diff.png", "diff.pdf")
"""What a comparison writes into a folder."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def open_all(paths: Sequence[Path], stack: ExitStack) -> list[Checkpoint]:
    """Open checkpoints, of FILE#NAME a part, until the stack ends; their labels tell them apart."""
    parts = [split_key(str(path)) for path in paths]
    named = zip(parts, labels(paths), strict=True)
    return [stack.enter_context(Checkpoint(Path(path), label, part)) for (path, part), label in named]


# ---------------------------------------------------------------- merging


@dataclass(frozen=True)
class Merge:
    """A merge of files as it is asked for; ``settings`` are key=value, ``exclude`` patterns, ``plugins`` Python files.

    ``keep`` is the former name of ``exclude``.
    """

    base: Path
    tuned: Sequence[Path]
    out: Path
    scale: float
    method: str = ADDITION
    settings: Sequence[str] = ()
    exclude: Sequence[str] = ()
    dtype: str | None = None
    shard_size: str | None = None
    seed: int = 0
    plugins: Sequence[Path] = ()
    device: str = "auto"
    keep: InitVar[Sequence[str]] = ()

    def __post_init__(self, keep: Sequence[str]) -> None:
        """Exclude what the former name asks for as well."""
        object.__setattr__(self, "exclude", (*self.exclude, *keep))

    def run(self, watch: Watch = unwatched) -> list[str]:
        """Merge, and return what to tell about it; mistakes raise before anything is written."""
        plugins.use(self.plugins)
        recipe = find_recipe(self.method, parse_settings(self.settings))
        check_possible(recipe, self.scale)
        recipe.check_tasks(len(self.tuned))
        device = choose_merge_device(recipe, self.device)
        limit = None if self.shard_size is None else parse_size(self.shard_size)
        with ExitStack() as stack:
            base, *tuned = open_all([self.base, *self.tuned], stack)
            check_different([base, *tuned])
            check_filled([base, *tuned])
            with disk_errors(self.out):
                target = plan_target(self.out, self.dtype, limit, [base, *tuned], recipe)
            matched = match(base, tuned, self.exclude)
            streams = Streams.of(recipe, base, tuned, matched, seed=self.seed, watch=watch, device=device)
            with sole_writer(target.out):
                check_new(target)
                written = merge_files(recipe, streams, self.scale, target)
            count = f"{len(tuned)} checkpoint{'s' if len(tuned) > 1 else ''}"
            return [
                f"{recipe.name} of {count} at scale {self.scale:g}",
                *summary_lines(streams, recipe),
                *map(str, written),
            ]


def check_different(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise for files that are given twice: their vector would count twice, or be zero and water an average down."""
    seen: dict[frozenset[Any], int] = {}
    for number, checkpoint in enumerate(checkpoints):
        places = ((stat.st_dev, stat.st_ino) for stat in map(Path.stat, checkpoint.files))
        first = seen.setdefault(frozenset((*places, *checkpoint.tensors)), number)
        if first < number:
            reason = "the base and a fine-tuned checkpoint" if first == 0 else "given twice"
            raise TaskvecError(
                f"'{checkpoint.path}' is {reason}", "name every file once; a pattern such as * may have the base too"
            )


def check_filled(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise for files whose matrices are all zero: nothing was saved in them."""
    for checkpoint in checkpoints:
        floats = {name: stored for name, stored in checkpoint.tensors.items() if stored.dtype in FLOATS and stored.size}
        matrices = {name: stored.size for name, stored in floats.items() if len(stored.shape) > 1}
        slices = ((name, i, min(size, i + SLICE)) for name, size in matrices.items() for i in range(0, size, SLICE))
        if matrices and not any(checkpoint.read(*place).any() for place in slices):
            raise TaskvecError(
                f"'{checkpoint.path}': all its matrices are zero", "give a checkpoint that holds trained weights"
            )


def check_possible(recipe: Recipe, scale: float) -> None:
    """Raise for a scale that is no number, and for methods that need more than files."""
    if not math.isfinite(scale):
        raise TaskvecError(f"--scale {scale} is no finite number", "give one such as 0.3")
    needs = sorted(recipe.needs - {"seed"})
    if needs:
        raise TaskvecError(
            f"'{recipe.name}' needs {' and '.join(needs)}, which files of weights do not hold",
            "use it in a study file (docs/study.md), or choose another method",
        )


def choose_merge_device(recipe: Recipe, setting: str) -> str:
    """Return where a recipe computes: on the device that is asked for, by default on a GPU what computes much."""
    if setting == "auto" and not recipe.heavy:
        return "cpu"
    from taskvec.core.compute import choose_device  # torch

    return choose_device(setting)


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """Return hyperparameters of key=value; values are JSON (0.2, true, [1, 2]) or else text."""
    settings: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or key.strip() in settings:
            why = "given twice" if key.strip() in settings else "not of the form key=value"
            raise TaskvecError(f"--set '{text}' is {why}", "write for example --set drop=0.5")
        try:
            settings[key.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            settings[key.strip()] = value.strip()
    return settings


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 5GB, 500 MB or 2GiB."""
    parsed = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?I?)B?", text.strip().upper())
    size = int(float(parsed.group(1)) * UNITS.get(parsed.group(2), 0)) if parsed else 0
    if size < 1:
        raise TaskvecError(f"--shard-size '{text}' is no size", "write for example 5GB or 500MiB")
    return size


def summary_lines(streams: Streams, recipe: Recipe) -> list[str]:
    """Return lines that account for every tensor of every file."""
    matched, base = streams.matched, streams.base
    numbers = sum(base.tensors[name].size for name in matched.merged)
    lines = [f"merged {len(matched.merged)} of {len(base.tensors)} tensors ({numbers:,} numbers)"]
    if matched.tied:
        pairs = [f"{twin} = {first}" for twin, first in matched.tied.items()]
        lines.append(f"tied in all files, and in the result: {len(pairs)} ({_some(pairs)})")
    if recipe.matrices:
        kinds = {kind: [name for name in matched.merged if streams.kinds[name][0] == kind] for kind in get_args(Kind)}
        tables = f", {len(kinds['embedding'])} tables ({_some(kinds['embedding'])})" if kinds["embedding"] else ""
        lines.append(f"as matrices: {len(kinds['matrix'])}; averaged: {len(kinds['vector'])} vectors{tables}")
    ways = {"integers": matched.integers, "by --exclude": matched.excluded}
    carried = [f"{len(names)} {way} ({_some(names)})" for way, names in ways.items() if names]
    lines.append(f"carried over from the base: {', '.join(carried) or 'none'}; refused: none")
    for checkpoint, names in zip(streams.tuned, matched.unused, strict=True):
        if names:
            lines.append(f"not used of {checkpoint.label}: {len(names)} ({_some(names)})")
    unmoved = [checkpoint.label for checkpoint, moved in zip(streams.tuned, streams.moved, strict=True) if not moved]
    return [*lines, *(f"{label} does not differ from the base: its task vector is zero" for label in unmoved)]


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:SHOWN], *(["..."] if len(names) > SHOWN else [])])


# ---------------------------------------------------------------- comparing


def compare(
    base: Path,
    tuned: Sequence[Path],
    exclude: Sequence[str] = (),
    watch: Watch = unwatched,
    keep: Sequence[str] = (),
) -> Differences:
    """Return how checkpoints differ from their base, without tensors that match the patterns of ``exclude``.

    ``keep`` is the former name of ``exclude``.
    """
    with ExitStack() as stack:
        first, *others = open_all([base, *tuned], stack)
        matched: Matched = match(first, others, (*exclude, *keep), split=True)
        from taskvec.merging.differences import measure  # pandas

        return measure(Streams(first, others, matched, watch=watch))


def tables(measured: Differences) -> dict[str, pd.DataFrame]:
    """Return what the terminal shows: titles and tables of text."""
    import pandas as pd

    totals = measured.by_checkpoint()
    summary = pd.DataFrame(
        {
            "Checkpoint": totals["fine_tuned"],
            "norm": totals["norm"].map("{:.4g}".format),
            "of the base's": totals["relative"].map(_share),
            "entries changed": totals["share"].map("{:.1%}".format),
        }
    )
    layers = measured.by_layer().pivot(index="layer", columns="fine_tuned", values="relative")
    layers = layers.loc[list(measured.products), list(measured.labels)].map(_share)
    shown = {
        "task vectors": summary,
        "norm of the task vector by layer, of the base's": _named("Layer", layers),
    }
    if len(measured.labels) > 1:
        shown["cosines between task vectors"] = _square(measured.cosines())
    return shown


def _share(value: float) -> str:
    """Write a share of the base's norm; of a base of zeros there is none."""
    return "–" if math.isnan(value) else f"{value:.3%}"


def _square(cosines: pd.DataFrame) -> pd.DataFrame:
    """Return the cosines over all layers as a triangle, a row a checkpoint."""
    import pandas as pd

    overall = cosines[cosines["layer"] == ""]
    names = list(dict.fromkeys([*overall["first"], *overall["second"]]))
    texts = (overall["cosine"].round(3) + 0.0).map("{:.3f}".format)
    values = dict(zip(zip(overall["first"], overall["second"], strict=True), texts, strict=True))
    rows = [[values.get((other, name), "") for other in names[:-1]] for name in names[1:]]
    return _named("Checkpoint", pd.DataFrame(rows, columns=names[:-1], index=names[1:]))


def _named(heading: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Put the names of the rows into a first column; a checkpoint may be called as that column is."""
    frame = frame.copy()
    frame.insert(0, heading, frame.index, allow_duplicates=True)
    return frame


def check_out(out: Path, inputs: Sequence[Path]) -> None:
    """Raise, before any work, if the files of a comparison cannot go to a folder."""
    check_names(out, FILES)
    check_outside(out, [Path(split_key(str(given))[0]) for given in inputs])


def write(measured: Differences, out: Path) -> list[str]:
    """Write diff.csv (a row a tensor and checkpoint), cosines.csv, and the figure; return their names.

    Other files of these names are kept aside.
    """
    from taskvec.report.figures import drawing as figures
    from taskvec.report.figures.differences import differences

    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with workspace(out / "diff") as fresh:
            for name, frame in {"diff.csv": measured.tensors, "cosines.csv": measured.cosines()}.items():
                write_text(fresh / name, frame.to_csv(index=False, lineterminator="\n"))
            figures.save(differences(measured.by_layer(), measured.cosines()), fresh, "diff")
            for name in FILES:
                settle(fresh, out, name)
    return list(FILES)
