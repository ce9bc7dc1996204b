"""One input read under limits: a result, a refusal of one line, or a fault."""

from __future__ import annotations

import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from leanmoe.core.errors import LeanMoeError
from tests.fuzz.readers import KINDS, one_line, reference_model

SECONDS = 10.0
"""Of this process's own time that one input may take."""
MEMORY_BYTES = 4 * 2**30
"""That one input may add."""


class HangError(Exception):
    """An input took longer than it may."""


@dataclass(frozen=True)
class Verdict:
    """What became of an input."""

    ending: str
    """result, refusal or fault."""
    words: str = ""
    """The refusal, or the fault's kind and place."""


def judge(kind: str, content: bytes) -> Verdict:
    """Reads an input of a kind."""
    _, read, _ = KINDS[kind]
    if kind == "plans":
        reference_model()  # whose loading counts for no input
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        with limited():
            read(content, folder)
    except LeanMoeError as error:
        try:
            one_line(error)
        except (AssertionError, UnicodeError) as wrong:
            return Verdict("fault", f"{type(wrong).__name__}: {wrong} {place_of(error)}")
        return Verdict("refusal", str(error))
    except Exception as error:
        return Verdict("fault", f"{type(error).__name__}: {str(error)[:300]} {place_of(error)}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Verdict("result")


def place_of(error: BaseException) -> str:
    """Where in leanmoe an error arose: the last of its lines there."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/leanmoe/" in f.filename]
    last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"at {Path(last.filename).name}:{last.name}"


@contextmanager
def limited() -> Iterator[None]:
    """Raises HangError after too much time, and MemoryError beyond so much memory."""

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise HangError(f"more than {SECONDS:g} seconds")

    before = signal.signal(signal.SIGPROF, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 1.0)  # again, where something swallows it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
