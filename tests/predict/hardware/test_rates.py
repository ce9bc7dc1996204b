"""Rates of a file from before the library's calls were measured."""

from __future__ import annotations

from dataclasses import replace

from leanmoe.predict.constants import shipped
from leanmoe.predict.hardware.collectives import (
    gather_seconds,
    library_reduce_seconds,
    reduce_seconds,
)
from leanmoe.predict.hardware.gpus import read_gpu


def test_rates_from_before_the_librarys_calls_go_on_as_they_were() -> None:
    gpu = read_gpu("h100")
    found, _ = shipped().rates_for("h100")
    rates = replace(found, library_bandwidth=0, gather_bandwidth=0)
    assert library_reduce_seconds(rates, gpu, 1e5, 2) == reduce_seconds(rates, gpu, 1e5, 2)
    assert gather_seconds(rates, gpu, 0, 2) == rates.exchange_seconds
