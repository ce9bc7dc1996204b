"""Progress with time left, on standard error: bars in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int], None]


@contextmanager
def bar(what: str, total: int, unit: str = "") -> Iterator[Advance]:
    """Shows how far `what` has come; the body calls the yielded function with units just done."""
    if total <= 0:
        yield lambda _done: None
    elif sys.stderr.isatty():
        with _terminal_bar(what, total, unit) as advance:
            yield advance
    else:
        yield _log_lines(what, total, unit)


@contextmanager
def _terminal_bar(what: str, total: int, unit: str) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description:<26}", markup=False),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)


def _log_lines(what: str, total: int, unit: str) -> Advance:
    started = last = time.monotonic()
    finished = 0

    def advance(done: int) -> None:
        nonlocal finished, last
        finished += done
        now = time.monotonic()
        if finished < total and now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        left = (now - started) * (total - finished) / max(finished, 1)
        ending = f"{left:.0f} s left" if finished < total else f"done in {now - started:.0f} s"
        print(f"{what}: {finished}/{total} {unit}, {ending}".replace(" ,", ","), file=sys.stderr)

    return advance
