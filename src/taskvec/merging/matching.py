"""Which tensors of a checkpoint and of those fine-tuned from it belong together; what does not is named. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

from taskvec.core.errors import TaskvecError, did_you_mean
from taskvec.core.notes import note
from taskvec.merging.entries import kind_of
from taskvec.weights.keys import AVERAGED, BUFFERS, COUNTER, counterparts, foreign, is_head, shifts, unwrapped
from taskvec.weights.reader import FLOATS, INTEGERS, Checkpoint, same

SHOWN = 4
"""Tensors that an error names of each kind."""


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
    paired = [_paired(base, one) for one in tuned]
    _check_patterns(keep, [*base.tensors, *(name for _, called in paired for pair in called.items() for name in pair)])
    kept = [name for name in base.tensors if _any(name, keep)]
    wanted = [name for name in base.tensors if not _any(name, keep)]
    found = [_matched(base, one, wanted, keep, *names) for one, names in zip(tuned, paired, strict=True)]
    sources, aside = zip(*found, strict=True) if tuned else ((), ())
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


def _check_patterns(keep: Sequence[str], names: Sequence[str]) -> None:
    for pattern in keep:
        if not any(_any(name, [pattern]) for name in names):
            raise TaskvecError(f"no tensor is called '{pattern}'", did_you_mean(pattern, names))


def _matched(
    base: Checkpoint,
    tuned: Checkpoint,
    wanted: Sequence[str],
    keep: Sequence[str],
    there: Mapping[str, str],
    called: Mapping[str, str],
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return where ``tuned`` holds what is wanted, and what it holds beside; raise where they do not fit."""
    sources = {name: there[name] for name in wanted if name in there}
    missing = [name for name in wanted if name not in sources]
    twins = {name: there[twin] for name in missing if (twin := _twin(base, name, there))}
    used, known = set(sources.values()), set(there.values())
    aside = tuple(name for name in tuned.tensors if name not in used)
    free = [name for name in aside if called[name] != AVERAGED and not _counts(name, tuned)]
    spare = [name for name in free if not _any(name, keep) and not _any(called[name], keep)]
    extra = [name for name in spare if not _twin(tuned, name, known)]
    unlike = {name: why for name, source in sources.items() if (why := _unlike(base, name, tuned, source))}
    lost = [name for name in missing if name not in twins and not _counts(name, base)]
    if lost or extra or unlike:
        raise _unfit(base, tuned, lost, {name: called[name] for name in extra}, unlike)
    return sources | twins, aside


def _counts(name: str, held: Checkpoint) -> bool:
    """Say whether a tensor is a counter of batch norm, which older files lack."""
    stored = held.tensors[name]
    return name.endswith(COUNTER) and stored.dtype in INTEGERS and len(stored.shape) < 2


def _paired(base: Checkpoint, tuned: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """Return the names in ``tuned`` by those of the base, and what the base calls, or would call, each of them.

    What wrappers add anywhere in a name does not count, nor prefixes behind which most names are equal.
    """
    if base.tensors.keys() == tuned.tensors.keys():
        same_names = {name: name for name in base.tensors}
        return same_names, same_names
    own = {short: name for name, short in unwrapped(base.tensors).items()}
    theirs = {short: name for name, short in unwrapped(tuned.tensors).items()}
    before, after = _shift(base, tuned, own, theirs)
    found = counterparts(own, theirs, (before, after))
    moved = {short: before + short.removeprefix(after) if short.startswith(after) else short for short in theirs}
    called = {theirs[short]: own.get(name, name) for short, name in moved.items()}
    called |= {theirs[short]: own[name] for short, name in found.items()}
    there = {own[name]: theirs[short] for short, name in found.items()}
    if renamed := next(((name, place) for name, place in there.items() if name != place), None):
        note(f"'{tuned.path}' has other names: its '{renamed[1]}' is '{renamed[0]}' of '{base.path}', and so on")
    return there, called


def _shift(base: Checkpoint, tuned: Checkpoint, own: Collection[str], theirs: Collection[str]) -> tuple[str, str]:
    """Return the prefixes of both files behind which most names are equal; several that do as well are refused."""
    found = shifts(own, theirs)
    if len(found) > 1:
        places = " and ".join(f"'{after}'" if before == "" else f"'{before}' as '{after}'" for before, after in found)
        raise TaskvecError(
            f"'{tuned.path}' holds the tensors of '{base.path}' several times, behind {places}",
            f"write the one that is meant as {tuned.path}#NAME",
        )
    return found[0]


def _twin(one: Checkpoint, name: str, held: Collection[str]) -> str | None:
    """Return another of the names ``held`` under which ``one`` has the same tensor: weights that are tied."""
    twins = one.alike.get(one.looks(name), ())
    return next((twin for twin in twins if twin != name and twin in held and _tied(one, name, twin)), None)


def _tied(one: Checkpoint, name: str, twin: str) -> bool:
    return one.content(name) == one.content(twin)


def _refuse_split(base: Checkpoint, tuned: Sequence[Checkpoint], kept: Sequence[str], merged: Sequence[str]) -> None:
    """Raise where a pattern keeps one of two weights that are tied in all files, and the other would be merged."""
    rest = set(merged)
    for name in kept:
        for other in base.alike.get(base.looks(name), ()):
            both = [one for one in (base, *tuned) if {name, other} <= one.tensors.keys()]
            if other in rest and all(_tied(one, name, other) for one in both):
                raise TaskvecError(
                    f"--keep keeps '{name}', which is tied to '{other}': that would be merged, and they would differ",
                    "keep both, or neither",
                )


def _ties(
    base: Checkpoint, tuned: Sequence[Checkpoint], names: Sequence[str], sources: Sequence[Mapping[str, str]]
) -> dict[str, str]:
    """Return which tensor stands for each that is tied to it in all files: the table of a pair, else the base's first.

    A model in memory has its tables first; files have names in any order.
    """
    alike: dict[Any, list[str]] = {}
    for name in sorted(names, key=lambda name: kind_of(name, base.tensors[name].shape) == "matrix"):
        alike.setdefault(base.looks(name), []).append(name)
    tied: dict[str, str] = {}
    for group in (group for group in alike.values() if len(group) > 1):
        firsts: dict[Any, str] = {}
        for name in group:
            files = zip((base, *tuned), (name, *(at[name] for at in sources)), strict=True)
            first = firsts.setdefault(tuple(one.content(place) for one, place in files), name)
            tied |= {name: first} if first != name else {}
    return tied


def _unlike(base: Checkpoint, name: str, tuned: Checkpoint, source: str) -> str:
    """Say how two tensors differ that should be alike; nothing if they do not."""
    a, b = base.tensors[name], tuned.tensors[source]
    if a.shape != b.shape:
        return f"'{source}' has shape {list(b.shape)} instead of {list(a.shape)}"
    if (a.dtype in FLOATS) != (b.dtype in FLOATS):
        return f"'{source}' has type {b.dtype} instead of {a.dtype}"
    return ""


def _unfit(
    base: Checkpoint, tuned: Checkpoint, lost: list[str], extra: Mapping[str, str], unlike: dict[str, str]
) -> TaskvecError:
    """Return the error for tensors that do not fit: --keep is advised only where all are of heads and the like.

    Of tensors beyond the base's, ``extra`` says what the base would call them.
    """
    parts = [
        _some("is missing", [f"'{name}'" for name in lost]),
        _some("has, beyond the base's,", [f"'{name}'" for name in extra]),
        "; ".join([*list(unlike.values())[:SHOWN], *_more(unlike)]),
    ]
    bad = [*lost, *extra.values(), *unlike]
    problem = "; ".join(part for part in parts if part)
    problem = f"refused {len(bad)} tensors: '{tuned.path}' does not fit '{base.path}': {problem}"
    for one, names in ((tuned, extra), (base, lost)):
        if told := foreign(names):
            return TaskvecError(f"{problem}; '{one.path}' holds {told[0]}", told[1])
    if not all(is_head(name) or name.endswith(BUFFERS) for name in bad):
        return TaskvecError(problem, "give checkpoints that were fine-tuned from this base, saved with the same names")
    options = " ".join(f"--keep '{pattern}'" for pattern in patterns(bad, [*base.tensors, *bad]))
    return TaskvecError(problem, f"{options} carries the base's tensors of that name, and leaves out the others'")


def _some(verb: str, names: list[str]) -> str:
    return " ".join([verb, ", ".join(names[:SHOWN]), *_more(names)]) if names else ""


def _more(names: Sequence[str] | dict[str, str]) -> list[str]:
    return [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []


def patterns(names: Sequence[str], every: Iterable[str] = ()) -> list[str]:
    """Return patterns that match names: the module's for several tensors of one module, else the names.

    A module's pattern matches none of ``every`` but the names.
    """
    modules: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    others = set(every) - set(names)
    whole = {m for m, held in modules.items() if m and len(held) > 1 and not any(n.startswith(m + ".") for n in others)}
    found = [
        f"{escape(module)}.*" if module in whole else escape(name) for module, held in modules.items() for name in held
    ]
    return list(dict.fromkeys(found))


def _refuse(
    base: Checkpoint, tuned: Sequence[Checkpoint], names: Iterable[str], sources: Sequence[dict[str, str]]
) -> None:
    """Raise for tensors that are neither numbers to compute with nor whole numbers that all have in common."""
    bad = {name: why for name in names if (why := _why_refused(base, tuned, name, sources))}
    if bad:
        told = "; ".join([*(f"'{name}' {why}" for name, why in list(bad.items())[:SHOWN]), *_more(bad)])
        made = all(name.endswith(BUFFERS) for name in bad)
        options = " ".join(f"--keep '{pattern}'" for pattern in patterns(list(bad), base.tensors))
        raise TaskvecError(
            f"refused {len(bad)} tensors: {told}",
            f"{options} carries the base's" if made else "are they quantised? merge before quantising",
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
