"""What may be a name of a backbone, a task or a study: one that tables and every system's files can have."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator

LONGEST_NAME = 100
"""Bytes of a name: it becomes a part of file names."""
NO_NAME = '+/\\:*?"<>|'
UNPRINTED, JOINERS = ("Cc", "Cf", "Cs", "Zl", "Zp"), "\u200c\u200d"
"""Categories of characters that show nothing, and those of them that scripts need."""
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def name_problem(name: str) -> str:
    """Say why a name cannot stand in tables, which join names by +, and be a file's on every system; else nothing."""
    unseen = {sign for sign in name if unicodedata.category(sign) in UNPRINTED and sign not in JOINERS}
    if strange := [sign for sign in name if sign in NO_NAME or sign in unseen]:
        return f"has {strange[0]!a}"
    if len(name.encode()) > LONGEST_NAME:
        return f"has {len(name.encode())} bytes, more than {LONGEST_NAME}"
    if name != name.strip(". "):
        return "begins or ends with a dot or a space"
    return "is kept for devices by Windows" if DEVICES.fullmatch(name) else ""


def check_name(name: str) -> str:
    """Return a name, or raise if it cannot be one; empty is none."""
    if problem := name_problem(name):
        raise ValueError(f"a name that {problem} cannot stand in tables and names of files; give another")
    return name


def twins(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of names that are the same, or differ so little that some file systems take them for one."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    return [(first, second) for first, second, *_ in (same for same in alike.values() if len(same) > 1)]


def told_twins(first: str, second: str) -> str:
    """Say what is wrong with two names."""
    return f"two are named '{first}'" if first == second else f"'{first}' and '{second}' are one name to some disks"


Name = Annotated[str, AfterValidator(check_name)]
