"""The registry of head modes: which heads read a merged encoder, and what reports call them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ModeName = Literal["kept", "reprobed", "surgery"]


@dataclass(frozen=True)
class HeadMode:
    """One way to read merged encoders.

    ``heads`` and ``correction`` stand in the columns of results with those names. Where heads are ``fitted`` at each
    scale, scales are tried in rounds, coarse ones first; else all at once.
    """

    name: ModeName
    heads: str
    correction: str = ""
    fitted: bool = True


HEAD_MODES: dict[str, HeadMode] = {
    mode.name: mode
    for mode in (
        HeadMode("kept", "kept", fitted=False),
        HeadMode("reprobed", "reprobed"),
        HeadMode("surgery", "kept", correction="surgery"),  # representation surgery, arXiv 2402.02705
    )
}
HEADS = {"kept": "kept heads", "reprobed": "re-probed heads"}
"""What reports call the heads that results name."""
