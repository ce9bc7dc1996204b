"""Constants: fitted where the truth is known, saved and read, and as good as they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.constants import ANY, Constants, KernelConstants, Regime, TunedLayer, shipped
from leanmoe.predict.hardware.gpus import GPUS, Rates
from leanmoe.predict.kernels.features import ExpertsShape, PredictedTile, Rows

H200 = GPUS["h200"]
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


def test_a_step_is_in_the_first_regime_that_takes_it() -> None:
    shape = ExpertsShape(2048, 768, 64)
    few = Regime(ANY, PredictedTile(16, 32), {"call": 1.0}, tokens_an_expert=1)
    some = Regime(ANY, PredictedTile(64, 64), {"call": 2.0}, slots_an_expert=16)
    kernel = KernelConstants(
        "x", "h200", "bfloat16", (few, some, Regime(9, PredictedTile(16, 64), {})), ""
    )

    def at(tokens: int) -> float:
        return kernel.seconds(shape, Rows(tokens, 8, 8 * tokens, 60), H200) * 1e6

    assert (at(64), at(65), at(128)) == pytest.approx((1, 2, 2))
    assert at(129) == 0  # none takes it: the last
    assert kernel.seconds(shape, Rows(4, 8, 0, 0), H200) == 0


def test_a_tuned_layer_has_its_own_tiles_here_and_none_on_another_gpu(tmp_path: Path) -> None:
    tuned = (TunedLayer(128, 768, f"8:16x64 {ANY:.0f}:128x128"),)
    regimes = (Regime(ANY, None, {"waves": 1.0}), Regime(ANY, PredictedTile(16, 64), {"call": 5.0}))
    kernel = KernelConstants("x", "h200", "bfloat16", regimes, "", tuned=tuned, least_waves=2)
    rows = Rows(8, 8, 64, 52)
    layer, other = ExpertsShape(2048, 768, 128), ExpertsShape(2048, 384, 128)
    more = Rows(9, 8, 72, 52)
    assert kernel.seconds(layer, rows, H200) > kernel.seconds(layer, more, H200)  # wider tiles
    assert kernel.seconds(other, rows, H200) == pytest.approx(5e-6)
    assert kernel.borrowed().seconds(layer, rows, H200) == pytest.approx(5e-6)
    path = tmp_path / "mine.json"
    Constants((kernel,), {}).save(path)
    assert Constants.load(path).kernels == (kernel,)


def test_constants_of_an_unknown_feature_are_refused() -> None:
    with pytest.raises(LeanMoeError, match="constants are of phlogiston: known are call, weights"):
        Regime(ANY, None, {"call": 1.0, "phlogiston": 2.0})
    with pytest.raises(LeanMoeError, match="constants of x have no range of steps"):
        KernelConstants("x", "h200", "bfloat16", (Regime(ANY, None, {}),), "")
