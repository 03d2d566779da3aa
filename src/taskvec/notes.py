"""Notes: what a step or a call has to tell its user about its input, heard by whoever runs it."""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Iterator

_heard: list[list[str]] = []
"""Who listens, the innermost last; a process does one step at a time, whatever threads the step has."""


def printable(text: str) -> str:
    """Return text that a terminal and a file can take: control characters and bytes that are no text as escapes."""
    odd = {c for c in text if unicodedata.category(c)[0] == "C" and c not in "\n\t"}
    return "".join(c.encode("unicode_escape").decode() if c in odd else c for c in text)


def note(text: str) -> None:
    """Tell the user something that stops nothing: whoever listens gets it, once; else it goes to standard error."""
    text = printable(text)
    if not _heard:
        print(text, file=sys.stderr)
    elif text not in _heard[-1]:
        _heard[-1].append(text)


@contextlib.contextmanager
def listen() -> Iterator[list[str]]:
    """Collect the notes of a block, in order."""
    notes: list[str] = []
    _heard.append(notes)
    try:
        yield notes
    finally:
        _heard.remove(notes)
