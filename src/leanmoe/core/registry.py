"""Things that are chosen by name: strategies, criteria."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from leanmoe.core.errors import unknown_name


class HasName(Protocol):
    """What a table of names holds."""

    @property
    def name(self) -> str:
        """What it is chosen by."""


Entry = TypeVar("Entry", bound=HasName)


class Registry(dict[str, Entry]):
    """Entries by name, in their order; an unknown name is a LeanMoeError with "did you mean"."""

    def __init__(self, what: str, entries: Iterable[Entry] = ()) -> None:
        super().__init__((each.name, each) for each in entries)
        self._what = what

    def __missing__(self, name: str) -> Entry:
        raise unknown_name(self._what, name, self)
