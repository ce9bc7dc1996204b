"""Measured collectives: the planner's constants from them, and files that are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predict.collective_rates import (
    Collectives,
    fitted,
    main,
    read_collectives,
    with_collectives,
)
from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.constants import find_constants, shipped
from leanmoe.predict.hardware.collectives import gather_seconds, library_reduce_seconds
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
    rates, origin = with_collectives(shipped(), path, gpu).rates_for("h100")
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
    rates, _ = with_collectives(shipped(), path, read_gpu("h100")).rates_for("h100")
    before, _ = shipped().rates_for("h100")
    assert rates.gather_seconds == before.gather_seconds
    assert rates.library_seconds != before.library_seconds


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


def test_they_are_written_as_constants_for_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = written(tmp_path / "times.json", result()), tmp_path / "constants.json"
    monkeypatch.setattr(sys, "argv", ["x", str(path), "--gpu", "h100", "-o", str(output)])
    main()
    rates, origin = find_constants(output).rates_for("h100")
    expected, _ = with_collectives(shipped(), path, read_gpu("h100")).rates_for("h100")
    assert rates == expected
    assert "4 x Some GPU" in origin
