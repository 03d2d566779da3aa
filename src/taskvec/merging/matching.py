"""Which tensors of a base and of the checkpoints fine-tuned from it belong together; misfits are named. No torch."""

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
from taskvec.weights.reader import FLOATS, INTEGERS, Checkpoint, same_tensor

SHOWN = 4
"""Tensors that an error names of each kind."""


@dataclass(frozen=True)
class Matched:
    """What happens to every tensor of a base: it is merged, excluded by a pattern, or carried over as an integer.

    ``sources`` says for each fine-tuned checkpoint under which name it holds a merged tensor (a twin's where tied
    weights are stored once), ``unused`` which of its tensors are not used: excluded ones, and twins. ``tied`` are
    tensors that are not merged, but stored as the result of another one, which is equal to them in every file.
    """

    merged: tuple[str, ...]
    excluded: tuple[str, ...]
    integers: tuple[str, ...]
    sources: tuple[dict[str, str], ...]
    unused: tuple[tuple[str, ...], ...]
    tied: Mapping[str, str]

    @property
    def carried(self) -> tuple[str, ...]:
        """All tensors that are the base's own in the result."""
        return self.excluded + self.integers


def match(base: Checkpoint, tuned: Sequence[Checkpoint], exclude: Sequence[str] = (), split: bool = False) -> Matched:
    """Return what happens to every tensor, or raise and name file and tensors that do not fit, with what would mend it.

    Names that match a pattern of ``exclude`` (``head.*``) are the base's own in the result, whatever others hold there.
    Tied weights may be stored once or twice. Integers that differ are refused unless they are mere counters (fewer
    than two dimensions), and so are types that cannot be computed with. Where nothing is written patterns may ``split``
    tied weights.
    """
    paired = [_paired(base, checkpoint) for checkpoint in tuned]
    _check_patterns(
        exclude, [*base.tensors, *(name for _, called in paired for pair in called.items() for name in pair)]
    )
    excluded = [name for name in base.tensors if _any(name, exclude)]
    wanted = [name for name in base.tensors if not _any(name, exclude)]
    pairs = zip(tuned, paired, strict=True)
    matches = [_matched(base, checkpoint, wanted, exclude, *names) for checkpoint, names in pairs]
    sources, unused = zip(*matches, strict=True) if tuned else ((), ())
    floats = [name for name in wanted if base.tensors[name].dtype in FLOATS]
    integers = [name for name in wanted if base.tensors[name].dtype not in FLOATS]
    _refuse(base, tuned, integers, sources)
    if not floats:
        raise TaskvecError(
            f"'{base.path}' has no floating-point tensor to merge",
            "is it quantised, or does --exclude match everything?",
        )
    if not split:
        _refuse_split_ties(base, tuned, excluded, floats)
    tied = _ties(base, tuned, floats, sources)
    merged = tuple(name for name in floats if name not in tied)
    return Matched(merged, tuple(excluded), tuple(integers), sources, unused, tied)


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(exclude: Sequence[str], names: Sequence[str]) -> None:
    for pattern in exclude:
        if not any(_any(name, [pattern]) for name in names):
            raise TaskvecError(f"no tensor is called '{pattern}'", did_you_mean(pattern, names))


def _matched(
    base: Checkpoint,
    tuned: Checkpoint,
    wanted: Sequence[str],
    exclude: Sequence[str],
    there: Mapping[str, str],
    called: Mapping[str, str],
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return where ``tuned`` holds what is wanted, and what it holds beside; raise where they do not fit."""
    sources = {name: there[name] for name in wanted if name in there}
    absent = [name for name in wanted if name not in sources]
    twins = {name: there[twin] for name in absent if (twin := _twin(base, name, there))}
    used, known = set(sources.values()), set(there.values())
    unused = tuple(name for name in tuned.tensors if name not in used)
    free = [name for name in unused if called[name] != AVERAGED and not _counts(name, tuned)]
    spare = [name for name in free if not _any(name, exclude) and not _any(called[name], exclude)]
    unexpected = [name for name in spare if not _twin(tuned, name, known)]
    mismatched = {name: why for name, source in sources.items() if (why := _mismatch(base, name, tuned, source))}
    missing = [name for name in absent if name not in twins and not _counts(name, base)]
    if missing or unexpected or mismatched:
        raise _unfit(base, tuned, missing, {name: called[name] for name in unexpected}, mismatched)
    return sources | twins, unused


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
    base_names = {short: name for name, short in unwrapped(base.tensors).items()}
    tuned_names = {short: name for name, short in unwrapped(tuned.tensors).items()}
    before, after = _shift(base, tuned, base_names, tuned_names)
    pairs = counterparts(base_names, tuned_names, (before, after))
    moved = {short: before + short.removeprefix(after) if short.startswith(after) else short for short in tuned_names}
    called = {tuned_names[short]: base_names.get(name, name) for short, name in moved.items()}
    called |= {tuned_names[short]: base_names[name] for short, name in pairs.items()}
    there = {base_names[name]: tuned_names[short] for short, name in pairs.items()}
    if renamed := next(((name, place) for name, place in there.items() if name != place), None):
        note(f"'{tuned.path}' has other names: its '{renamed[1]}' is '{renamed[0]}' of '{base.path}', and so on")
    return there, called


def _shift(
    base: Checkpoint, tuned: Checkpoint, base_names: Collection[str], tuned_names: Collection[str]
) -> tuple[str, str]:
    """Return the prefixes of both files behind which most names are equal; several that do as well are refused."""
    candidates = shifts(base_names, tuned_names)
    if len(candidates) > 1:
        names = (f"'{after}'" if before == "" else f"'{before}' as '{after}'" for before, after in candidates)
        places = " and ".join(names)
        raise TaskvecError(
            f"'{tuned.path}' holds the tensors of '{base.path}' several times, behind {places}",
            f"write the one that is meant as {tuned.path}#NAME",
        )
    return candidates[0]


def _twin(checkpoint: Checkpoint, name: str, held: Collection[str]) -> str | None:
    """Return another of the names ``held`` under which a checkpoint has the same tensor: weights that are tied."""
    twins = checkpoint.by_tie_key.get(checkpoint.tie_key(name), ())
    return next((twin for twin in twins if twin != name and twin in held and _tied(checkpoint, name, twin)), None)


def _tied(checkpoint: Checkpoint, name: str, twin: str) -> bool:
    return checkpoint.tie_digest(name) == checkpoint.tie_digest(twin)


def _refuse_split_ties(
    base: Checkpoint, tuned: Sequence[Checkpoint], excluded: Sequence[str], merged: Sequence[str]
) -> None:
    """Raise where a pattern excludes one of two weights that are tied in all files, and the other would be merged."""
    rest = set(merged)
    for name in excluded:
        for other in base.by_tie_key.get(base.tie_key(name), ()):
            holders = [file for file in (base, *tuned) if {name, other} <= file.tensors.keys()]
            if other in rest and all(_tied(file, name, other) for file in holders):
                problem = f"--exclude names '{name}', which is tied to '{other}': that would be merged, and they"
                raise TaskvecError(f"{problem} would differ", "exclude both, or neither")


def _ties(
    base: Checkpoint, tuned: Sequence[Checkpoint], names: Sequence[str], sources: Sequence[Mapping[str, str]]
) -> dict[str, str]:
    """Return which tensor stands for each that is tied to it in all files: the table of a pair, else the base's first.

    A model in memory has its tables first; files have names in any order.
    """
    alike: dict[Any, list[str]] = {}
    for name in sorted(names, key=lambda name: kind_of(name, base.tensors[name].shape) == "matrix"):
        alike.setdefault(base.tie_key(name), []).append(name)
    tied: dict[str, str] = {}
    for group in (group for group in alike.values() if len(group) > 1):
        firsts: dict[Any, str] = {}
        for name in group:
            files = zip((base, *tuned), (name, *(at[name] for at in sources)), strict=True)
            first = firsts.setdefault(tuple(file.tie_digest(place) for file, place in files), name)
            tied |= {name: first} if first != name else {}
    return tied


def _mismatch(base: Checkpoint, name: str, tuned: Checkpoint, source: str) -> str:
    """Say how two tensors differ that should be alike; nothing if they do not."""
    a, b = base.tensors[name], tuned.tensors[source]
    if a.shape != b.shape:
        return f"'{source}' has shape {list(b.shape)} instead of {list(a.shape)}"
    if (a.dtype in FLOATS) != (b.dtype in FLOATS):
        return f"'{source}' has type {b.dtype} instead of {a.dtype}"
    return ""


def _unfit(
    base: Checkpoint, tuned: Checkpoint, missing: list[str], unexpected: Mapping[str, str], mismatched: dict[str, str]
) -> TaskvecError:
    """Return the error for tensors that do not fit: --exclude is advised only where all are of heads and the like.

    Of tensors beyond the base's, ``extra`` says what the base would call them.
    """
    parts = [
        _some("is missing", [f"'{name}'" for name in missing]),
        _some("has, beyond the base's,", [f"'{name}'" for name in unexpected]),
        "; ".join([*list(mismatched.values())[:SHOWN], *_more(mismatched)]),
    ]
    bad = [*missing, *unexpected.values(), *mismatched]
    problem = "; ".join(part for part in parts if part)
    problem = f"refused {len(bad)} tensors: '{tuned.path}' does not fit '{base.path}': {problem}"
    for checkpoint, names in ((tuned, unexpected), (base, missing)):
        if about := foreign(names):
            return TaskvecError(f"{problem}; '{checkpoint.path}' holds {about[0]}", about[1])
    if not all(is_head(name) or name.endswith(BUFFERS) for name in bad):
        return TaskvecError(problem, "give checkpoints that were fine-tuned from this base, saved with the same names")
    options = " ".join(f"--exclude '{pattern}'" for pattern in patterns(bad, [*base.tensors, *bad]))
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
    complete = {
        m for m, held in modules.items() if m and len(held) > 1 and not any(n.startswith(m + ".") for n in others)
    }
    shortest = [
        f"{escape(module)}.*" if module in complete else escape(name)
        for module, held in modules.items()
        for name in held
    ]
    return list(dict.fromkeys(shortest))


def _refuse(
    base: Checkpoint, tuned: Sequence[Checkpoint], names: Iterable[str], sources: Sequence[dict[str, str]]
) -> None:
    """Raise for tensors that are neither numbers to compute with nor whole numbers that all have in common."""
    bad = {name: why for name in names if (why := _why_refused(base, tuned, name, sources))}
    if bad:
        reasons = "; ".join([*(f"'{name}' {why}" for name, why in list(bad.items())[:SHOWN]), *_more(bad)])
        made = all(name.endswith(BUFFERS) for name in bad)
        options = " ".join(f"--exclude '{pattern}'" for pattern in patterns(list(bad), base.tensors))
        raise TaskvecError(
            f"refused {len(bad)} tensors: {reasons}",
            f"{options} carries the base's" if made else "are they quantised? merge before quantising",
        )


def _why_refused(base: Checkpoint, tuned: Sequence[Checkpoint], name: str, sources: Sequence[dict[str, str]]) -> str:
    stored = base.tensors[name]
    if stored.dtype not in INTEGERS:
        return f"has type {stored.dtype}, which is not computed with"
    if len(stored.shape) > 1:
        for checkpoint, names in zip(tuned, sources, strict=True):
            if not same_tensor(base, name, checkpoint, names[name]):
                return f"({stored.dtype}) differs in '{checkpoint.path}', and integers cannot be merged"
    return ""
