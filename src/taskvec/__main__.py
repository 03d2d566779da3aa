"""The command's entry: Ctrl-C and SIGTERM are one message and an exit code from the start, imports included."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from types import FrameType

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""What interrupts a command, and the exit code that a shell expects of it."""
TIDYING = 3.0
"""Seconds after which an interrupted command ends in any case: a library may have caught its exit and gone on."""

interrupted: list[int] = []
"""The exit code, once a signal has come."""


def interrupt(number: int, frame: FrameType | None) -> None:
    """Leave with a message; what is under way is tidied up, and a second signal does not disturb that."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    code = interrupted[:] = [SIGNALS[signal.Signals(number)]]
    last = threading.Timer(TIDYING, os._exit, code)
    last.daemon = True
    last.start()
    resumes = "merge" not in sys.argv[1:2] and "diff" not in sys.argv[1:2]
    kept = "finished steps are kept, the same command goes on from there" if resumes else "nothing was written"
    print(f"\ninterrupted: {kept}", file=sys.stderr)
    raise SystemExit(*code)


def main() -> None:
    """Run the command ``taskvec``; an interruption decides its exit code, also where a library has caught it.

    What a terminal's encoding lacks is written as an escape, whatever that encoding is.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for one in SIGNALS:
        signal.signal(one, interrupt)
    try:
        from taskvec.command.cli import app

        app()
    finally:
        if interrupted:
            raise SystemExit(*interrupted)


if __name__ == "__main__":
    main()
