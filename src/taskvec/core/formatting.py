"""Numbers as text for people: bytes, durations, FLOPs."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """Return a number of bytes with about two digits, in steps of a thousand: 48 GB, 3.5 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB" if count < 10 else f"{count:,.0f} TB"


def duration_text(seconds: float) -> str:
    """Return a duration as people say it: 45 s, 3 min 20 s, 2 h 05 min, 1,000 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min" if whole < 360_000 else f"{whole / 3600:,.0f} h"


def flops_text(flops: float) -> str:
    """Return a number of FLOPs with three digits and a prefix: 4.2 TFLOP."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if flops < 999.5:
            return f"{flops:.3g} {unit}FLOP"
        flops /= 1000
    return f"{flops:.3g} EFLOP"
