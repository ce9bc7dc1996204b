"""Small steps of vLLM's kernel: which slots run side by side, and what is read twice."""

from __future__ import annotations

import numpy as np
import pytest

from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.kernels.features import ExpertsShape, Rows
from leanmoe.predict.kernels.small_steps import (
    CACHED_SHARE,
    Launch,
    distinct_among,
    launch_of,
    slot_by_slot,
)

H100 = GPUS["h100"]
V3 = ExpertsShape(7168, 2048, 256)
QWEN = ExpertsShape(2048, 768, 128)
GPT_OSS = ExpertsShape(2880, 2880, 128)


def test_blocks_beside_each_other_are_what_shared_memory_holds() -> None:
    """(16 + 64) x 128 bf16 values in 4 stages are 80 KiB: 2 blocks on each of 132."""
    launch = Launch(64, 128, 4)
    assert launch.decode_batch(4096, 2, H100) == 264 / 64
    assert launch.decode_batch(4096, 1, H100) == 5 * 132 / 64
    assert Launch(64, 256, 4).decode_batch(4096, 2, H100) == 132 / 64
    assert Launch(16, 16, 2).decode_batch(16, 2, H100) == 16 * 132  # as many as it may hold
    assert Launch(64, 1024, 4).decode_batch(64, 2, H100) == 132  # one at least
    assert Launch(64, 128, 4, 64).decode_batch(4096, 2, H100) == 64


def test_a_layer_with_a_configuration_is_launched_by_it() -> None:
    groups = [launch_of(GPT_OSS, tokens, H100).group for tokens in (1, 2, 3, 4, 8, 12, 16)]
    assert groups == [1, 1, 1, 64, 64, 64, 16]
    assert launch_of(GPT_OSS, 4, GPUS["h200"]) == launch_of(V3, 4, H100) == Launch(64, 128, 4)
    fp8 = ExpertsShape(7168, 2048, 256, weight_bytes=1, activation_bytes=1)
    assert launch_of(fp8, 4, H100).columns == 128


@pytest.mark.parametrize(("pool", "slots"), [(20, 32), (12, 64), (200, 64), (1, 8)])
def test_neighbours_have_fewer_distinct_experts(pool: int, slots: int) -> None:
    draw = np.random.default_rng(0)
    chosen = draw.integers(0, pool, size=(4000, slots))
    distinct = np.mean([len(set(step)) for step in chosen.tolist()])
    for some in (1, slots // 4, slots // 2, slots):
        found = distinct_among(some, slots, float(distinct))
        among = np.mean([len(set(step[:some])) for step in chosen.tolist()])
        assert found == pytest.approx(among, rel=0.02)


def test_slots_that_run_apart_read_a_shared_expert_anew() -> None:
    """Four of DeepSeek-V3's slots run side by side, of 64: nearly each of them reads."""
    apart = slot_by_slot(V3, Rows(8, 8, 64, 23), 64, H100)
    assert 58 < apart.distinct < 64
    assert apart.rows == 64
    small = slot_by_slot(QWEN, Rows(4, 8, 32, 12), 32, H100)
    assert 12 < small.distinct < 32
    assert small.tiles(16) == round(small.distinct)


def test_slots_side_by_side_are_bound_by_the_cache_alone() -> None:
    many = slot_by_slot(GPT_OSS, Rows(8, 4, 32, 15), 32, H100)
    assert many.distinct == CACHED_SHARE * 32
    few = slot_by_slot(GPT_OSS, Rows(8, 4, 32, 28), 32, H100)
    assert few.distinct == 28


def test_repeated_slots_are_blocks_that_read_nothing() -> None:
    repeated = slot_by_slot(V3, Rows(1, 3, 3, 3), 8, H100)
    assert (repeated.distinct, repeated.rows, repeated.tiles(16)) == (3, 8, 8)
    passed_over = slot_by_slot(V3, Rows(1, 3, 3, 3), 3, H100)
    assert (passed_over.distinct, passed_over.rows, passed_over.tiles(16)) == (3, 3, 3)


@pytest.mark.parametrize("shape", [V3, QWEN, GPT_OSS])
def test_reads_are_between_the_distinct_experts_and_the_slots(shape: ExpertsShape) -> None:
    last = 0.0
    for distinct in np.linspace(1, 32, 40):
        reads = slot_by_slot(shape, Rows(4, 8, 32, float(distinct)), 32, H100).distinct
        assert max(distinct, CACHED_SHARE * 32) - 1e-9 <= reads <= 32 + 1e-9
        assert reads >= last - 1e-9
        last = reads
