"""Notes: what a step or a call has to tell its user about its input, heard by whoever runs it."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_listeners: list[Callable[[str], None]] = []
"""Who listens, the innermost last; a process does one step at a time, whatever threads the step has."""
MOST_LABELS = 3
"""How many of those that tell the same are named in a line."""


def printable(text: str) -> str:
    """Return text that a terminal and a file can take: control characters and bytes that are no text as escapes."""
    odd = {c for c in text if unicodedata.category(c)[0] == "C" and c not in "\n\t"}
    return "".join(c.encode("unicode_escape").decode() if c in odd else c for c in text)


def print_note(text: str) -> None:
    """Write a note to standard error."""
    print(text, file=sys.stderr)


def note(text: str) -> None:
    """Tell the user something that stops nothing: whoever listens gets it, once; else it goes to standard error."""
    hear = _listeners[-1] if _listeners else print_note
    hear(printable(text))


@contextlib.contextmanager
def listen(hear: Callable[[str], None] | None = None) -> Iterator[list[str]]:
    """Collect the notes of a block in order, each once; ``hear`` gets each as soon as it is told."""
    notes: list[str] = []

    def listener(text: str) -> None:
        if text not in notes:
            notes.append(text)
            if hear is not None:
                hear(text)

    _listeners.append(listener)
    try:
        yield notes
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def library_warnings() -> Iterator[None]:
    """Make notes of what libraries warn of in a block, by ``warnings`` or by ``logging``.

    What they say while they are imported is about the installation, and comes once a process, whoever is first to
    import them: it stays on standard error.
    """
    shown, handled = warnings.showwarning, logging.Logger.callHandlers
    thread, depth = threading.get_ident(), len(_callers())

    def importing() -> bool:
        inner = _callers()[: -depth if threading.get_ident() == thread else None]
        return any(name.startswith("<frozen importlib") for name in inner)

    def warned(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if importing():
            shown(message, category, *place, **more)
        else:
            note(f"{category.__name__}: {message}")

    def logged(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING or importing() or (text := _text(record)) is None:
            handled(logger, record)
        else:
            note(f"{record.name}: {text}")

    if once := getattr(logging.Logger, "warning_once", None):  # of transformers
        once.cache_clear()
    with warnings.catch_warnings():  # it also forgets which warnings were shown, so that every step hears its own
        warnings.showwarning = warned
        logging.Logger.callHandlers = logged  # type: ignore[method-assign,assignment]  # some libraries' loggers reach no root
        try:
            yield
        finally:
            logging.Logger.callHandlers = handled  # type: ignore[method-assign]


def _text(record: logging.LogRecord) -> str | None:
    """Return what a record says; None if that cannot be written, which stops nobody who logs."""
    try:
        return record.getMessage()
    except Exception:
        return None


def _callers() -> list[str]:
    """Return the files of all functions that are running in this thread, the innermost first."""
    frame, files = sys._getframe(1), []
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back  # type: ignore[assignment]
    return files


def note_lines(told: Iterable[dict[str, str]]) -> list[str]:
    """Write what several steps told, each text once: the first labels, how many more there are, and the text."""
    labels: dict[str, list[str]] = {}
    for one in told:
        labels.setdefault(one["text"], []).append(one["label"])
    return [f"{some(names)}: {text}" for text, names in labels.items()]


def some(names: list[str]) -> str:
    """Name the first few, and how many more there are."""
    more = len(names) - MOST_LABELS
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:MOST_LABELS])} and {more} more"
