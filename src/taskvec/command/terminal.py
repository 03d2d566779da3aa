"""What the command says: text that the terminal can take, tables that fit it, and what a run ended with."""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from taskvec.core.notes import printable

if TYPE_CHECKING:
    import pandas as pd

    from taskvec.command.runs import Outcome

SIGNS = {"λ": "lambda", "±": "+-", "–": "-", "ξ": "xi", "°": " degrees", "…": "~", "₁": "1", "₂": "2", "≤": "<="}
"""What stands for our own signs on a terminal that has them not."""
WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "expand_tabs": False}
MANY = 4
"""Backbones and regimes above which the terminal shows one line for each instead of a table of tasks."""


def plain(text: str, stream: TextIO) -> str:
    """Return text that a stream can take: no control characters, no signs that its encoding lacks."""
    text, encoding = printable(text), stream.encoding or "utf-8"
    with contextlib.suppress(UnicodeEncodeError):
        text.encode(encoding)
        return text
    text = "".join(SIGNS.get(letter, letter) for letter in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def width() -> int:
    """Return the columns of the terminal, 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def say(text: str = "", file: TextIO | None = None, hang: int = 0, wrap: bool = False) -> None:
    """Print lines without what the stream cannot take; on a terminal, or asked to, they break between words only.

    What does not fit a line goes on ``hang`` columns from the left.
    """
    stream = file or sys.stdout
    lines = plain(text, stream).split("\n")
    if wrap or stream.isatty():
        lines = [_wrapped(line, hang) for line in lines]
    print("\n".join(lines), file=stream, flush=True)


def _wrapped(line: str, hang: int) -> str:
    """Break a line between words, none of which is a percent sign."""
    whole = line.replace(" %", "\0%")
    return textwrap.fill(whole, width(), subsequent_indent=" " * hang, **WHOLE_WORDS).replace("\0", " ")


def say_table(title: str, frame: pd.DataFrame) -> None:
    """Print a table that fits the terminal."""
    from taskvec.report.texts import text_table

    shown = frame.map(lambda cell: plain(str(cell), sys.stdout))
    shown.columns = [plain(str(name), sys.stdout) for name in frame.columns]
    say(title, wrap=True)
    say(text_table(shown, width()))
    say()


def say_outcome(outcome: Outcome, duration: str) -> None:
    """Say what a run did, its results, and where its page is."""
    from taskvec.core.files import read_json
    from taskvec.report.verdict import SMOKE

    folder, lock = outcome.folder, read_json(outcome.folder / "study.lock.json")
    if lock.get("smoke"):
        say(SMOKE, wrap=True)
    say(_done(outcome, duration))
    if not lock.get("smoke"):
        _show(folder, lock)
    say(f"page: {(folder / 'report.html').resolve()}")


def _done(outcome: Outcome, duration: str) -> str:
    """Say how many steps were run."""
    if not outcome.ran:
        again = "the run folder was written again" if outcome.written else "nothing to do"
        return f"all {outcome.steps} steps were done before: {again}"
    reused = outcome.steps - outcome.ran
    return f"{outcome.ran} steps run in {duration}" + (f", {reused} were done before" if reused else "")


def _show(folder: Path, lock: dict[str, Any]) -> None:
    """Print the verdict, and the tasks of every merge, or one line for each where there are many."""
    import pandas as pd

    from taskvec.report import tables
    from taskvec.report.verdict import usage

    results = pd.read_csv(folder / "results.csv", keep_default_na=False)
    say()
    say(tables.headline(results, pd.read_csv(folder / "costs.csv"), lock), wrap=True)
    if command := usage(lock, str(folder)):
        say(f"Use it: {command}")
    say()
    found = tables.views(results)
    if len(found) > MANY:
        say_table("test split, %, mean over tasks", tables.summary(results))
        return
    for view in found:
        for method in view.methods:
            what = "test split, each task's own metric, %" if view.mixed else "test accuracy, %"
            say_table(f"{tables.title(view, method)}: {what}", tables.task_table(view, method))
