"""The command in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def taskvec(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "taskvec", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def loads_torch(*arguments: str) -> bool:
    code = (
        "import sys\nfrom taskvec.command.cli import app\n"
        f"try:\n    app({list(arguments)!r})\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip().endswith("True")
