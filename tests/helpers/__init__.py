"""Helpers of the tests, each module named after what it holds."""

from __future__ import annotations

import os
from pathlib import Path

PATHS = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
"""Where worker processes find the steps of tests and helpers."""
