"""Constants: fitted where the truth is known, saved and read, and as good as they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.constants import Constants, shipped
from leanmoe.predict.hardware.gpus import Rates
from leanmoe.predict.kernels.features import PredictedTile
from leanmoe.predict.kernels.kernel_constants import KernelConstants, Regime

TRUTH = KernelConstants(
    "made-up",
    "h200",
    "bfloat16",
    (Regime(1 << 20, PredictedTile(16, 64), {"call": 12.0, "weights": 1.15, "slots_hidden": 2.0}),),
    "nothing",
)


HELD_TO = {
    ("vllm-triton", "bfloat16"),
    ("vllm-triton", "fp8_block"),
    ("vllm-flashinfer", "fp8_block"),
    ("sglang-triton", "bfloat16"),
    ("sglang-triton", "fp8_block"),
    ("trtllm-cutlass", "fp8_block"),
    ("leanmoe", "bfloat16"),
}
"""Kernels within 4% on average on shapes they have not seen; the others are not, and say so."""


def test_saved_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    rates, _ = shipped().rates_for("h200")
    Constants((TRUTH,), {"h200": rates}, {"date": "today"}).save(path)
    found = Constants.load(path)
    assert found.kernels == (TRUTH,)
    assert found.rates["h200"] == rates
    merged = shipped().merged(found)
    assert merged.find("made-up", "h200", "bfloat16")[0] == TRUTH


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"leanmoe_constants": 99}, "schema version 99"),
        ({"kernels": [{"kernel": "x"}]}, r"kernels\[0\]\.gpu is missing"),
        ({"rates": {"h200": {"nonsense": 1}}}, r"rates\.h200 has an unknown field 'nonsense'"),
    ],
)
def test_a_malformed_file(tmp_path: Path, change: dict[str, object], says: str) -> None:
    path = tmp_path / "bad.json"
    Constants((TRUTH,), {}).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(LeanMoeError, match=says):
        Constants.load(path)


def test_an_unknown_kernel_lists_those_there_are() -> None:
    with pytest.raises(LeanMoeError, match=r"there are no constants.*vllm-triton \(bfloat16\)"):
        shipped().find("imaginary", "h200", "bfloat16")


def test_another_gpus_constants_are_carried_over_and_it_says_so() -> None:
    _, here = shipped().find("vllm-triton", "h200", "bfloat16")
    _, there = shipped().find("vllm-triton", "a800", "bfloat16")
    assert "carried over" not in here
    assert "carried over to a800" in there
    assert "carried over from h200 to b200" in shipped().rates_for("b200")[1]


def test_shipped_constants_say_how_far_off_they_have_been() -> None:
    for kernel in shipped().kernels:
        assert kernel.accuracy
        if kernel.gpu == "h200" and (kernel.kernel, kernel.dtype) in HELD_TO:
            assert all(each.mean <= 0.04 for each in kernel.accuracy), kernel.kernel
    assert isinstance(shipped().rates["h200"], Rates)


def test_the_calibrations_in_the_results_are_read() -> None:
    folder = Path(__file__).parents[2] / "benchmarks/results"
    paths = sorted(folder.glob("*-calibrate.json"))
    assert paths
    for path in paths:
        assert Constants.load(path).kernels[0].kernel == "leanmoe"
