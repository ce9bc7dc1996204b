"""Runs that share GPUs: they load beside each other, and measure one after the other.

Loading takes longer than measuring, and most of it is a processor's work. A run holds a file's lock
with all others while it loads, and alone while it measures: so nobody measures while anybody loads.
"""

from __future__ import annotations

import fcntl
from pathlib import Path


class GpuLock:
    """One run's hold of the lock; it ends with the process."""

    def __init__(self, path: Path) -> None:
        """Waits while another run measures."""
        self._file = path.open("a")
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def take(self) -> None:
        """Waits until no other run loads or measures; from here on they wait for this one."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
