"""Figures against a calculation by hand, vLLM's names for them, and interleaved runs' order."""

from __future__ import annotations

import statistics
from dataclasses import fields

import pytest

from leanmoe.bench.measurement import (
    Measurement,
    Timeline,
)
from leanmoe.core.errors import LeanMoeError
from leanmoe.results.tune import MeasuredRun

FAST = Timeline(10.0, (10.1, 10.2, 10.4), 5, 3)
SLOW = Timeline(10.5, (11.5, 11.6, 12.5), 7, 3)


def test_by_hand() -> None:
    found = Measurement.of([FAST, SLOW], failed=1)
    assert found.duration == pytest.approx(2.5)
    assert found.request_throughput == pytest.approx(2 / 2.5)
    assert found.output_throughput == pytest.approx(6 / 2.5)
    assert found.total_token_throughput == pytest.approx(18 / 2.5)
    assert found.ttft_ms.mean == pytest.approx(1e3 * (0.1 + 1.0) / 2)
    assert found.tpot_ms.mean == pytest.approx(1e3 * (0.3 / 2 + 1.0 / 2) / 2)
    assert found.itl_ms.median == pytest.approx(1e3 * statistics.median([0.1, 0.2, 0.1, 0.9]))
    assert found.e2el_ms.p99 == pytest.approx(1e3 * (0.4 + 0.99 * (2.0 - 0.4)))
    assert (found.completed, found.failed) == (2, 1)
    assert found.request_goodput is None


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"ttft": 500}, 1),
        ({"ttft": 500, "tpot": 100}, 0),
        ({"tpot": 160}, 1),
        ({"e2el": 2100}, 2),
        ({"ttft": 99}, 0),
    ],
)
def test_goodput_counts_requests_that_keep_every_limit(limits: dict[str, float], kept: int) -> None:
    found = Measurement.of([FAST, SLOW], goodput=limits)
    assert found.request_goodput == pytest.approx(kept / 2.5)


def test_pieces_of_several_tokens_count_their_tokens() -> None:
    found = Measurement.of([Timeline(0.0, (1.0, 2.0), 4, 9)])
    assert found.total_output_tokens == 9
    assert found.tpot_ms.mean == pytest.approx(1e3 / 8)
    assert found.itl_ms.mean == pytest.approx(1e3)


def test_replies_of_one_token_have_no_time_per_output_token() -> None:
    found = Measurement.of([Timeline(0.0, (1.0,), 4, 1)], goodput={"tpot": 1})
    assert found.tpot_ms.mean == 0
    assert found.request_goodput == pytest.approx(1.0)


def test_names_are_those_of_vllm_bench_serve() -> None:
    names = set(Measurement.of([FAST, SLOW], goodput={"ttft": 1}).to_vllm_json())
    latencies = {
        f"{statistic}_{name}_ms"
        for statistic in ("mean", "median", "std", "p90", "p99")
        for name in ("ttft", "tpot", "itl", "e2el")
    }
    assert names == latencies | {
        "duration",
        "completed",
        "failed",
        "total_input_tokens",
        "total_output_tokens",
        "request_throughput",
        "request_goodput",
        "output_throughput",
        "total_token_throughput",
        "short_replies",  # ours
    }


def test_the_results_of_tune_know_every_figure() -> None:
    """Else a figure that is new here ends a whole run of tune when its results are written."""
    known = {field.name for field in fields(MeasuredRun)}
    assert {field.name for field in fields(Measurement)} <= known


def test_nothing_completed_is_no_measurement() -> None:
    with pytest.raises(LeanMoeError, match="no request was completed, 3 failed"):
        Measurement.of([], failed=3)
