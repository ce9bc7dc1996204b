"""The one error that leanmoe raises for anything a user can put right."""

from __future__ import annotations

import re
from collections.abc import Iterable

MOST_LISTED = 200
MOST_SHOWN = 120
"""Characters of a value."""
LONG_WORD = re.compile(r"(\S{500})\S+(?=\S\S)")


class LeanMoeError(Exception):
    """Names the thing that is wrong, its value, and what is allowed, in one line.

    The command line prints the message alone and exits with status 1; `--debug` adds the traceback.
    """

    def __str__(self) -> str:
        """Keys and values of somebody's file may end lines, never end, or be no characters."""
        line = LONG_WORD.sub(r"\1...", " ".join(super().__str__().splitlines()))
        return line.encode("utf-8", "backslashreplace").decode()


def shown(value: object) -> str:
    """A value of somebody's file as an error shows it: a file may be one long value."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def first_line(error: BaseException) -> str:
    """What another library's error says first; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "did you mean ...? " with the known names near an unknown one; nothing where none is."""
    import difflib  # only where something is wrong

    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {', '.join(near)}? " if near else ""


def unknown_name(what: str, name: str, known: Iterable[str], more: str = "") -> LeanMoeError:
    """The error for a name that is none of the known ones: near names first, then all of them.

    Thousands are not listed.
    """
    names = list(known)
    hint = did_you_mean(name, names)
    listed = (
        f"known are {', '.join(names)}"
        if len(names) <= MOST_LISTED
        else f"{len(names):,} are known"
    )
    return LeanMoeError(f"{what} {name!r} is not known: {hint}{listed}{more}")
