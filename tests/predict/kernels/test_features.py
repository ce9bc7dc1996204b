"""Rows, tiles and the tables' pattern, against counting."""

from __future__ import annotations

import math

import numpy as np
import pytest

from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.kernels.features import (
    FEATURES,
    ExpertsShape,
    PredictedTile,
    Rows,
    features,
    tiles_per_expert,
)


@pytest.mark.parametrize("mean", [1.05, 2.0, 9.0, 40.0, 300.0])
@pytest.mark.parametrize("tile", [16, 64])
def test_tiles_of_an_active_expert(mean: float, tile: int) -> None:
    draw = np.random.default_rng(0)
    rate = next(r for r in np.linspace(1e-3, 400, 400_000) if r / (1 - math.exp(-r)) >= mean)
    rows = draw.poisson(rate, 400_000)
    rows = rows[rows > 0]
    assert tiles_per_expert(mean, tile) == pytest.approx(np.ceil(rows / tile).mean(), rel=0.01)


def test_tiles_beyond_the_table() -> None:
    assert tiles_per_expert(6400, 64) == 100.5


def test_features_are_the_bytes_and_products_of_the_layer() -> None:
    gpu, shape = GPUS["h200"], ExpertsShape(7168, 2048, 256)
    found = dict(
        zip(
            FEATURES,
            features(shape, Rows(32, 8, 256, 162), gpu, PredictedTile(16, 64)),
            strict=True,
        )
    )
    assert found["weights"] == pytest.approx(162 * 3 * 7168 * 2048 * 2 / 4.8e12 * 1e6)
    assert found["longer"] == max(found["weights"], found["products"])
    assert found["products"] >= 256 * 6 * 7168 * 2048 / 989e12 * 1e6
    few = dict(
        zip(FEATURES, features(shape, Rows(1, 8, 8, 8), gpu, PredictedTile(16, 64)), strict=True)
    )
    assert all(few[name] <= found[name] for name in FEATURES)


def test_exact_counts_are_rounded_up_one_by_one() -> None:
    assert Rows(10, 2, 20, 3, (1, 16, 17)).tiles(16) == 4
    assert Rows(0, 0, 0, 0).tiles(16) == 0


def test_waves_are_whole_where_rows_are_known_and_never_fewer_than_the_least() -> None:
    gpu, shape = GPUS["h200"], ExpertsShape(2048, 768, 128)
    place = FEATURES.index("waves")
    exact = features(shape, Rows(1, 8, 8, 8, (1,) * 8), gpu, PredictedTile(16, 64))
    assert exact[place] == 2 + 2  # 8 x 12 x 2 and 8 x 32 tiles over 132 multiprocessors
    assert features(shape, Rows(1, 8, 8, 8, (1,) * 8), gpu, PredictedTile(16, 64), 4)[place] == 8
    known = features(shape, Rows(1, 8, 8, 8), gpu, PredictedTile(16, 64))[place]
    assert known == pytest.approx(192 / 132 + 0.5 + 256 / 132 + 0.5)


def test_padded_widths_are_read_and_computed() -> None:
    plain, padded = ExpertsShape(2880, 180, 8), ExpertsShape(2880, 180, 8, padded_to=128)
    assert (padded.padded_hidden, padded.padded_width) == (2944, 256)
    assert padded.expert_bytes == 3 * 2944 * 256 * 2
    assert plain.expert_bytes == 3 * 2880 * 180 * 2


def test_experts_of_other_gpus_are_sorted_out() -> None:
    gpu, shape = GPUS["h200"], ExpertsShape(2048, 768, 16)
    place = FEATURES.index("spread")
    assert features(shape, Rows(8, 8, 64, 16), gpu, PredictedTile(16, 64))[place] == 0
    assert features(shape, Rows(8, 8, 8, 7), gpu, PredictedTile(16, 64))[place] == 1
