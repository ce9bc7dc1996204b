"""Dataclasses to JSON and back, and what is refused on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.schema import StoredFile, all_fields, from_json, stored_as, to_json
from leanmoe.plan import Rule


@dataclass(frozen=True)
class Part:
    name: str
    share: float
    decode_batch: int = field(metadata=stored_as("together"))
    note: str | None = None


@dataclass(frozen=True)
class Whole(StoredFile):
    KIND: ClassVar[str] = "leanmoe_whole"
    VERSION: ClassVar[int] = 3
    WHAT: ClassVar[str] = "results of a test"

    parts: tuple[Part, ...]
    best: dict[str, Part]
    rule: Rule
    is_complete: bool
    open: Any = None


WHOLE = Whole((Part("a", 0.5, 8),), {"b": Part("b", 1, 1, "last")}, Rule(top_k=2), True)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    WHOLE.save(tmp_path / "results.json")
    assert Whole.load(tmp_path / "results.json") == WHOLE


def test_keys_defaults_and_versions_are_written_as_files_hold_them() -> None:
    assert to_json(WHOLE) == {
        "leanmoe_whole": 3,
        "parts": [{"name": "a", "share": 0.5, "together": 8}],
        "best": {"b": {"name": "b", "share": 1, "together": 1, "note": "last"}},
        "rule": {"top_k": 2},
        "is_complete": True,
    }


def test_all_fields_are_written_with_their_defaults() -> None:
    part = {"name": "a", "share": 0.5, "decode_batch": 8, "note": None}
    assert all_fields(WHOLE.parts[0]) == part
    assert all_fields(WHOLE)["parts"] == [part]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"leanmoe_whole": 2},
            "a test x.json has schema version 2: this leanmoe reads 3",
        ),
        ({"more": 1}, "x.json has an unknown field 'more': allowed are parts, best, rule"),
        ({"is_complete": "yes"}, "x.json: is_complete is 'yes': it must be true or false"),
        ({"parts": [{"name": "a"}]}, r"parts\[0\]\.share is missing"),
        ({"parts": {}}, r"parts is {}: it must be a list"),
        ({"parts": [{"name": 1, "share": 1.0, "together": 1}]}, r"parts\[0\]\.name is 1"),
        ({"best": {"b": 3}}, r"best\.b is 3: it must be an object"),
        ({"rule": {"top": 3}}, "top"),
    ],
)
def test_what_is_malformed_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        Whole.from_json({**WHOLE.to_json(), **change}, "x.json")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(LeanMoeError, match=r"test\.rule is missing"):
        Whole.from_json({k: v for k, v in WHOLE.to_json().items() if k != "rule"})


def test_true_is_no_number() -> None:
    with pytest.raises(LeanMoeError, match="share is True: it must be a number"):
        from_json(Part, {"name": "a", "share": True, "together": 1}, "part")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_a_number_is_finite(value: float) -> None:
    with pytest.raises(LeanMoeError, match=r"share is .*: it must be a finite number"):
        from_json(Part, {"name": "a", "share": value, "together": 1}, "part")
