"""Locks and places to write in: what a process writes is its own until it ends, and what a killed one left goes away.

A lock is one on an open file (flock): it ends with its process, and no number of a process is looked at, which another
container may have as well. Where the system or the disk has no locks nothing is refused and nothing is swept.
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
"""What a hidden folder to write in is called."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
"""What tells a running system from all others: containers on it share it, and its locks."""


def machine() -> set[str]:
    """Return what this machine is known by: its running system and its name."""
    with contextlib.suppress(OSError):
        return {BOOT.read_text().strip(), socket.gethostname()}
    return {socket.gethostname()}


def lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file, or say that files cannot be locked here; one that another holds raises BlockingIOError."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except (OSError, AttributeError):
        return False
    return True


def claim(path: Path) -> int:
    """Make a new lock file, which says on what machine it is held, and hold it until the returned handle is closed."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        lock(handle, wait=True)  # who looks whether it is abandoned holds it for a moment
        os.write(handle, "\n".join(sorted(machine())).encode())
    except BaseException:
        os.close(handle)
        raise
    return handle


def abandoned(path: Path) -> bool:
    """Say whether the process that held a lock file has ended, which only its own machine can tell."""
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
    """Hold a lock file during a block and remove it then; ``busy`` is raised where it is held already."""
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
    """Return how the hidden names begin that lie beside a path for it; a long name is cut, so that they fit."""
    return f".{os.fsencode(path.name)[:100].decode(errors='ignore')}."


def sweep(folder: Path) -> None:
    """Remove the hidden folders that killed writers have left in a folder."""
    with contextlib.suppress(FileNotFoundError):
        for left in [Path(entry) for entry in os.scandir(folder) if HIDDEN.fullmatch(entry.name)]:
            if abandoned(left / "lock"):
                shutil.rmtree(left, ignore_errors=True)


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
    """Yield where to write a file that takes the place of ``path`` after the block: it appears whole or not at all."""
    with workspace(path) as folder:
        yield folder / path.name
        (folder / path.name).replace(path)
