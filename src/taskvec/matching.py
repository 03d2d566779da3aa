"""Which tensors of a checkpoint and of those fine-tuned from it belong together; what does not is named. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from taskvec.errors import TaskvecError, did_you_mean
from taskvec.files import FLOATS, INTEGERS, Checkpoint, same

SHOWN = 4
"""Tensors that an error names of each kind."""


@dataclass(frozen=True)
class Matched:
    """What happens to every tensor of a base: it is merged, or carried over, as asked for or as it holds integers.

    ``sources`` says for each fine-tuned checkpoint under which name it holds a merged tensor (a twin's where tied
    weights are stored once), ``aside`` which of its tensors are not used: those of the patterns, and twins.
    """

    merged: tuple[str, ...]
    kept: tuple[str, ...]
    integers: tuple[str, ...]
    sources: tuple[dict[str, str], ...]
    aside: tuple[tuple[str, ...], ...]

    @property
    def carried(self) -> tuple[str, ...]:
        """All tensors that are the base's own in the result."""
        return self.kept + self.integers


def match(base: Checkpoint, tuned: Sequence[Checkpoint], keep: Sequence[str] = ()) -> Matched:
    """Decide for every tensor, or raise and name file and tensors that do not fit, with what would mend it.

    Names that match a pattern of ``keep`` (``head.*``) are the base's own in the result, whatever others hold there.
    Tied weights may be stored once or twice. Integers that differ are refused unless they are mere counters (fewer
    than two dimensions), and so are types that cannot be computed with.
    """
    _check_patterns(keep, [base, *tuned])
    kept = [name for name in base.tensors if _any(name, keep)]
    wanted = [name for name in base.tensors if not _any(name, keep)]
    sources, aside = zip(*(_matched(base, one, wanted, keep) for one in tuned), strict=True) if tuned else ((), ())
    merged = [name for name in wanted if base.tensors[name].dtype in FLOATS]
    integers = [name for name in wanted if base.tensors[name].dtype not in FLOATS]
    _refuse(base, tuned, integers, sources)
    if not merged:
        raise TaskvecError(
            f"'{base.path}' has no floating-point tensor to merge", "is it quantised, or does --keep match everything?"
        )
    return Matched(tuple(merged), tuple(kept), tuple(integers), sources, aside)


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(keep: Sequence[str], checkpoints: Sequence[Checkpoint]) -> None:
    names = dict.fromkeys(name for one in checkpoints for name in one.tensors)
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise TaskvecError(f"no tensor is called '{pattern}'", did_you_mean(pattern, names))


def _matched(
    base: Checkpoint, tuned: Checkpoint, wanted: Sequence[str], keep: Sequence[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return where ``tuned`` holds what is wanted, and what it holds beside; raise where they do not fit."""
    sources = {name: name for name in wanted if name in tuned.tensors}
    missing = [name for name in wanted if name not in sources]
    twins = {name: twin for name in missing if (twin := _twin(base, name, tuned))}
    aside = tuple(name for name in tuned.tensors if name not in sources)
    extra = [name for name in aside if not _any(name, keep) and not _twin(tuned, name, base)]
    unlike = {name: why for name, source in sources.items() if (why := _unlike(base, name, tuned, source))}
    lost = [name for name in missing if name not in twins]
    if lost or extra or unlike:
        raise _unfit(base, tuned, lost, extra, unlike)
    return sources | twins, aside


def _twin(one: Checkpoint, name: str, other: Checkpoint) -> str | None:
    """Return another name under which ``one`` holds the same tensor, and which ``other`` has: weights that are tied.

    Tensors of fewer than two dimensions, and those that hold one value only, are alike by chance and no twins.
    """
    stored = one.tensors[name]
    if len(stored.shape) < 2 or stored.dtype not in FLOATS:
        return None
    candidates = [twin for twin, found in one.tensors.items() if twin != name and found.shape == stored.shape]
    return next((twin for twin in candidates if twin in other.tensors and _tied(one, name, twin)), None)


def _tied(one: Checkpoint, name: str, twin: str) -> bool:
    return same(one, name, one, twin) and len(np.unique(one.read(name, 0, min(one.tensors[name].size, 4096)))) > 1


def _unlike(base: Checkpoint, name: str, tuned: Checkpoint, source: str) -> str:
    """Say how two tensors differ that should be alike; nothing if they do not."""
    a, b = base.tensors[name], tuned.tensors[source]
    if a.shape != b.shape:
        return f"'{source}' has shape {list(b.shape)} instead of {list(a.shape)}"
    if (a.dtype in FLOATS) != (b.dtype in FLOATS):
        return f"'{source}' has type {b.dtype} instead of {a.dtype}"
    return ""


def _unfit(
    base: Checkpoint, tuned: Checkpoint, lost: list[str], extra: list[str], unlike: dict[str, str]
) -> TaskvecError:
    parts = [
        _some("is missing", [f"'{name}'" for name in lost]),
        _some("has, beyond the base's,", [f"'{name}'" for name in extra]),
        "; ".join([*list(unlike.values())[:SHOWN], *_more(unlike)]),
    ]
    bad = [*lost, *extra, *unlike]
    if len(lost) + len(unlike) > len(base.tensors) / 2:
        fix = "give checkpoints that were fine-tuned from this base, saved with the same names"
    else:
        options = " ".join(f"--keep '{pattern}'" for pattern in patterns(bad))
        fix = f"{options} carries the base's tensors of that name, and leaves out the others'"
    problem = "; ".join(part for part in parts if part)
    return TaskvecError(f"refused {len(bad)} tensors: '{tuned.path}' does not fit '{base.path}': {problem}", fix)


def _some(verb: str, names: list[str]) -> str:
    return " ".join([verb, ", ".join(names[:SHOWN]), *_more(names)]) if names else ""


def _more(names: Sequence[str] | dict[str, str]) -> list[str]:
    return [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []


def patterns(names: Sequence[str]) -> list[str]:
    """Return few patterns that match names: the module's for several tensors of one module, else the names."""
    modules: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    found = [f"{module}.*" if module and len(held) > 1 else name for module, held in modules.items() for name in held]
    return list(dict.fromkeys(found))[:SHOWN]


def _refuse(
    base: Checkpoint, tuned: Sequence[Checkpoint], names: Iterable[str], sources: Sequence[dict[str, str]]
) -> None:
    """Raise for tensors that are neither numbers to compute with nor whole numbers that all have in common."""
    bad = {name: why for name in names if (why := _why_refused(base, tuned, name, sources))}
    if bad:
        told = "; ".join([*(f"'{name}' {why}" for name, why in list(bad.items())[:SHOWN]), *_more(bad)])
        options = " ".join(f"--keep '{pattern}'" for pattern in patterns(list(bad)))
        raise TaskvecError(
            f"refused {len(bad)} tensors: {told}",
            f"are they quantised? merge before quantising; {options} carries the base's",
        )


def _why_refused(base: Checkpoint, tuned: Sequence[Checkpoint], name: str, sources: Sequence[dict[str, str]]) -> str:
    stored = base.tensors[name]
    if stored.dtype not in INTEGERS:
        return f"has type {stored.dtype}, which is not computed with"
    if len(stored.shape) > 1:
        for one, names in zip(tuned, sources, strict=True):
            if not same(base, name, one, names[name]):
                return f"({stored.dtype}) differs in '{one.path}', and integers cannot be merged"
    return ""
