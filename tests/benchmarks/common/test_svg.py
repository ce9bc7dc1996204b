"""Elements of pictures are well-formed, escape words, and ticks are round."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from benchmarks.common.svg import circle, document, line, path, text, ticks


def test_a_picture_is_well_formed_and_escapes_words() -> None:
    parts = [
        line(0, 0, 1, 1, "#1d2b3a"),
        path([(0, 0), (1, 2), (3, 4)], "#1d2b3a"),
        text(1, 2, "a < b"),
    ]
    parts.insert(0, circle(1, 2, "#1d2b3a", "#1d2b3a", "c & d"))
    root = ElementTree.fromstring(document(10, 20, 'said "so"', parts))
    assert root.attrib["viewBox"] == "0 0 10 20"
    assert root.attrib["aria-label"] == 'said "so"'
    assert [each.text for each in root][-1] == "a < b"


@pytest.mark.parametrize(
    ("low", "high", "most", "values"),
    [(0, 10, 5, [0, 2, 4, 6, 8, 10]), (-1, 1, 4, [-1, -0.5, 0, 0.5, 1]), (0, 1e4, 3, [0, 1e4])],
)
def test_ticks_are_round(low: float, high: float, most: float, values: list[float]) -> None:
    assert ticks(low, high, most) == values
