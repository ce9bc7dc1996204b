"""Things that are chosen by name: strategies, criteria, tasks, GPUs.

STRATEGIES: Registry[Strategy] = Registry("strategy", Strategy)

@STRATEGIES.register("uniform", title="As many slots in every layer", source="...")
def uniform(setting: Setting) -> tuple[Rule, ...]: ...

STRATEGIES.get("unifrom")  # LeanMoeError: ... did you mean uniform? ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from leanmoe.core.errors import LeanMoeError, unknown_name

Entry = TypeVar("Entry")
Registered = TypeVar("Registered")


def _as_it_is(name: str, value: Any) -> Any:
    del name
    return value


class Registry(Generic[Entry]):
    """A table of names in the order they were registered in.

    `make(name, registered, **about)` makes the entry; without it what is registered is the entry.
    `also` are names that other code accepts beside these, for the error's list.
    """

    def __init__(
        self, what: str, make: Callable[..., Entry] = _as_it_is, also: tuple[str, ...] = ()
    ) -> None:
        self._what, self._make, self._also = what, make, also
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, **about: Any) -> Callable[[Registered], Registered]:
        """A decorator that adds what it decorates; raises LeanMoeError for a name that is taken."""

        def add(registered: Registered) -> Registered:
            if name in self._entries:
                raise LeanMoeError(f"{self._what} {name!r} is registered already")
            self._entries[name] = self._make(name, registered, **about)
            return registered

        return add

    def get(self, name: str) -> Entry:
        """The entry of that name; raises LeanMoeError with "did you mean" for an unknown one."""
        if name not in self._entries:
            raise unknown_name(self._what, name, (*self._also, *self._entries))
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """All names, in the order they were registered in."""
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
