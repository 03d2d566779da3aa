"""Numbers for people: bytes, durations, FLOPs."""

from __future__ import annotations


def gigabytes(count: float) -> str:
    """Write a number of bytes for people: 48.5 GB, 12 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(int(count > 0), round(count / 1e6))} MB"


def size_text(count: float) -> str:
    """Write bytes in steps of a thousand."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB" if count < 10 else f"{count:.0f} TB"


def time_text(duration: float) -> str:
    """Write a duration with about two digits."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if duration >= 2 * length:
            count = duration / length
            return f"{count:.1f} {unit}" if count < 10 else f"{count:,.0f} {unit}"
    return f"{duration:.0f} seconds"


def flops_text(flops: float) -> str:
    """Write FLOPs with a prefix."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if flops < 999.5:
            return f"{flops:.3g} {unit}FLOP"
        flops /= 1000
    return f"{flops:.3g} EFLOP"


def clock(seconds: float) -> str:
    """Write a duration as people say it: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
