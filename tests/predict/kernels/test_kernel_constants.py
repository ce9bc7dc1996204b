"""Which of a kernel's constants a step takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.constants import Constants
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.kernels.features import ExpertsShape, PredictedTile, Rows
from leanmoe.predict.kernels.kernel_constants import ANY, KernelConstants, Regime, TunedLayer

H200 = GPUS["h200"]


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
