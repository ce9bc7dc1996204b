"""Fitting a kernel's constants to measurements, and how far off they are on others.

Constants are non-negative least squares on the relative error, per range of tokens, since kernels
change their tiles with the tokens of a step. A row far off weighs less (iteratively reweighted), so
that one broken measurement does not bend the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanmoe.cost.constants import Accuracy, KernelConstants, Regime
from leanmoe.cost.hardware import Gpu
from leanmoe.cost.work import FEATURES, MICROSECOND, TILE_ROWS, ExpertsShape, Rows, features
from leanmoe.errors import LeanMoeError

EDGES = (4, 32, 64, 96, 512, 2048, 16384)
"""Ends of the ranges of tokens, where vLLM's and SGLang's default tiles change."""
TRITON_TILES: Mapping[int, Sequence[int]] = {
    4: (16,),
    32: (16,),
    64: (32,),
    96: (32,),
    512: (64,),
    2048: (128,),
    16384: (128,),
}
"""Rows of a tile in vLLM's and SGLang's default configurations for bf16, by range."""
OTHER_TILES: Mapping[int, Sequence[int]] = dict.fromkeys(EDGES, (64, 128))
"""CUTLASS's, and the fp8 block configurations': not known by range, so the better of two."""
REWEIGHTED = 6
NEAR = 0.02
"""Relative error below which a row has its full weight."""
CLIPPED = 0.3
"""Error at which a row counts no further when tiles are compared."""
FEWEST_ROWS = 3


@dataclass(frozen=True)
class Reading:
    """One measured layer."""

    shape: ExpertsShape
    rows: Rows
    seconds: float


def fit(
    kernel: str,
    gpu: Gpu,
    dtype: str,
    readings: Sequence[Reading],
    fitted_to: str,
    edges: Sequence[int] = EDGES,
    names: Sequence[str] = FEATURES,
    tiles: Mapping[int, Sequence[int]] | None = None,
) -> KernelConstants:
    """Constants of a kernel from `readings`, range by range of tokens; needs scipy.

    `tiles` says which rows of a tile a range may have, by its edge; of several the best is taken.

    A range with fewer than three readings is left to the next one. Raises LeanMoeError when none
    has as many.
    """
    regimes = []
    least = 0
    for edge in edges:
        within = [r for r in readings if least < r.rows.tokens <= edge]
        if len(within) < FEWEST_ROWS:
            continue
        allowed = TILE_ROWS if tiles is None else tiles[edge]
        regimes.append(_regime(edge, within, gpu, names, allowed))
        least = edge
    if not regimes:
        raise LeanMoeError(
            f"{len(readings)} readings of {kernel} are too few to fit: {FEWEST_ROWS} are needed"
        )
    return KernelConstants(kernel, gpu.name, dtype, tuple(regimes), fitted_to)


def _regime(
    edge: int,
    readings: Sequence[Reading],
    gpu: Gpu,
    names: Sequence[str],
    tiles: Sequence[int],
) -> Regime:
    used = [FEATURES.index(name) for name in names]
    took = np.array([r.seconds for r in readings]) / MICROSECOND
    best: tuple[float, int, NDArray[np.float64]] | None = None
    for tile in tiles:
        found = np.array([features(r.shape, r.rows, gpu, tile)[used] for r in readings])
        constants = _robust(found / took[:, None])
        errors = np.abs(found @ constants / took - 1)
        error = float(np.minimum(errors, CLIPPED).mean())
        if best is None or error < best[0]:
            best = (error, tile, constants)
    assert best is not None
    values = {
        name: float(f"{value:.6g}") for name, value in zip(names, best[2], strict=True) if value
    }
    return Regime(edge, best[1], values)


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
