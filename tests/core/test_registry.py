"""Things that are chosen by name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.registry import Registry


@dataclass(frozen=True)
class Made:
    """What a registry makes of what is registered."""

    name: str
    value: object
    title: str


def test_what_is_registered_is_found_by_its_name_and_stays_as_it_is() -> None:
    registry: Registry[object] = Registry("strategy")

    @registry.register("uniform")
    def uniform() -> int:
        return 1

    assert registry.get("uniform") is uniform
    assert uniform() == 1
    assert registry.names() == tuple(registry) == ("uniform",)
    assert "uniform" in registry
    assert len(registry) == 1


def test_an_entry_is_made_of_name_value_and_what_is_said_about_it() -> None:
    registry: Registry[Made] = Registry("criterion", Made)
    registry.register("reap", title="Router-weighted output norm")(max)
    assert registry.get("reap") == Made("reap", max, "Router-weighted output norm")


def test_an_unknown_name_gets_a_suggestion_and_the_list() -> None:
    registry: Registry[int] = Registry("strategy", also=("auto",))
    registry.register("uniform")(1)
    with pytest.raises(
        LeanMoeError,
        match=r"^strategy 'unifrom' is not known: did you mean uniform\? known are auto, uniform$",
    ):
        registry.get("unifrom")


def test_a_name_is_registered_once() -> None:
    registry: Registry[int] = Registry("strategy")
    registry.register("uniform")(1)
    with pytest.raises(LeanMoeError, match="strategy 'uniform' is registered already"):
        registry.register("uniform")(2)
