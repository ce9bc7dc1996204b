"""Fitting a kernel's constants to measurements, and how far off they are on others.

Constants are non-negative least squares on the relative error, per range of steps, since kernels
change their tiles there (`schedules`). A row far off weighs less (iteratively reweighted), so that
one broken measurement does not bend the rest. Which features count is chosen by leaving layers out,
among the fitted rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.kernels.features import (
    FEATURES,
    MICROSECOND,
    ExpertsShape,
    PredictedTile,
    Rows,
    features,
)
from leanmoe.predict.kernels.kernel_constants import (
    Accuracy,
    KernelConstants,
    Regime,
    Tuned,
    tuned_tile,
)
from leanmoe.predict.kernels.tile_heuristics import CUTLASS, TUNED, StepRange

REWEIGHTED = 6
NEAR = 0.02
"""Relative error below which a row has its full weight."""
CLIPPED = 0.3
"""Error at which a row counts no further when tiles are compared."""
FEWEST_ROWS = 3
FOLDS = 4
"""Folds of the layers, when sets of features are compared."""
PLAIN = tuple(name for name in FEATURES if name != "strides")
FEW = ("call", "longer", "activations", "waves", "waves_hidden", "waves_width", "spread")
CANDIDATES = (PLAIN, FEATURES, FEW)
"""Sets of features to choose from."""
LEAST_WAVES = (1, 2, 3, 4)
"""Tiles a multiprocessor that may keep the memory busy, to choose from."""


@dataclass(frozen=True)
class Reading:
    """One measured layer."""

    shape: ExpertsShape
    rows: Rows
    seconds: float

    @property
    def layer(self) -> tuple[ExpertsShape, float]:
        """What is left out as a whole when sets of features are compared."""
        return self.shape, self.rows.slots


@dataclass(frozen=True)
class Form:
    """What a fit may use: chosen once for a kernel, among its fitted rows."""

    names: Sequence[str] = FEATURES
    tuned_names: Sequence[str] = PLAIN
    """Features of layers that have a tuned configuration."""
    least_waves: int = 1
    tuned: Tuned = field(default_factory=dict)
    """Layers that have a tuned configuration, which are fitted apart."""


def fit(
    kernel: str,
    gpu: Gpu,
    dtype: str,
    readings: Sequence[Reading],
    fitted_to: str,
    stages: Sequence[StepRange] = CUTLASS,
    form: Form = Form(),
) -> KernelConstants:
    """Constants of a kernel from `readings`, stage by stage; needs scipy.

    Of several tiles of a stage the best is
    taken. A stage with fewer than three readings is left to the next one. Raises LeanMoeError when
    none has as many.
    """
    left = list(readings)
    regimes = []
    for stage in (*(TUNED if form.tuned else ()), *stages):
        within = [r for r in left if _takes(stage, r, form.tuned)]
        if len(within) < FEWEST_ROWS:
            continue
        left = [r for r in left if not _takes(stage, r, form.tuned)]
        regimes.append(_regime(stage, within, gpu, form))
    if not any(regime.tile for regime in regimes):
        raise LeanMoeError(
            f"{len(readings)} readings of {kernel} are too few to fit: {FEWEST_ROWS} are needed"
        )
    return KernelConstants(
        kernel,
        gpu.name,
        dtype,
        tuple(regimes),
        fitted_to,
        tuned=form.tuned,
        least_waves=form.least_waves,
    )


def choose(
    kernel: str,
    gpu: Gpu,
    dtype: str,
    readings: Sequence[Reading],
    stages: Sequence[StepRange],
    tuned: Tuned | None = None,
) -> Form:
    """The form that predicts left-out layers best, one choice after another."""
    layers = list(dict.fromkeys(r.layer for r in readings))
    order = np.random.default_rng(0).permutation(len(layers))
    fold = {layers[place]: number % FOLDS for number, place in enumerate(order)}

    def off(form: Form) -> float:
        errors = []
        for number in range(min(FOLDS, len(layers))):
            kept = [r for r in readings if fold[r.layer] != number]
            out = [r for r in readings if fold[r.layer] == number]
            constants = fit(kernel, gpu, dtype, kept, "", stages, form)
            errors.append(np.minimum(np.abs(errors_of(constants, out, gpu)), CLIPPED))
        return float(np.concatenate(errors).mean())

    form = min((Form(names, tuned=tuned or {}) for names in CANDIDATES), key=off)
    form = min((replace(form, least_waves=least) for least in LEAST_WAVES), key=off)
    if tuned:
        form = min((replace(form, tuned_names=names) for names in CANDIDATES), key=off)
    return form


def _takes(stage: StepRange, reading: Reading, tuned: Tuned) -> bool:
    if stage.tiles is None and tuned_tile(tuned, reading.shape, reading.rows.tokens) is None:
        return False
    limits = stage.tokens_an_expert, stage.slots_an_expert
    return Regime(stage.up_to, None, {}, *limits).takes(reading.shape, reading.rows)


def _regime(stage: StepRange, readings: Sequence[Reading], gpu: Gpu, form: Form) -> Regime:
    names = form.tuned_names if stage.tiles is None else form.names
    used = [FEATURES.index(name) for name in names]
    took = np.array([r.seconds for r in readings]) / MICROSECOND
    best: tuple[float, PredictedTile | None, NDArray[np.float64]] | None = None
    for tile in stage.tiles or (None,):
        matrix = np.array([_values(r, gpu, tile, form)[used] for r in readings])
        constants = _robust(matrix / took[:, None])
        errors = np.abs(matrix @ constants / took - 1)
        error = float(np.minimum(errors, CLIPPED).mean())
        if best is None or error < best[0]:
            best = (error, tile, constants)
    assert best is not None
    values = {
        name: float(f"{value:.6g}") for name, value in zip(names, best[2], strict=True) if value
    }
    return Regime(stage.up_to, best[1], values, stage.tokens_an_expert, stage.slots_an_expert)


def _values(
    reading: Reading, gpu: Gpu, tile: PredictedTile | None, form: Form
) -> NDArray[np.float64]:
    taken = tile or tuned_tile(form.tuned, reading.shape, reading.rows.tokens)
    assert taken is not None
    return features(reading.shape, reading.rows, gpu, taken, form.least_waves)


def _robust(relative: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative constants with `relative` @ constants near 1 in most rows."""
    from scipy.optimize import nnls

    weights = np.ones(len(relative))
    constants = np.zeros(relative.shape[1])
    for _ in range(REWEIGHTED + 1):
        constants, _ = nnls(relative * weights[:, None], weights, maxiter=500)
        off = np.abs(relative @ constants - 1)
        weights = 1 / np.sqrt(np.maximum(off, NEAR))
    return np.asarray(constants)


def fit_positive(
    predict: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    took: NDArray[np.float64],
    start: Sequence[float],
) -> NDArray[np.float64]:
    """Positive constants of `predict` with the least `log_error`; needs scipy."""
    from scipy.optimize import minimize

    def off(logs: NDArray[np.float64]) -> float:
        return log_error(predict(np.exp(logs)), took)

    fitted = minimize(off, np.log(start), method="Nelder-Mead", options={"maxiter": 4000})
    return np.asarray(np.exp(fitted.x))


def log_error(predicted: NDArray[np.float64], took: NDArray[np.float64]) -> float:
    """The mean absolute difference of logarithms."""
    return float(np.abs(np.log(predicted / took)).mean())


def errors_of(
    constants: KernelConstants, readings: Sequence[Reading], gpu: Gpu
) -> NDArray[np.float64]:
    """Relative error of each prediction, with its sign."""
    return np.array([constants.seconds(r.shape, r.rows, gpu) / r.seconds - 1 for r in readings])


def accuracy(what: str, errors: NDArray[np.float64]) -> Accuracy:
    """How far off predictions are; raises LeanMoeError where there is none."""
    if not len(errors):
        raise LeanMoeError(f"no row to tell how far off predictions are ({what})")
    off = np.abs(errors)
    return Accuracy(
        what,
        len(off),
        float(f"{off.mean():.4g}"),
        float(f"{np.quantile(off, 0.99):.4g}"),
        float(f"{off.max():.4g}"),
    )
