"""Notes: messages of a step or call for the user that stop nothing, collected by whoever runs it."""

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
"""The functions that get notes, the innermost last; a process does one step at a time."""
MOST_LABELS = 3
"""Labels that are named in the line of a note."""


def printable(text: str) -> str:
    """Return text for terminals and files: control characters, and bytes that are no text, become escapes."""
    odd = {c for c in text if unicodedata.category(c)[0] == "C" and c not in "\n\t"}
    return "".join(c.encode("unicode_escape").decode() if c in odd else c for c in text)


def print_note(text: str) -> None:
    """Write a note to standard error."""
    print(text, file=sys.stderr)


def note(text: str) -> None:
    """Give a note to the innermost listener, or write it to standard error where there is none."""
    hear = _listeners[-1] if _listeners else print_note
    hear(printable(text))


@contextlib.contextmanager
def listen(hear: Callable[[str], None] | None = None) -> Iterator[list[str]]:
    """Yield the list of notes of a block, each once and in order; ``hear`` gets each at once."""
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
    """Turn what libraries warn of in a block, by ``warnings`` or ``logging``, into notes.

    Warnings during an import are about the installation, not about the step that happens to import first: they stay on
    standard error.
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
    """Return the message of a log record, or None where it cannot be formatted."""
    try:
        return record.getMessage()
    except Exception:
        return None


def _callers() -> list[str]:
    """Return the source files of the functions on this thread's stack, the innermost first."""
    frame, files = sys._getframe(1), []
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back  # type: ignore[assignment]
    return files


def note_lines(notes: Iterable[dict[str, str]]) -> list[str]:
    """Return one line for every text among the notes of several steps: the first labels, how many more, the text."""
    labels: dict[str, list[str]] = {}
    for entry in notes:
        labels.setdefault(entry["text"], []).append(entry["label"])
    return [f"{some(names)}: {text}" for text, names in labels.items()]


def some(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = len(names) - MOST_LABELS
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:MOST_LABELS])} and {more} more"
