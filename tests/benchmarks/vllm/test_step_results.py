"""Medians, intervals and gains of a benchmark of vLLM."""

from __future__ import annotations

import pytest

from benchmarks.vllm.step_results import Results, Seen, interval, show
from benchmarks.vllm.variants import STOCK, Variant


def test_an_interval_holds_its_median() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found["median"], found["n"]) == (3.0, 5)
    assert found["low"] <= 3.0 <= found["high"]


def test_gains_are_paired_by_round(capsys: pytest.CaptureFixture[str]) -> None:
    results, plan = Results(), "k=4"
    for number, stock in enumerate((1.0, 2.0, 4.0)):
        results.add(number, ("skewed", 8, STOCK), "step_ms", stock)
        results.add(number, ("skewed", 8, plan), "step_ms", stock / 2)
    results.see(("skewed", 8, plan), Seen(12.0, 7.0, (5.0, 7.0), 4.0))
    lines = results.lines([Variant(STOCK), Variant(plan)])
    assert [line["plan"] for line in lines] == [STOCK, plan]
    assert lines[1]["gain_step_ms"]["median"] == 2.0
    assert (lines[1]["distinct"], lines[1]["distinct_by_rank"]) == (12.0, [5.0, 7.0])
    assert results.mean_step(8, plan, ["skewed"]) == 1.0
    show(lines)
    assert "2.00x 12" in capsys.readouterr().out
