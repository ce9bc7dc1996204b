"""What the check compares, and what it finds wrong."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.vllm.check import (
    BLIND,
    EMPTY,
    GROUPS,
    MIXED,
    ONE_KEPT,
    PADDING,
    SETTINGS,
    SKIPPING,
    STOCK,
    compared,
    plan_of,
    rows_of,
    wrongs,
)


def found(*replies: list[int], **more: Any) -> dict[str, Any]:
    """One engine's word: its replies at a concurrency of 5."""
    return {"tokens": {"5": [list(replies)]}, "workers": [], **more}


def test_replies_that_part_are_counted_where_they_do() -> None:
    mine, other = found([1, 2, 3], [4, 5, 6]), found([1, 2, 3], [4, 9, 8])
    assert compared(mine, other) == {"same": 0.5, "parted_at_token": [1]}
    assert compared(mine, mine)["same"] == 1
    assert compared(mine, {"trouble": "none"})["same"] is None


def test_every_setting_has_plans_for_its_runs() -> None:
    assert set(GROUPS[PADDING]) <= set(SETTINGS)
    for setting in SETTINGS.values():
        assert all(plan_of(run) is not None or run in ("stock", "again", "fewer")
                   for run in setting.runs)  # fmt: skip
    mixed = plan_of(MIXED)
    assert len({str(rule) for rule in mixed.bands[0].rules}) == 4


@pytest.mark.parametrize("is_padded_right", [True, False])
@pytest.mark.parametrize("is_blind_other", [True, False])
def test_padded_steps_must_be_as_exact_ones_and_blind_ones_must_not(
    is_padded_right: bool, is_blind_other: bool
) -> None:
    runs = {
        ("v1-exact", SKIPPING): found([1, 2]),
        ("v1-exact", ONE_KEPT): found([1, 2]),
        ("v1-padded", SKIPPING): found([1, 2] if is_padded_right else [1, 3]),
        ("v1-padded", BLIND): found([1, 7] if is_blind_other else [1, 2]),
    }
    said = wrongs(rows_of(runs, ["v1-exact", "v1-padded"]), runs)
    assert len(said) == (not is_padded_right) + (not is_blind_other)


def test_an_engine_that_did_not_run_is_wrong() -> None:
    runs = {("v1", STOCK): found([1]), ("v1", EMPTY): {"trouble": "out of memory"}}
    assert wrongs(rows_of(runs, ["v1"]), runs) == [
        "v1, empty beside v1, stock: missing",
        "v1, empty: did not run",
    ]


@pytest.mark.parametrize("word", ["is_same", "is_finite"])
def test_a_layer_that_nan_changes_is_wrong(word: str) -> None:
    step = {"rows": 8, "is_same": True, "is_finite": True, "slots_skipped": 0.5}
    runs = {("v1", MIXED): found([1], nan=[step, step | {word: False}], said="")}
    assert len(wrongs(rows_of(runs, ["v1"]), runs)) == 1
