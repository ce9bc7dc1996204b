"""Measured collectives: the planner's constants from them, and files that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.constants import find_constants, shipped
from leanmoe.predict.hardware.collectives import (
    Collectives,
    fitted,
    gather_seconds,
    library_reduce_seconds,
    read_collectives,
    reduce_seconds,
)
from leanmoe.predict.hardware.gpus import read_gpu

SIZES = [1024 * 4**power for power in range(10)]


def result(gpus: int = 4, **more: Any) -> dict[str, Any]:
    """As the benchmark writes it: all-reduce takes 10 us and 100 GB/s of what travels, all-to-all
    20 us and 50 GB/s, all-gather and reduce-scatter 30 us and 20 GB/s."""
    share = (gpus - 1) / gpus
    seconds = {
        "all_reduce": {str(n): {"median": 1e-5 + 2 * share * n / 1e11} for n in SIZES},
        "all_to_all": {str(n): {"median": 2e-5 + share * n / 5e10} for n in SIZES},
        "all_gather": {str(n): {"median": 3e-5 + share * n / 2e10} for n in SIZES},
        "reduce_scatter": {str(n): {"median": 3e-5 + share * n / 2e10} for n in SIZES},
    }
    made = {"hardware": "Some GPU"}
    found = {"leanmoe_benchmark": "communication", "gpus": gpus, "provenance": made}
    return {**found, "seconds": seconds, **more}


def written(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_the_planner_says_what_was_measured(tmp_path: Path) -> None:
    gpu = read_gpu("h100")
    path = written(tmp_path / "times.json", result())
    rates, origin = find_constants(None, path, gpu).rates_for("h100")
    before, _ = shipped().rates_for("h100")
    size = 1e9
    assert library_reduce_seconds(rates, gpu, 0, 4) == pytest.approx(1e-5)
    assert library_reduce_seconds(rates, gpu, size, 4) == pytest.approx(1e-5 + 1.5 * size / 1e11)
    assert rates.exchange_seconds == pytest.approx(2e-5)
    assert rates.exchange_bandwidth * gpu.link == pytest.approx(5e10)
    assert gather_seconds(rates, gpu, size, 4) == pytest.approx(3e-5 + 0.75 * size / 2e10)
    assert (rates.reduce_seconds, rates.product_flops) == (
        before.reduce_seconds,
        before.product_flops,
    )
    assert "4 x Some GPU" in origin


def test_files_without_gathering_leave_it_as_it_was(tmp_path: Path) -> None:
    times = result()["seconds"]
    del times["all_gather"], times["reduce_scatter"]
    path = written(tmp_path / "times.json", result(seconds=times))
    rates, _ = find_constants(None, path, read_gpu("h100")).rates_for("h100")
    before, _ = shipped().rates_for("h100")
    assert rates.gather_seconds == before.gather_seconds
    assert rates.library_seconds != before.library_seconds


def test_the_faster_all_reduce_counts_where_an_engine_has_its_own() -> None:
    gpu = read_gpu("h100")
    rates, _ = shipped().rates_for("h100")
    slow = replace(rates, library_seconds=1e-3, library_bandwidth=rates.reduce_bandwidth)
    fast = replace(rates, library_seconds=0, library_hop=0, library_bandwidth=1)
    own = reduce_seconds(replace(rates, library_bandwidth=0), gpu, 1e5, 4)
    assert reduce_seconds(slow, gpu, 1e5, 4) == own
    assert reduce_seconds(fast, gpu, 1e5, 4) == library_reduce_seconds(fast, gpu, 1e5, 4) < own
    joined = read_gpu("l40s")
    assert reduce_seconds(slow, joined, 1e5, 2) < 1e-3
    assert reduce_seconds(slow, joined, 1e5, 4) > 1e-3
    assert reduce_seconds(slow, gpu, 1e5, 16) < 1e-3  # between nodes neither was measured


def test_gathering_between_nodes_takes_the_slower_of_link_and_network() -> None:
    gpu = read_gpu("h100")
    rates, _ = shipped().rates_for("h100")
    size = 1e9

    def bytes_only(network: float, gpus: int) -> float:
        there = replace(gpu, network=network)
        return gather_seconds(rates, there, size, gpus) - gather_seconds(rates, there, 0, gpus)

    within = bytes_only(gpu.network, 8)
    assert within == pytest.approx(7 / 8 * size / gpu.link / rates.gather_bandwidth)
    assert bytes_only(1e9, 8) == pytest.approx(within)
    assert bytes_only(1e9, 16) == pytest.approx(size / 2 / 8e9 / rates.network_bandwidth)
    assert bytes_only(1e12, 16) == pytest.approx(within * (15 / 16) / (7 / 8))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"leanmoe_benchmark": "other"}, "no result of"),
        ({"gpus": 1}, "at least 2 GPUs"),
        ({"seconds": {"all_reduce": {}}}, "too little"),
        ({"seconds": {"all_reduce": {"1024": {"median": -1}}}}, "a time is -1"),
        ({"seconds": 3}, "are damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(LeanMoeError, match=reason):
        read_collectives(written(tmp_path / "times.json", result(**change)))


def test_times_that_do_not_rise_are_refused() -> None:
    falling = {size: 1e-3 - size / 1e15 for size in SIZES}
    measured = Collectives("Some GPU", 2, {"all_reduce": falling, "all_to_all": falling})
    rates, _ = shipped().rates_for("h100")
    with pytest.raises(LeanMoeError, match="do not rise"):
        fitted(rates, measured, read_gpu("h100"))


def test_rates_from_before_the_librarys_calls_go_on_as_they_were() -> None:
    gpu = read_gpu("h100")
    found, _ = shipped().rates_for("h100")
    rates = replace(found, library_bandwidth=0, gather_bandwidth=0)
    assert library_reduce_seconds(rates, gpu, 1e5, 2) == reduce_seconds(rates, gpu, 1e5, 2)
    assert gather_seconds(rates, gpu, 0, 2) == rates.exchange_seconds
