"""Which tensors of a checkpoint and of those fine-tuned from it belong together; what does not is named. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from taskvec.errors import TaskvecError, did_you_mean
from taskvec.files import FLOATS, INTEGERS, Checkpoint, Shape, same
from taskvec.merging.parts import kind_of

SHOWN = 4
"""Tensors that an error names of each kind."""
SAMPLE = 4096
"""Elements by which tensors are compared before they are read as a whole."""


@dataclass(frozen=True)
class Matched:
    """What happens to every tensor of a base: it is merged, or carried over, as asked for or as it holds integers.

    ``sources`` says for each fine-tuned checkpoint under which name it holds a merged tensor (a twin's where tied
    weights are stored once), ``aside`` which of its tensors are not used: those of the patterns, and twins. ``tied``
    are tensors that are not merged, but stored as the result of another one, which is equal to them in every file.
    """

    merged: tuple[str, ...]
    kept: tuple[str, ...]
    integers: tuple[str, ...]
    sources: tuple[dict[str, str], ...]
    aside: tuple[tuple[str, ...], ...]
    tied: Mapping[str, str]

    @property
    def carried(self) -> tuple[str, ...]:
        """All tensors that are the base's own in the result."""
        return self.kept + self.integers


def match(base: Checkpoint, tuned: Sequence[Checkpoint], keep: Sequence[str] = (), split: bool = False) -> Matched:
    """Decide for every tensor, or raise and name file and tensors that do not fit, with what would mend it.

    Names that match a pattern of ``keep`` (``head.*``) are the base's own in the result, whatever others hold there.
    Tied weights may be stored once or twice. Integers that differ are refused unless they are mere counters (fewer
    than two dimensions), and so are types that cannot be computed with. Where nothing is written patterns may ``split``
    tied weights.
    """
    _check_patterns(keep, [base, *tuned])
    kept = [name for name in base.tensors if _any(name, keep)]
    wanted = [name for name in base.tensors if not _any(name, keep)]
    sources, aside = zip(*(_matched(base, one, wanted, keep) for one in tuned), strict=True) if tuned else ((), ())
    floats = [name for name in wanted if base.tensors[name].dtype in FLOATS]
    integers = [name for name in wanted if base.tensors[name].dtype not in FLOATS]
    _refuse(base, tuned, integers, sources)
    if not floats:
        raise TaskvecError(
            f"'{base.path}' has no floating-point tensor to merge", "is it quantised, or does --keep match everything?"
        )
    if not split:
        _refuse_split(base, tuned, kept, floats)
    tied = _ties(base, tuned, floats, sources)
    merged = tuple(name for name in floats if name not in tied)
    return Matched(merged, tuple(kept), tuple(integers), sources, aside, tied)


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(keep: Sequence[str], checkpoints: Sequence[Checkpoint]) -> None:
    names = dict.fromkeys(name for one in checkpoints for name in one.tensors)
    for pattern in keep:
        if not any(_any(name, [pattern]) for name in names):
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
    return len(np.unique(_start(one, name))) > 1 and same(one, name, one, twin)


def _looks(one: Checkpoint, name: str) -> tuple[str, Shape, bytes]:
    """Return type, shape and a digest of the first elements: what differs in them cannot be tied."""
    stored, start = one.tensors[name], np.ascontiguousarray(_start(one, name))
    return stored.dtype, stored.shape, hashlib.blake2b(start.data, digest_size=16).digest()


def _refuse_split(base: Checkpoint, tuned: Sequence[Checkpoint], kept: Sequence[str], merged: Sequence[str]) -> None:
    """Raise where a pattern keeps one of two weights that are tied in all files, and the other would be merged."""
    wide = [name for name in kept if base.tensors[name].dtype in FLOATS and len(base.tensors[name].shape) > 1]
    others: dict[Any, list[str]] = {}
    for name in merged if wide else ():
        if len(base.tensors[name].shape) > 1:
            others.setdefault(_looks(base, name), []).append(name)
    for name in wide:
        for other in others.get(_looks(base, name), ()):
            both = [one for one in (base, *tuned) if {name, other} <= set(one.tensors)]
            if all(_tied(one, name, other) for one in both):
                raise TaskvecError(
                    f"--keep keeps '{name}', which is tied to '{other}': that would be merged, and they would differ",
                    "keep both, or neither",
                )


def _start(one: Checkpoint, name: str) -> Float[ndarray, " count"]:
    return one.read(name, 0, min(one.tensors[name].size, SAMPLE))


def _ties(
    base: Checkpoint, tuned: Sequence[Checkpoint], names: Sequence[str], sources: Sequence[Mapping[str, str]]
) -> dict[str, str]:
    """Return which tensor stands for each that is tied to it in all files: the table of a pair, else the base's first.

    A model in memory has its tables first; files have names in any order.
    """
    places = [(base, {name: name for name in names}), *zip(tuned, sources, strict=True)]
    alike: dict[Any, list[str]] = {}
    for name in sorted(names, key=lambda name: kind_of(name, base.tensors[name].shape) == "matrix"):
        stored = base.tensors[name]
        if len(stored.shape) > 1 and stored.size:
            alike.setdefault(_looks(base, name), []).append(name)
    tied: dict[str, str] = {}
    for group in alike.values():
        firsts: list[str] = []
        for name in group:
            first = next((one for one in firsts if _tied_everywhere(places, one, name)), None)
            if first is None:
                firsts.append(name)
            else:
                tied[name] = first
    return tied


def _tied_everywhere(places: Sequence[tuple[Checkpoint, Mapping[str, str]]], name: str, twin: str) -> bool:
    return all(at[name] == at[twin] or _tied(one, at[name], at[twin]) for one, at in places)


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
    found = [
        f"{escape(module)}.*" if module and len(held) > 1 else escape(name)
        for module, held in modules.items()
        for name in held
    ]
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
