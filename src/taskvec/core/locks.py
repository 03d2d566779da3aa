"""Locks on files, and hidden folders to write in that hold one: what a killed process left is found and removed.

A lock is one on an open file (flock), which ends with its process. Process numbers are not used: another container may
have the same. Where the system or the disk has no locks, nothing is refused and nothing is swept.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from taskvec.core.errors import TaskvecError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

HIDDEN = re.compile(r"\..*\.[0-9a-f]{12}\.tmp", re.DOTALL)
"""The name of a hidden folder to write in."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
"""The file with the identity of the running system; containers on it share the identity and the locks."""


def machine() -> set[str]:
    """Return the names of this machine: the identity of its running system, and its host name."""
    with contextlib.suppress(OSError):
        return {BOOT.read_text().strip(), socket.gethostname()}
    return {socket.gethostname()}


def lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file; return False where files cannot be locked, raise BlockingIOError where another holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except (OSError, AttributeError):
        return False
    return True


def claim(path: Path) -> int:
    """Make a new lock file that names this machine; the lock is held until the returned handle is closed."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        lock(handle, wait=True)  # who looks whether it is abandoned holds it for a moment
        os.write(handle, "\n".join(sorted(machine())).encode())
    except BaseException:
        os.close(handle)
        raise
    return handle


def abandoned(path: Path) -> bool:
    """Return whether the process that held a lock file has ended; other machines than its own return False."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return lock(handle) and not machine().isdisjoint(os.read(handle, 1000).decode(errors="replace").splitlines())
    except OSError:
        return False
    finally:
        os.close(handle)


@contextlib.contextmanager
def holding(path: Path, busy: TaskvecError) -> Iterator[None]:
    """Hold a lock file during a block, then remove it; raise ``busy`` where it is held already."""
    handle = _open_locked(path, busy)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _open_locked(path: Path, busy: TaskvecError) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(handle)
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise busy from None
        except FileNotFoundError:  # who held it has removed it meanwhile
            pass
        os.close(handle)


def beside(path: Path) -> str:
    """Return the beginning of the hidden names beside a path; a long name is cut, so that they fit."""
    return f".{os.fsencode(path.name)[:100].decode(errors='ignore')}."


def sweep(folder: Path) -> None:
    """Remove the hidden folders that killed writers have left in a folder."""
    with contextlib.suppress(FileNotFoundError):
        for path in [Path(entry) for entry in os.scandir(folder) if HIDDEN.fullmatch(entry.name)]:
            if abandoned(path / "lock"):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside ``path`` to write into; after the block it is removed with what is in it."""
    sweep(path.parent)
    place = path.with_name(f"{beside(path)}{uuid.uuid4().hex[:12]}.tmp")
    place.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        handle = claim(place / "lock")
        stack.callback(os.close, handle)
        (place / "new").mkdir()
        yield place / "new"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path for a new file, which replaces ``path`` after the block: it appears whole or not at all."""
    with workspace(path) as folder:
        yield folder / path.name
        (folder / path.name).replace(path)
