"""experts_gpu against the definition, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels import ExpertWeights, Gate, experts_reference
from leanmoe.kernels.weights import ACTIVATIONS
from tests.kernels.layers import random_call, random_layer, slot_by_slot

pytest.importorskip("triton")

from leanmoe.kernels.triton.config import ExpertsConfig, Tile
from leanmoe.kernels.triton.expert_blocks import expert_blocks_reference
from leanmoe.kernels.triton.experts import (
    experts_gpu,
    experts_gpu_unsupported,
    silu_of_kept,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8_ROUNDING = 1e-2 if DEVICE == "cuda" else 2e-3
"""Hopper's fp8 products keep fewer bits of their sums (DeepSeek-V3 report, section 3.3.2)."""
TENSORS = ("gate_up", "down", "gate_up_bias", "down_bias", "gate_up_scale", "down_scale")
LEFT, RIGHT = Tile(16, 32, 4, 2), Tile(32, 16, 4, 2, 2, swap_ab=False)
COPIED, COPIED_RIGHT = replace(LEFT, use_tma=True), replace(RIGHT, use_tma=True)
WAYS = {
    "direct": ExpertsConfig(16, 0, True, LEFT, RIGHT),
    "fused sum": ExpertsConfig(16, 0, True, LEFT, Tile(8, 16), fused_sum=True),
    "direct, weights on the right": ExpertsConfig(16, 0, True, RIGHT, LEFT),
    "grouped": ExpertsConfig(16, 0, False, RIGHT, LEFT),
    "grouped with a tail": ExpertsConfig(16, 16, False, LEFT, RIGHT),
    "grouped with a long tail": ExpertsConfig(16, 32, False, RIGHT, LEFT),
    "grouped in subblocks": ExpertsConfig(16, 0, False, RIGHT, LEFT, subblocks=2),
    "grouped in subblocks with a long tail": ExpertsConfig(16, 32, False, LEFT, RIGHT, subblocks=2),
    "grouped in three subblocks": ExpertsConfig(16, 16, False, RIGHT, RIGHT, subblocks=3),
    "direct, by TMA": ExpertsConfig(16, 0, True, COPIED, COPIED),
    "grouped with a tail, by TMA": ExpertsConfig(16, 16, False, COPIED_RIGHT, COPIED),
    "grouped in subblocks, by TMA": ExpertsConfig(16, 16, False, COPIED, COPIED_RIGHT, subblocks=2),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "concatenated": {},
    "transposed": {"transposed": True},
    "gpt-oss": {
        "transposed": True,
        "concatenated": False,
        "biased": True,
        "gate": Gate.gpt_oss(limit=1.0),
    },
    "interleaved": {"concatenated": False},
    "without a gate": {"gated": False, "gate": Gate("relu2")},
}


def on_device(weights: ExpertWeights) -> ExpertWeights:
    tensors = {name: getattr(weights, name) for name in TENSORS}
    moved: dict[str, Any] = {k: None if t is None else t.to(DEVICE) for k, t in tensors.items()}
    return replace(weights, **moved)


def run(
    call: tuple[Tensor, Tensor, Tensor], weights: ExpertWeights, config: ExpertsConfig
) -> Tensor:
    hidden, ids, gates = (t.to(DEVICE) for t in call)
    return experts_gpu(hidden, ids, gates, on_device(weights), config=config).cpu()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_every_way(layout: str, way: str) -> None:
    weights = random_layer(**LAYOUTS[layout])
    call = random_call(weights, 13, 3)
    assert error(run(call, weights, WAYS[way]), slot_by_slot(*call, weights)) < 1e-5


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(activation: Any) -> None:
    weights = random_layer(gate=Gate(activation))
    call = random_call(weights, 3, 2)
    assert error(run(call, weights, WAYS["direct"]), slot_by_slot(*call, weights)) < 1e-5


@given(st.integers(1, 40), st.integers(1, 4), st.sampled_from((0.0, 0.5, 1.0)), st.integers(0, 99))
@settings(deadline=None, max_examples=12)
def test_ragged_calls(tokens: int, slots: int, skipped: float, seed: int) -> None:
    weights = random_layer(experts=9, hidden=24, width=20, seed=seed)
    call = random_call(weights, tokens, slots, seed, skipped)
    wanted = slot_by_slot(*call, weights)
    for way, config in WAYS.items():
        if not config.is_direct or tokens <= config.BLOCK_M:
            torch.testing.assert_close(
                run(call, weights, config).double(), wanted, atol=1e-5, rtol=1e-4, msg=way
            )


@pytest.mark.parametrize("way", WAYS)
def test_all_tokens_on_one_expert(way: str) -> None:
    weights = random_layer()
    hidden, ids, gates = random_call(weights, 16, 2)
    ids[:, 0], ids[:, 1] = 4, weights.experts
    wanted = slot_by_slot(hidden, ids, gates, weights)
    assert error(run((hidden, ids, gates), weights, WAYS[way]), wanted) < 1e-5


@pytest.mark.parametrize("rows", [*range(1, 6), 15, 16, 17, 24, *range(31, 35), 40, 47, 48, 49, 64])
def test_blocks_of_every_length(rows: int) -> None:
    """At each edge of a block, a piece and a tail; beside it an expert with a row or two."""
    weights = random_layer(experts=3, hidden=24, width=20)
    hidden, ids, gates = random_call(weights, rows, 1)
    ids[:] = 1
    ids[:2] = 2
    wanted = slot_by_slot(hidden, ids, gates, weights)
    for way, config in WAYS.items():
        if not config.is_direct:
            found = run((hidden, ids, gates), weights, config)
            torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4, msg=way)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_skipped_leaks_nothing(way: str) -> None:
    """0 x NaN is NaN: a skipped slot, a sleeping expert and another token's row are never read."""
    weights = random_layer()
    hidden, ids, gates = random_call(weights, 6, 3, skipped=0.5)
    ids[ids == 2] = weights.experts
    ids[5] = weights.experts
    wanted = slot_by_slot(hidden, ids, gates, weights)
    hidden[5] = float("nan")
    gates[ids == weights.experts] = float("nan")
    weights.gate_up[2], weights.down[2] = float("nan"), float("inf")
    found = run((hidden, ids, gates), weights, WAYS[way])
    assert bool((found[5] == 0).all())
    assert error(found, wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_half_precision(way: str, dtype: torch.dtype) -> None:
    weights = random_layer(dtype=dtype)
    hidden, ids, gates = random_call(weights, 9, 3)
    call = (hidden.to(dtype), ids, gates)
    assert error(run(call, weights, WAYS[way]), slot_by_slot(*call, weights)) < 1e-2


def fp8_layer(experts: int, hidden: int, width: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        values = torch.randn(experts, rows, columns, generator=generator)
        scales = torch.rand(experts, -(-rows // 128), -(-columns // 128), generator=generator)
        return values.to(torch.float8_e4m3fn), scales / columns**0.5

    (up, up_scale), (down, down_scale) = draw(2 * width, hidden), draw(hidden, width)
    return ExpertWeights(up, down, gate_up_scale=up_scale, down_scale=down_scale)


def rounded(values: Tensor, block: int) -> Tensor:
    """As fp8 with a scale for every `block` columns of a row leaves them; float64."""
    parts = values.double().split(block, dim=-1)
    scales = [part.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / 448.0 for part in parts]
    coded = [(p / s).float().to(torch.float8_e4m3fn) for p, s in zip(parts, scales, strict=True)]
    return torch.cat([c.double() * s for c, s in zip(coded, scales, strict=True)], dim=-1)


def fp8_reference(
    call: tuple[Tensor, Tensor, Tensor], weights: ExpertWeights, block: int | None
) -> Tensor:
    """The definition with activations made fp8 where the kernel makes them so.

    What lies between the products, with a scale for every `block` columns, or not at all.
    """
    hidden, ids, gates = call
    scales = (weights.gate_up_scale, weights.down_scale)
    up, down = (
        w.double() * spread(s, w.shape)
        for w, s in zip((weights.gate_up, weights.down), scales, strict=True)
    )
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, row in enumerate(rounded(hidden, 128)):
        for expert, gate in zip(ids[token].tolist(), gates[token].tolist(), strict=True):
            if expert < weights.experts:
                act = weights.activated((up[expert] @ row)[None])
                coded = act if block is None else rounded(act, block)
                out[token] += gate * (down[expert] @ coded[0])
    return out


def spread(scale: Tensor | None, shape: torch.Size) -> Tensor:
    assert scale is not None
    whole = scale.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
    return whole[:, : shape[1], : shape[2]]


WIDE, DEEP, DEEP_RIGHT = Tile(64, 64, 4, 2), replace(LEFT, BLOCK_K=64), replace(RIGHT, BLOCK_K=32)
WAYS_FP8 = {
    "direct": ExpertsConfig(16, 0, True, WIDE, DEEP),
    "fused sum": ExpertsConfig(16, 0, True, WIDE, Tile(16, 64), fused_sum=True),
    "grouped": ExpertsConfig(16, 0, False, replace(WIDE, swap_ab=False), DEEP_RIGHT),
    "grouped with a long tail, by TMA": ExpertsConfig(
        16, 32, False, replace(WIDE, use_tma=True), replace(DEEP, use_tma=True)
    ),
    "by TMA, weights on the right": ExpertsConfig(
        16,
        16,
        False,
        replace(WIDE, swap_ab=False, use_tma=True),
        replace(DEEP_RIGHT, use_tma=True),
    ),
}


WAYS_TWO_TERMS = {
    "direct": ExpertsConfig(16, 0, True, WIDE, DEEP, fp8_terms=2),
    "direct, by TMA": ExpertsConfig(
        16, 0, True, replace(WIDE, use_tma=True), replace(DEEP, use_tma=True), fp8_terms=2
    ),
    "fused sum": ExpertsConfig(16, 0, True, WIDE, Tile(16, 64), fused_sum=True, fp8_terms=2),
    "grouped": ExpertsConfig(16, 0, False, WIDE, DEEP, fp8_terms=2),
    "grouped in long blocks": ExpertsConfig(32, 0, False, WIDE, DEEP, fp8_terms=2),
}


@pytest.mark.parametrize("way", [name for name in WAYS_FP8 if not WAYS_FP8[name].is_direct])
def test_what_lies_between_fp8_products_may_stay_float16(way: str) -> None:
    weights = fp8_layer(3, 208, 144)
    hidden, ids, gates = random_call(weights, 13, 2)
    call = (hidden.half(), ids, gates)
    found = run(call, weights, replace(WAYS_FP8[way], float16_act=True))
    assert error(found, fp8_reference(call, weights, None)) < FP8_ROUNDING


@pytest.mark.parametrize("way", WAYS_TWO_TERMS)
def test_fp8_activations_of_two_terms_are_as_exact_as_bfloat16(way: str) -> None:
    config = WAYS_TWO_TERMS[way]
    weights = fp8_layer(3, 208, 144)
    hidden, ids, gates = random_call(weights, 13, 2)
    found = run((hidden.half(), ids, gates), weights, config)
    assert error(found, experts_reference(hidden.half().double(), ids, gates, weights)) < 5e-3


@pytest.mark.parametrize("way", WAYS_FP8)
def test_fp8_with_a_scale_for_each_block(way: str) -> None:
    weights = fp8_layer(3, 208, 144)  # ends in the middle of a block
    hidden, ids, gates = random_call(weights, 13, 2)
    call = (hidden.half(), ids, gates)
    found = run(call, weights, WAYS_FP8[way])
    assert error(found, fp8_reference(call, weights, 64)) < FP8_ROUNDING
    whole = experts_reference(hidden.double(), ids, gates, weights)
    assert error(found, whole) < 4e-2


def test_fp8_config_must_fit_its_scales() -> None:
    weights = fp8_layer(2, 128, 128)
    call = random_call(weights, 3, 1)
    config = ExpertsConfig(16, 0, False, Tile(32, 32, 4, 2), Tile(32, 64, 4, 2))
    with pytest.raises(LeanMoeError, match="no more than the first's 32 columns"):
        run(call, weights, config)
    two = WAYS_TWO_TERMS["grouped"]
    for odd in ({"TAIL_M": 16}, {"gate_up": replace(WIDE, swap_ab=False)}, {"fp8_terms": 3}):
        with pytest.raises(LeanMoeError, match="must be 1, or 2 with TAIL_M 0 and swap_ab true"):
            replace(two, **odd)
    with pytest.raises(LeanMoeError, match="fp8_terms 2 for weights that are not fp8"):
        run(random_call(random_layer(), 3, 1), random_layer(), two)
    for many in (two, WAYS_FP8["direct"]):
        with pytest.raises(LeanMoeError, match="float16_act true: it must be false where"):
            replace(many, float16_act=True)
    between = replace(WAYS["grouped"], float16_act=True)
    with pytest.raises(LeanMoeError, match="float16_act true for weights that are not fp8"):
        run(random_call(random_layer(), 3, 1), random_layer(), between)
    with pytest.raises(LeanMoeError, match="fp8 has subblocks 2: it must be 1"):
        run(call, weights, replace(WAYS_FP8["grouped"], subblocks=2))
    shallow = ExpertsConfig(16, 0, False, Tile(32, 16, 4, 2), Tile(32, 32, 4, 2))
    with pytest.raises(LeanMoeError, match="reads 16 columns a step"):
        run(call, weights, shallow)


@pytest.mark.parametrize("tokens", [3, 20, 600])
def test_a_guess_is_exact_enough_for_fp8(tokens: int) -> None:
    weights = fp8_layer(2, 128, 128)
    hidden, ids, gates = random_call(weights, tokens, 1)
    there = on_device(weights)
    found = experts_gpu(hidden.to(DEVICE), ids.to(DEVICE), gates.to(DEVICE), there).cpu()
    assert error(found, experts_reference(hidden.double(), ids, gates, weights)) < 4e-2


def test_the_same_bits_every_time() -> None:
    weights = random_layer()
    call = random_call(weights, 16, 3)
    for config in WAYS.values():
        first = run(call, weights, config)
        assert all(torch.equal(first, run(call, weights, config)) for _ in range(2))


def test_expert_blocks_made_before_are_used() -> None:
    layer = random_layer()
    weights, call = on_device(layer), random_call(layer, 20, 3)
    hidden, ids, gates = (t.to(DEVICE) for t in call)
    config = WAYS["grouped"]
    blocks = expert_blocks_reference(ids, weights.experts, config.block_rows)
    found = experts_gpu(hidden, ids, gates, weights, config=config, blocks=blocks)
    assert error(found.cpu(), slot_by_slot(*call, layer)) < 1e-5
    with pytest.raises(LeanMoeError, match="expert blocks have 16 rows: the config wants 32"):
        experts_gpu(hidden, ids, gates, weights, config=WAYS["grouped with a tail"], blocks=blocks)


def test_subblocks_must_fit() -> None:
    with pytest.raises(LeanMoeError, match="subblocks 0: it must be 1 or more"):
        replace(WAYS["grouped"], subblocks=0)
    for odd in (WAYS["direct"], WAYS_TWO_TERMS["grouped"]):
        with pytest.raises(LeanMoeError, match="1 where is_direct is true or fp8_terms is 2"):
            replace(odd, subblocks=2)


def test_no_tokens() -> None:
    weights = random_layer()
    call = random_call(weights, 0, 3)
    assert run(call, weights, WAYS["grouped"]).shape == (0, weights.hidden)


def test_says_what_it_cannot_do() -> None:
    weights = random_layer()
    assert experts_gpu_unsupported(replace(weights, gate=lambda x: x)) is not None
    assert experts_gpu_unsupported(replace(weights, after=lambda x: x)) is not None
    hidden, ids, gates = random_call(weights, 20, 3)
    with pytest.raises(LeanMoeError, match="rows must be at least the tokens"):
        run((hidden, ids, gates), weights, WAYS["direct"])
    with pytest.raises(LeanMoeError, match="must be of one dtype"):
        run((hidden.half(), ids, gates), weights, WAYS["grouped"])


@pytest.mark.parametrize("way", WAYS)
def test_a_place_for_the_result_is_filled(way: str) -> None:
    layer = on_device(random_layer())
    hidden, ids, gates = (x.to(layer.gate_up.device) for x in random_call(layer, 5, 3))
    place = torch.full_like(hidden, float("nan"))
    found = experts_gpu(hidden, ids, gates, layer, config=WAYS[way], out=place)
    assert found is place
    assert torch.equal(place, experts_gpu(hidden, ids, gates, layer, config=WAYS[way]))
    for wrong in (place[:4], place.double(), place.T.contiguous().T):
        with pytest.raises(LeanMoeError, match="place for the result"):
            experts_gpu(hidden, ids, gates, layer, out=wrong)


@pytest.mark.parametrize("local_of_E", [None, torch.tensor([-1, 0, 1, -1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_rows_are_activated_and_the_others_neither_read_nor_written(
    dtype: torch.dtype, local_of_E: Tensor | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.tensor([[2, -1, 1], [-1, -1, -1], [0, 3, 2]], dtype=torch.int32)
    gate_up_XM = torch.randn(9, 24, generator=generator).mul(4).to(dtype)
    local_TK = ids_TK if local_of_E is None else local_of_E[ids_TK.clamp_min(0).long()]
    is_kept_X = ((ids_TK >= 0) & (local_TK >= 0)).view(-1)
    gate_up_XM[~is_kept_X] = float("nan")
    act_XM = torch.full((9, 12), -7.0, dtype=dtype, device=DEVICE)
    where = None if local_of_E is None else local_of_E.to(DEVICE)
    silu_of_kept(gate_up_XM.to(DEVICE), act_XM, ids_TK.to(DEVICE), where)
    gate, up = gate_up_XM.chunk(2, dim=1)
    torch.testing.assert_close(
        act_XM.cpu()[is_kept_X], functional.silu(gate.float()).to(dtype)[is_kept_X] * up[is_kept_X]
    )
    assert bool((act_XM[~is_kept_X.to(DEVICE)] == -7.0).all())
