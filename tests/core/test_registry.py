"""Things that are chosen by name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.registry import Registry


@dataclass(frozen=True)
class Made:
    """Something with a name."""

    name: str
    value: int


TABLE = Registry("strategy", (Made("uniform", 1), Made("lexi", 2)))


def test_entries_are_found_by_name_in_their_order() -> None:
    assert TABLE["lexi"] == Made("lexi", 2)
    assert tuple(TABLE) == ("uniform", "lexi")
    assert "uniform" in TABLE


def test_an_unknown_name_gets_a_suggestion_and_the_list() -> None:
    said = r"^strategy 'unifrom' is not known: did you mean uniform\? known are uniform, lexi$"
    with pytest.raises(LeanMoeError, match=said):
        TABLE["unifrom"]
