"""Every step of every kernel falls into one of its stages; the form of a fit is found."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.predict.kernel_forms import CUTLASS, SCHEDULES, TUNED, choose
from leanmoe.models.shape import distinct_uniform
from leanmoe.predict.constants import ANY, KernelConstants, Regime, TunedLayer
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.kernels.features import ExpertsShape, PredictedTile, Rows
from leanmoe.predict.kernels.fit import Reading, StepRange, errors_of, fit, stages

H200 = GPUS["h200"]


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), TUNED, CUTLASS])
def test_stages_rise_and_the_last_takes_any_step(schedule: tuple[StepRange, ...]) -> None:
    limits = {(stage.tokens_an_expert, stage.slots_an_expert) for stage in schedule}
    for limit in limits:
        mine = [s.up_to for s in schedule if (s.tokens_an_expert, s.slots_an_expert) == limit]
        assert mine == sorted(set(mine))
    last = schedule[-1]
    assert (last.up_to, last.tokens_an_expert, last.slots_an_expert) == (ANY, None, None)


def test_stages_share_their_tiles() -> None:
    few, any_step = stages((4, ANY), CUTLASS[0].tiles)
    assert (few.up_to, any_step.up_to) == (4, ANY)
    assert few.tiles == any_step.tiles == CUTLASS[0].tiles


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
        tuned=(TunedLayer(128, 768, f"{ANY:.0f}:16x64"),),
        least_waves=3,
    )
    shapes = [ExpertsShape(h, w, e) for h in (2048, 4096) for w in (256, 768) for e in (32, 128)]
    made = []
    for shape in shapes:
        for tokens in (1, 2, 4, 8, 16, 64, 256):
            rows = Rows(tokens, 8, 8 * tokens, distinct_uniform(shape.experts, 8, tokens))
            made.append(Reading(shape, rows, truth.seconds(shape, rows, H200)))
    steps = (*TUNED, StepRange(ANY, (PredictedTile(64, 64),)))
    form = choose("x", H200, "bfloat16", made, steps, truth.tuned)
    assert form.least_waves == 3
    found = fit("x", H200, "bfloat16", made, "", steps, form)
    assert np.abs(errors_of(found, made, H200)).max() < 0.01
    plain = fit("x", H200, "bfloat16", made, "", steps[len(TUNED) :])
    assert np.abs(errors_of(plain, made, H200)).max() > 0.1
