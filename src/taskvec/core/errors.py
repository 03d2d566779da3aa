"""The one error of this package, which says how to mend it, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TaskvecError(Exception):
    """An error that the user can mend: ``problem`` repeats the input, ``fix`` says what to do about it.

    The command prints it as one message and leaves with exit code 2; no traceback is shown.
    """

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem, self.fix = problem, fix
        super().__init__(f"{problem}\n{fix}" if fix else problem)

    def __reduce__(self) -> tuple[type[TaskvecError], tuple[str, str]]:
        """Pickle by both parts, so that the error survives its way from a worker process."""
        return type(self), (self.problem, self.fix)


def near(given: str, known: Iterable[str]) -> list[str]:
    """Return at most three known names that are nearest to ``given``, whatever their case.

    Where some are a typing mistake away, names that are only similar are left out.
    """
    names = {name.casefold(): name for name in sorted(known)}
    for cutoff in (1.0, 0.85, 0.5):
        if close := difflib.get_close_matches(given.casefold(), names, n=3, cutoff=cutoff):
            return [names[name] for name in close]
    return []


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return a question for the known names nearest to ``given``, or a list of known names where none is near."""
    options = sorted(known)
    if close := near(given, options):
        return "did you mean " + " or ".join(f"'{name}'" for name in close) + "?"
    shown = ", ".join(options[:20]) + (", ..." if len(options) > 20 else "")
    return f"known: {shown}" if options else "none is known"


def unknown(kind: str, given: str, known: Iterable[str]) -> TaskvecError:
    """Return the error for a name that is not in a registry, with the nearest names that are."""
    return TaskvecError(f"unknown {kind} '{given}'", did_you_mean(given, known))


def and_more(names: Sequence[str]) -> str:
    """Return how many names follow the first, such as `` (and 3 more)``; nothing where it is the only one."""
    return f" (and {len(names) - 1} more)" if names[1:] else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
