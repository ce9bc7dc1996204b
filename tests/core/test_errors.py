"""Words for a name that is not known."""

from __future__ import annotations

from leanmoe.core.errors import LeanMoeError, did_you_mean, unknown_name


def test_near_names_come_first_then_all_of_them() -> None:
    error = unknown_name("hardware", "h20o", ["h200", "l40s"], "; to add one, give a file")
    assert str(error) == (
        "hardware 'h20o' is not known: did you mean h200? known are h200, l40s; "
        "to add one, give a file"
    )


def test_where_nothing_is_near_nothing_is_suggested() -> None:
    assert did_you_mean("zzz", ["h200"]) == ""


def test_thousands_are_counted_not_listed() -> None:
    error = str(unknown_name("task", "taks", ["task", *map(str, range(1999))], " here"))
    assert error == "task 'taks' is not known: did you mean task? 2,000 are known here"


def test_a_message_is_one_line_that_can_be_printed() -> None:
    """Keys of a file may hold what ends a line, and halves of characters."""
    assert str(LeanMoeError("a\u2028b\nc\ud800")) == "a b c\\ud800"
    assert str(LeanMoeError(f"k is {'x' * 9999}: no")) == f"k is {'x' * 500}...x: no"
