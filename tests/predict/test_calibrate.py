"""Calibration without a GPU: a made-up clock, and the kernels' interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.calibrate import Layer, Sizes, calibrate
from leanmoe.predict.constants import Constants, KernelConstants, Regime
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.kernels.features import ExpertsShape, PredictedTile, Rows
from tests.cli.test_main import run

H200 = GPUS["h200"]
TRUTH = KernelConstants(
    "leanmoe",
    "h200",
    "bfloat16",
    (Regime(1 << 20, PredictedTile(64, 128), {"call": 9.0, "weights": 1.2}),),
    "",
)
LAYERS = (Layer(16, 256, 128, 4), Layer(32, 256, 64, 4), Layer(24, 128, 256, 2))
PRODUCTS = ((1, 256, 256), (16, 128, 512), (64, 512, 128), (256, 256, 128))


def made_up_clock(calls: Sequence[Callable[[], object]]) -> float:
    """What the truth says of the calls' own inputs; nothing is run."""
    arguments = calls[0].args  # type: ignore[attr-defined]
    if len(arguments) == 2:
        left, right = arguments
        work = 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return float(3e-6 + work / H200.flops / 0.6)
    hidden_TD, ids_TK, _, weights = arguments
    distinct = np.mean([len(call.args[1].unique()) for call in calls])  # type: ignore[attr-defined]
    shape = ExpertsShape(hidden_TD.shape[1], weights.down.shape[2], weights.down.shape[0])
    tokens, slots = ids_TK.shape
    return TRUTH.seconds(shape, Rows(tokens, slots, tokens * slots, float(distinct)), H200)


def test_constants_come_back_and_say_how_far_off_they_are(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    sizes = Sizes((1, 2, 4, 8, 32, 64, 128), PRODUCTS)
    found = calibrate(H200, LAYERS, path, "test", made_up_clock, "cpu", sizes)
    (kernel,) = found.kernels
    assert kernel.accuracy[0].mean < 0.02
    assert Constants.load(path).kernels == found.kernels
    rates = found.rates["h200"]
    assert "dense products measured" in rates.fitted_to
    assert "attention and communication" in rates.fitted_to
    shape, rows = ExpertsShape(256, 96, 24), Rows(16, 4, 64, 22)
    assert kernel.seconds(shape, rows, H200) == pytest.approx(
        TRUTH.seconds(shape, rows, H200), rel=0.1
    )


def test_the_calls_that_are_timed_compute_the_layer(tmp_path: Path) -> None:
    """In Triton's interpreter: every call runs once, and gives a number for each value."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is there: nothing is interpreted")
    from leanmoe.kernels.triton.launch import interprets

    if not interprets():
        pytest.skip("Triton was imported without its interpreter")

    def clock(calls: Sequence[Callable[[], object]]) -> float:
        result = calls[0]()
        assert isinstance(result, Tensor)
        assert result.isfinite().all()
        return made_up_clock(calls)

    layers = (Layer(4, 64, 32, 2), Layer(6, 64, 32, 2))
    sizes = Sizes((1, 2, 3), PRODUCTS[:3])
    calibrate(H200, layers, tmp_path / "c.json", "test", clock, "cpu", sizes)


def test_too_large_layers_and_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = (Layer(4096, 65536, 65536, 8), LAYERS[0])
    with pytest.raises(LeanMoeError, match="1 layers fit half of h200's"):
        calibrate(H200, huge, tmp_path / "c.json", "test", made_up_clock, "cpu")
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    for words in ("1,2", "0,1,2", "1,2,many", "1,2,99999999"):
        code, _, err = run(capsys, "calibrate", "h200", "--tokens", words)
        assert code == 1
        assert f"--tokens is '{words}'" in err
    code, _, err = run(capsys, "calibrate", "h200", "-o", str(tmp_path / "c.json"))
    assert code == 1
    assert "needs an NVIDIA GPU" in err


def test_a_missing_package_is_named_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("leanmoe.predict.calibrate.find_spec", lambda name: name != "scipy" or None)

    def never(calls: Sequence[Callable[[], object]]) -> float:
        raise AssertionError(f"{len(calls)} calls were measured")

    with pytest.raises(LeanMoeError, match=r"needs scipy: pip install 'leanmoe\[gpu\]'"):
        calibrate(H200, LAYERS, tmp_path / "c.json", "test", never, "cpu")
