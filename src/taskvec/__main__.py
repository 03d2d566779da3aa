"""The command's entry: Ctrl-C is one message and exit code 130 from the first moment on, imports included."""

from __future__ import annotations

import signal
import sys
from types import FrameType


def interrupt(number: int, frame: FrameType | None) -> None:
    """Leave with a message; what is under way is tidied up, and a second Ctrl-C does not disturb that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resumes = "merge" not in sys.argv[1:2] and "diff" not in sys.argv[1:2]
    kept = "finished steps are kept, the same command goes on from there" if resumes else "nothing was written"
    print(f"\ninterrupted: {kept}", file=sys.stderr)
    raise SystemExit(130)


def main() -> None:
    """Run the command ``taskvec``."""
    signal.signal(signal.SIGINT, interrupt)
    from taskvec.cli import app

    app()


if __name__ == "__main__":
    main()
