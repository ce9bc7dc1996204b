"""Names of layouts."""

from __future__ import annotations

import pytest

from benchmarks.vllm.layout import SINGLE, Layout, Ranks


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("1", Layout()),
        ("tp2", Layout(2)),
        ("tp2-ep", Layout(2, 1, True)),
        ("dp2-ep", Layout(1, 2, True)),
        ("tp2-dp4-ep", Layout(2, 4, True)),
    ],
)
def test_a_layout_is_read_from_its_name(name: str, layout: Layout) -> None:
    assert Layout.parse(name) == layout
    assert layout.gpus == layout.tensor * layout.data
    assert layout.expert_ranks == (layout.gpus if layout.is_expert else 1)


@pytest.mark.parametrize("name", ["", "2", "ep2", "tp", "tp2-pp2"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be 1, or like tp2"):
        Layout.parse(name)


def test_one_process_decides_alone() -> None:
    ranks = Ranks(SINGLE)
    assert (ranks.first_says(True), ranks.first_says(False)) == (True, False)
    assert ranks.slowest(0.25) == 0.25
