"""The command's entry: Ctrl-C is one message and exit code 130 from the first moment on, imports included."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

INTERRUPTED = 130
TIDYING = 3.0
"""Seconds after which an interrupted command ends in any case: a library may have caught its exit and gone on."""


def interrupt(number: int, frame: FrameType | None) -> None:
    """Leave with a message; what is under way is tidied up, and a second Ctrl-C does not disturb that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    last = threading.Timer(TIDYING, os._exit, (INTERRUPTED,))
    last.daemon = True
    last.start()
    resumes = "merge" not in sys.argv[1:2] and "diff" not in sys.argv[1:2]
    kept = "finished steps are kept, the same command goes on from there" if resumes else "nothing was written"
    print(f"\ninterrupted: {kept}", file=sys.stderr)
    raise SystemExit(INTERRUPTED)


def main() -> None:
    """Run the command ``taskvec``; an interruption decides its exit code, also where a library has caught it."""
    signal.signal(signal.SIGINT, interrupt)
    try:
        from taskvec.cli import app

        app()
    finally:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            raise SystemExit(INTERRUPTED)


if __name__ == "__main__":
    main()
