"""The stages of each kernel's tiles, and which features its fit uses. Part of `fit`.

vLLM 0.24.0 and SGLang 0.5.14 take tiles from a tuned configuration where they have one of this very
layer (by experts and expert width on a GPU), else by rules of their own. Both are public
(Apache-2.0: vLLM's `fused_moe.get_default_config`, SGLang's `fused_moe_triton_config`). OpenAI's
Triton kernels take as many rows as an expert has on average, rounded up to a power of two. What
CUTLASS takes is tuned where it runs and not known: the better of two is fitted.

Which features count is chosen by leaving layers out, among the fitted rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from leanmoe.predict.constants import ANY, TunedLayer
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.kernels.features import FEATURES, PredictedTile
from leanmoe.predict.kernels.fit import (
    CLIPPED,
    PLAIN,
    Form,
    Reading,
    StepRange,
    errors_of,
    fit,
    stages,
)

FOLDS = 4
"""Folds of the layers, when sets of features are compared."""
FEW = ("call", "longer", "activations", "waves", "waves_hidden", "waves_width", "spread")
CANDIDATES = (PLAIN, FEATURES, FEW)
"""Sets of features to choose from."""
LEAST_WAVES = (1, 2, 3, 4)
"""Tiles a multiprocessor that may keep the memory busy, to choose from."""
TUNED = stages((4, 32, 96, 512, 2048, ANY), None)
"""Stages of layers with a tuned configuration."""
CUTLASS = stages((4, 32, 64, 96, 512, 2048, ANY), (PredictedTile(64, 128), PredictedTile(128, 128)))
SCHEDULES: Mapping[tuple[str, str], tuple[StepRange, ...]] = {
    ("vllm-triton", "bfloat16"): (
        *stages((4, 32), (PredictedTile(16, 64),)),
        StepRange(64, (PredictedTile(32, 64),)),
        StepRange(96, (PredictedTile(32, 128),)),
        StepRange(512, (PredictedTile(64, 128),)),
        *stages((2048, ANY), (PredictedTile(128, 128),)),
    ),
    ("vllm-triton", "fp8_block"): (
        *stages((4, 16, 64), (PredictedTile(16, 128),)),
        *stages((512, 2048, ANY), (PredictedTile(64, 128),)),
    ),
    ("sglang-triton", "bfloat16"): (
        *(StepRange(edge, (PredictedTile(16, 32),), tokens_an_expert=1) for edge in (4, 32, ANY)),
        *stages((96, 512, 2048, ANY), (PredictedTile(64, 64),)),
    ),
    ("sglang-triton", "fp8_block"): stages((4, 32, 96, 512, 2048, ANY), (PredictedTile(64, 128),)),
    ("vllm-triton", "w4a16_mxfp4"): tuple(
        StepRange(ANY, (PredictedTile(rows, 128), PredictedTile(rows, 256)), slots_an_expert=limit)
        for rows, limit in ((16, 16), (32, 32), (64, 64), (128, None))
    ),
}
"""By kernel and format; `CUTLASS` for those that are not here."""


def schedule_of(kernel: str, dtype: str) -> tuple[StepRange, ...]:
    """The ranges of steps of a kernel, without those of layers with a tuned configuration."""
    return SCHEDULES.get((kernel, dtype), CUTLASS)


def choose(
    kernel: str,
    gpu: Gpu,
    dtype: str,
    readings: Sequence[Reading],
    stages: Sequence[StepRange],
    tuned: tuple[TunedLayer, ...] = (),
) -> Form:
    """The form that predicts left-out layers best, one choice after another."""
    layers = list(dict.fromkeys(_layer(r) for r in readings))
    order = np.random.default_rng(0).permutation(len(layers))
    fold = {layers[place]: number % FOLDS for number, place in enumerate(order)}

    def off(form: Form) -> float:
        errors = []
        for number in range(min(FOLDS, len(layers))):
            kept = [r for r in readings if fold[_layer(r)] != number]
            out = [r for r in readings if fold[_layer(r)] == number]
            constants = fit(kernel, gpu, dtype, kept, "", stages, form)
            errors.append(np.minimum(np.abs(errors_of(constants, out, gpu)), CLIPPED))
        return float(np.concatenate(errors).mean())

    form = min((Form(names, tuned=tuned) for names in CANDIDATES), key=off)
    form = min((replace(form, least_waves=least) for least in LEAST_WAVES), key=off)
    if tuned:
        form = min((replace(form, tuned_names=names) for names in CANDIDATES), key=off)
    return form


def _layer(reading: Reading) -> Any:
    """What is left out as a whole when sets of features are compared."""
    return reading.shape, reading.rows.slots
