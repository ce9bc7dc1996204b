"""Fitting a kernel's constants to measurements, and how far off they are on others.

Constants are non-negative least squares on the relative error, per range of steps, since kernels
change their tiles there. A row far off weighs less (iteratively reweighted), so that one broken
measurement does not bend the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.constants import (
    Accuracy,
    KernelConstants,
    Regime,
    TunedLayer,
    tuned_tile,
)
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.kernels.features import (
    FEATURES,
    MICROSECOND,
    TILES,
    ExpertsShape,
    PredictedTile,
    Rows,
    features,
)

REWEIGHTED = 6
NEAR = 0.02
"""Relative error below which a row has its full weight."""
CLIPPED = 0.3
"""Error at which a row counts no further when tiles are compared."""
FEWEST_ROWS = 3
PLAIN = tuple(name for name in FEATURES if name != "strides")


@dataclass(frozen=True)
class Reading:
    """One measured layer."""

    shape: ExpertsShape
    rows: Rows
    seconds: float


@dataclass(frozen=True)
class StepRange:
    """A range of steps that constants are fitted to, and the tiles that a kernel may take there."""

    up_to: float
    """Tokens of the step."""
    tiles: tuple[PredictedTile, ...] | None
    """The best of these; None: the one that a tuned configuration names."""
    tokens_an_expert: float | None = None
    slots_an_expert: float | None = None


def stages(
    edges: Sequence[float], tiles: tuple[PredictedTile, ...] | None = TILES
) -> tuple[StepRange, ...]:
    """Ranges of tokens that end at `edges`, all with the same tiles."""
    return tuple(StepRange(edge, tiles) for edge in edges)


@dataclass(frozen=True)
class Form:
    """What a fit may use: chosen once for a kernel, among its fitted rows."""

    names: Sequence[str] = FEATURES
    tuned_names: Sequence[str] = PLAIN
    """Features of layers that have a tuned configuration."""
    least_waves: int = 1
    tuned: tuple[TunedLayer, ...] = ()
    """Layers that have a tuned configuration, which are fitted apart."""


def fit(
    kernel: str,
    gpu: Gpu,
    dtype: str,
    readings: Sequence[Reading],
    fitted_to: str,
    stages: Sequence[StepRange],
    form: Form = Form(),
) -> KernelConstants:
    """Constants of a kernel from `readings`, stage by stage; needs scipy.

    Of several tiles of a stage the best is taken. A stage with fewer than three readings is left to
    the next one. Raises LeanMoeError when none has as many.
    """
    left = list(readings)
    regimes = []
    for stage in stages:
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


def _takes(stage: StepRange, reading: Reading, tuned: Sequence[TunedLayer]) -> bool:
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
