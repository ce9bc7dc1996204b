"""Measured collectives: the planner's constants from them, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from leanmoe.cost.communication import Collectives, fitted, read_collectives
from leanmoe.cost.constants import shipped
from leanmoe.cost.hardware import read_gpu
from leanmoe.errors import LeanMoeError
from leanmoe.job.predict import find_constants

SIZES = [1024 * 4**power for power in range(10)]


def result(gpus: int = 4, **more: Any) -> dict[str, Any]:
    """As the benchmark writes it: 10 us a call, 100 GB/s of what travels, 20 us and 50 GB/s."""
    share = (gpus - 1) / gpus
    seconds = {
        "all_reduce": {str(n): {"median": 1e-5 + 2 * share * n / 1e11} for n in SIZES},
        "all_to_all": {str(n): {"median": 2e-5 + share * n / 5e10} for n in SIZES},
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
    assert rates.reduce_seconds + rates.reduce_hop == pytest.approx(1e-5)
    assert rates.reduce_bandwidth * gpu.link == pytest.approx(1e11)
    assert rates.exchange_seconds == pytest.approx(2e-5)
    assert rates.exchange_bandwidth * gpu.link == pytest.approx(5e10)
    assert (rates.reduce_hop, rates.product_flops) == (before.reduce_hop, before.product_flops)
    assert "4 x Some GPU" in origin


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
