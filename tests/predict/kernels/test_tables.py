"""Measured tables: their pattern of rows, their layers, and predictions beside them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmoe.predict.constants import shipped
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.kernels.tables import (
    TABLES,
    VERSION,
    balanced_counts,
    installed,
    measured_curve,
    read_table,
)


@given(
    st.integers(1, 600),
    st.sampled_from([(64, 6), (128, 8), (256, 8), (512, 10)]),
    st.sampled_from([1, 2, 8]),
)
@settings(max_examples=40, deadline=None)
def test_the_tables_pattern_expert_by_expert(
    tokens: int, sizes: tuple[int, int], ranks: int
) -> None:
    experts, k = sizes
    stride = math.ceil(experts / k)
    count: dict[int, int] = {}
    for token in range(tokens):
        place = token if tokens >= stride else token * stride / tokens
        for slot in range(k):
            expert = int((place + slot * stride) % experts)
            count[expert] = count.get(expert, 0) + 1
    mine = [count[e] for e in sorted(count) if e < experts // ranks]
    assert balanced_counts(tokens, experts, k, ranks) == tuple(mine)


def test_a_grouped_router_halves_the_active_experts_and_keeps_the_rows() -> None:
    plain = balanced_counts(256, 256, 8, 1)
    grouped = balanced_counts(256, 256, 8, 1, grouped=True)
    assert (len(plain), len(grouped)) == (256, 128)
    assert sum(plain) == sum(grouped) == 256 * 8


H200 = GPUS["h200"]


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
