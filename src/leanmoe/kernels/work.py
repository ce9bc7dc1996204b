"""How much the experts really computed: rows and distinct experts, counted where they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Work:
    """Sums over the calls made while counting."""

    calls: int = 0
    rows: int = 0
    """Expert rows computed: slots that were not skipped."""
    distinct: int = 0
    """Experts whose weights were read, added up over calls."""


_open: list[Work] = []


@contextmanager
def count_work() -> Iterator[Work]:
    """Counts what every experts function of this package does in the body, in any thread."""
    work = Work()
    _open.append(work)
    try:
        yield work
    finally:
        _open.remove(work)


def add_work(rows: int, distinct: int) -> None:
    """What an experts function says after each call; costs nothing while nobody counts."""
    for work in _open:
        work.calls += 1
        work.rows += rows
        work.distinct += distinct
