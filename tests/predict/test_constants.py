"""Constants: fitted where the truth is known, saved and read, and as good as they say."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.catalog import published_shape
from leanmoe.models.shape import distinct_uniform
from leanmoe.predict.constants import Constants, read_constants, shipped, write_constants
from leanmoe.predict.experts.assumed import Assumed
from leanmoe.predict.experts.curve_sources import assumed_curves
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.hardware.rates import Rates
from leanmoe.predict.kernels.features import ExpertsShape, PredictedTile, Rows
from leanmoe.predict.kernels.fit import Form, Reading, accuracy, choose, errors_of, fit
from leanmoe.predict.kernels.kernel_constants import KernelConstants, Regime
from leanmoe.predict.kernels.tables import TABLES, VERSION, installed, measured_curve, read_table
from leanmoe.predict.kernels.tile_heuristics import ANY, CUTLASS, Stage, stages
from leanmoe.predict.prediction import Basis, default_kernel, predict
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.traffic.service_load import ServiceLoadModel, read_lengths

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


def readings(noise: float = 0.0) -> list[Reading]:
    draw = np.random.default_rng(0)
    found = []
    for shape in (ExpertsShape(2048, 768, 128), ExpertsShape(4096, 1536, 64)):
        for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 512):
            distinct = distinct_uniform(shape.experts, 8, tokens)
            rows = Rows(tokens, 8, 8 * tokens, distinct)
            seconds = TRUTH.seconds(shape, rows, H200) * (1 + noise * draw.normal())
            found.append(Reading(shape, rows, seconds))
    return found


def test_the_fit_finds_what_made_the_readings() -> None:
    found = fit("made-up", H200, "bfloat16", readings(), "made-up readings")
    errors = errors_of(found, readings(), H200)
    assert np.abs(errors).max() < 1e-3


def test_one_broken_reading_does_not_bend_the_rest() -> None:
    broken = readings()
    broken[5] = Reading(broken[5].shape, broken[5].rows, broken[5].seconds * 7)
    names = ("call", "weights", "slots_hidden")
    found = fit("made-up", H200, "bfloat16", broken, "", stages((512,)), Form(names))
    errors = np.abs(errors_of(found, readings(), H200))
    assert np.median(errors) < 0.02
    assert errors.max() < 0.1


def test_too_few_readings() -> None:
    with pytest.raises(LeanMoeError, match="2 readings of made-up are too few"):
        fit("made-up", H200, "bfloat16", readings()[:2], "")
    with pytest.raises(LeanMoeError, match="no row"):
        accuracy("nothing", np.array([]))


def test_saved_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    rates, _ = shipped().rates_for("h200")
    write_constants(path, Constants((TRUTH,), {"h200": rates}, {"date": "today"}))
    found = read_constants(path)
    assert found.kernels == (TRUTH,)
    assert found.rates["h200"] == rates
    merged = shipped().merged(found)
    assert merged.find("made-up", "h200", "bfloat16")[0] == TRUTH


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
    tuned = {(128, 768): ((8.0, PredictedTile(16, 64)), (ANY, PredictedTile(128, 128)))}
    regimes = (Regime(ANY, None, {"waves": 1.0}), Regime(ANY, PredictedTile(16, 64), {"call": 5.0}))
    kernel = KernelConstants("x", "h200", "bfloat16", regimes, "", tuned=tuned, least_waves=2)
    rows = Rows(8, 8, 64, 52)
    layer, other = ExpertsShape(2048, 768, 128), ExpertsShape(2048, 384, 128)
    more = Rows(9, 8, 72, 52)
    assert kernel.seconds(layer, rows, H200) > kernel.seconds(layer, more, H200)  # wider tiles
    assert kernel.seconds(other, rows, H200) == pytest.approx(5e-6)
    assert kernel.borrowed().seconds(layer, rows, H200) == pytest.approx(5e-6)
    path = tmp_path / "mine.json"
    write_constants(path, Constants((kernel,), {}))
    assert read_constants(path).kernels == (kernel,)


def test_tuned_layers_are_fitted_apart_and_the_form_is_chosen() -> None:
    truth = KernelConstants(
        "x",
        "h200",
        "bfloat16",
        (
            Regime(ANY, None, {"weights": 1.0, "call": 3.0}),
            Regime(ANY, PredictedTile(64, 64), {"weights": 2.0, "waves_hidden": 4.0}),
        ),
        "",
        tuned={(128, 768): ((ANY, PredictedTile(16, 64)),)},
        least_waves=3,
    )
    shapes = [ExpertsShape(h, w, e) for h in (2048, 4096) for w in (256, 768) for e in (32, 128)]
    made = []
    for shape in shapes:
        for tokens in (1, 2, 4, 8, 16, 64, 256):
            rows = Rows(tokens, 8, 8 * tokens, distinct_uniform(shape.experts, 8, tokens))
            made.append(Reading(shape, rows, truth.seconds(shape, rows, H200)))
    steps = (Stage(ANY, (PredictedTile(64, 64),)),)
    form = choose("x", H200, "bfloat16", made, steps, truth.tuned)
    assert form.least_waves == 3
    found = fit("x", H200, "bfloat16", made, "", steps, form, truth.tuned)
    assert np.abs(errors_of(found, made, H200)).max() < 0.01
    plain = fit("x", H200, "bfloat16", made, "", steps)
    assert np.abs(errors_of(plain, made, H200)).max() > 0.1
    assert len(CUTLASS) == len({stage.up_to for stage in CUTLASS})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"leanmoe_constants": 99}, "schema version 99"),
        ({"kernels": [{"kernel": "x"}]}, "damaged"),
        ({"rates": {"h200": {"nonsense": 1}}}, "damaged"),
    ],
)
def test_a_malformed_file(tmp_path: Path, change: dict[str, object], says: str) -> None:
    path = tmp_path / "bad.json"
    write_constants(path, Constants((TRUTH,), {}))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(LeanMoeError, match=says):
        read_constants(path)


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


@pytest.mark.skipif(installed() != VERSION, reason="aiconfigurator-core is not installed")
def test_a_prediction_says_how_far_off_its_kind_has_been() -> None:
    model, lengths = published_shape("Qwen/Qwen3-30B-A3B"), read_lengths("64", "length")
    load = ServiceLoadModel(lengths, lengths, 4)
    said = {}
    for gpu in ("h200", "a800"):
        basis = Basis(default_kernel(model), partial(assumed_curves, model, Assumed()))
        found = predict(model, None, Deployment(GPUS[gpu]), load, basis)
        said[gpu] = found.stands_on["experts have been off by"]
        assert found.stands_on["experts"].startswith("interpolated") == (gpu == "h200")
    assert "each row from its layer's others" in said["h200"]
    assert "unseen half" in said["a800"]
    assert "others" not in said["a800"]


@pytest.mark.skipif(installed() != VERSION, reason="aiconfigurator-core is not installed")
def test_every_k_6_row_is_predicted_as_well_as_the_constants_say() -> None:
    table = next(t for t in TABLES if (t.kernel, t.dtype) == ("vllm-flashinfer", "fp8_block"))
    constants, _ = shipped().find(table.kernel, "h200", table.dtype)
    rows = [
        row
        for row in read_table("h200", table)
        if row.top_k == 6
        and row.width // row.tensor % 128 == 0
        and row.experts // row.expert >= 8
        and row.tensor * row.expert <= 16
    ]
    off = [
        abs(constants.seconds(r.shape(table.dtype), r.rows(table.kernel), H200) / r.seconds - 1)
        for r in rows
    ]
    said = next(a for a in constants.accuracy if a.what == "every k = 6 row")
    assert len(rows) == said.rows
    assert np.mean(off) == pytest.approx(said.mean, rel=0.01)
    assert max(off) == pytest.approx(said.worst, rel=0.01)


@pytest.mark.skipif(installed() != VERSION, reason="aiconfigurator-core is not installed")
def test_measured_rows_of_a_layer_are_found_and_grouped_ties_left_out() -> None:
    key = (2048, 768, 128, 8, 1, 1)
    curve = measured_curve("h200", "vllm-triton", "bfloat16", key)
    assert [row.tokens for row in curve] == sorted(row.tokens for row in curve)
    assert len(curve) > 20
    grouped = measured_curve("h200", "sglang-triton", "fp8_block", (7168, 2048, 256, 8, 8, 1))
    assert min(row.tokens for row in grouped) >= 32
    assert measured_curve("h200", "vllm-triton", "bfloat16", (1, 1, 1, 1, 1, 1)) == []
    assert measured_curve("a800", "vllm-triton", "bfloat16", key) == []
