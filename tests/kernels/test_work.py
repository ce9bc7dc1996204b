"""What experts functions report while somebody counts."""

from __future__ import annotations

from leanmoe.kernels.work import add_work, count_work


def test_work_is_added_up_in_every_open_count_and_in_no_other() -> None:
    add_work(100, 10)
    with count_work() as outer:
        add_work(3, 2)
        with count_work() as inner:
            add_work(5, 1)
    add_work(100, 10)
    assert (outer.calls, outer.rows, outer.distinct) == (2, 8, 3)
    assert (inner.calls, inner.rows, inner.distinct) == (1, 5, 1)
