"""Locks on open files and folders, which the system releases when the process that holds one ends in any way."""

import fcntl
from typing import Protocol


class HasDescriptor(Protocol):
    """An open file."""

    def fileno(self) -> int:
        """Return its descriptor."""


def hold(file: HasDescriptor | int) -> bool:
    """Wait for the lock of a file, and hold it until the file is closed; False on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def hold_now(file: HasDescriptor | int) -> bool:
    """As `hold`, but return False at once where another process holds the lock, and True where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_held(file: HasDescriptor | int) -> bool:
    """Return True if another process holds the lock; this takes it for a moment, together with others who look."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return False
