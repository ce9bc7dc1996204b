"""What GPUs tell each other: the faster of two all-reduces, links and networks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from leanmoe.predict.constants import shipped
from leanmoe.predict.hardware.collectives import (
    gather_seconds,
    library_reduce_seconds,
    reduce_seconds,
)
from leanmoe.predict.hardware.gpus import read_gpu


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


def test_rates_from_before_the_librarys_calls_go_on_as_they_were() -> None:
    gpu = read_gpu("h100")
    found, _ = shipped().rates_for("h100")
    rates = replace(found, library_bandwidth=0, gather_bandwidth=0)
    assert library_reduce_seconds(rates, gpu, 1e5, 2) == reduce_seconds(rates, gpu, 1e5, 2)
    assert gather_seconds(rates, gpu, 0, 2) == rates.exchange_seconds
