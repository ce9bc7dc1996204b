"""The experts of a small step, straight from the ids: two launches and no grouping.

Letters: T tokens (all of the step, padded), K slots a token, E experts, D hidden width, M expert
width, J columns of one tile of a product, I columns it is summed over.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from leanmoe.kernels.triton.fp8_program import REST
from leanmoe.kernels.triton.tile_program import down_block, gate_up_block


@triton.jit
def _uses(ids_ptr, slot, tokens, fixed: tl.constexpr):
    """Of the expert at a slot: its id, whether the slot is its first, who uses it and where.

    Without expert blocks: a step of few tokens is looked through by every program. A token that
    names an expert twice counts once, with both weights.
    """
    NOWHERE: tl.constexpr = fixed.BLOCK_M * fixed.SLOTS * 2
    r, k = tl.arange(0, fixed.BLOCK_M), tl.arange(0, fixed.SLOTS)
    number_TK = r[:, None] * fixed.K + k[None, :]
    there_TK = (r < tokens)[:, None] & (k < fixed.K)[None, :]
    ids_TK = tl.load(ids_ptr + number_TK, mask=there_TK, other=fixed.E)
    expert = tl.load(ids_ptr + slot)
    same_TK = there_TK & (ids_TK == expert)
    here_TK = tl.where(same_TK, number_TK, NOWHERE)
    slots_T = tl.min(here_TK, axis=1)
    is_first = (expert < fixed.E) & (tl.min(slots_T, axis=0) == slot)
    return expert, is_first, slots_T, slots_T < NOWHERE, same_TK, number_TK


@triton.jit(do_not_specialize=["tokens"])
def gate_up_direct(
    # pointers
    x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr, ids_ptr,
    # sizes and numbers
    tokens, limit, alpha, up_offset,
    # compile-time
    fixed: tl.constexpr,
):  # fmt: skip
    """The first product of the expert at one slot, for all tokens of a small step."""
    if fixed.USE_PDL:
        gdc_wait()
        gdc_launch_dependents()  # not before: whoever comes next relies on what was waited for
    TILES: tl.constexpr = (fixed.M + fixed.BLOCK_N - 1) // fixed.BLOCK_N
    slot, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    expert, is_first, slots_T, is_row, _same, _number = _uses(ids_ptr, slot, tokens, fixed)
    if is_first:
        tokens_T = tl.arange(0, fixed.BLOCK_M).to(tl.int64)
        gate_up_block(
            x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr,
            expert, tokens_T, slots_T, is_row, tokens_T, slots_T, is_row,
            tile, limit, alpha, up_offset, fixed, 0,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def down_direct(
    # pointers
    act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr, gates_ptr, ids_ptr, arrived_ptr,
    out_ptr,
    # sizes and numbers
    tokens,
    # compile-time
    fixed: tl.constexpr,
):  # fmt: skip
    """The second product of the expert at one slot; the last at a tile adds up the tokens' slots.

    `arrived_ptr` counts, tile by tile, how many slots are done; it is zero again at the end.
    """
    TILES: tl.constexpr = (fixed.D + fixed.BLOCK_N - 1) // fixed.BLOCK_N
    slot, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    expert, is_first, slots_T, is_row, same_TK, number_TK = _uses(ids_ptr, slot, tokens, fixed)
    if fixed.USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    if is_first:
        gates_TK = tl.load(gates_ptr + number_TK, mask=same_TK, other=0.0).to(tl.float32)
        weight_T = tl.sum(gates_TK, axis=1)
        down_block(
            act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr,
            expert, slots_T, weight_T, is_row, slots_T, weight_T, is_row, tile, fixed, 0,
        )  # fmt: skip
    tl.debug_barrier()  # every thread's part is written before this program counts as arrived
    before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel")
    if before == tokens * fixed.K - 1:
        _add_slots(part_ptr, ids_ptr, out_ptr, tokens, tile, fixed)
        tl.store(arrived_ptr + tile, 0)


@triton.jit
def _add_slots(
    # pointers
    part_ptr, ids_ptr, out_ptr,
    # sizes and places
    tokens, tile,
    # compile-time
    fixed: tl.constexpr,
):  # fmt: skip
    """A tile of columns of every token: its slots' results in order, a doubled expert's once."""
    r, d = tl.arange(0, fixed.BLOCK_M), tile * fixed.BLOCK_N + tl.arange(0, fixed.BLOCK_N)
    total_TJ = tl.zeros((fixed.BLOCK_M, fixed.BLOCK_N), dtype=tl.float32)
    for k in range(fixed.K):
        ids_T = tl.load(ids_ptr + r * fixed.K + k, mask=r < tokens, other=fixed.E)
        used_T = ids_T < fixed.E
        for other in range(k):
            others_T = tl.load(ids_ptr + r * fixed.K + other, mask=r < tokens, other=fixed.E)
            used_T = used_T & (others_T != ids_T)
        at = part_ptr + (r * fixed.K + k)[:, None] * fixed.D + d[None, :]
        inside = used_T[:, None] & (d < fixed.D)[None, :]
        total_TJ += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    inside = (r < tokens)[:, None] & (d < fixed.D)[None, :]
    at = out_ptr + r[:, None] * fixed.D + d[None, :]
    tl.store(at, total_TJ.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _slots_weights(
    # pointers
    w_ptr,
    # rows and places
    expert_K, is_used_K, d, start,
    # compile-time
    fixed: tl.constexpr,
):  # fmt: skip
    """(C,S,K) of the second product: rows `d` of each slot's, `BLOCK_K` columns from `start` on.

    Columns first: Triton spreads warps over the first axis, so that slots are added in a thread.
    """
    m = start + tl.arange(0, fixed.BLOCK_K)
    expert_1K1 = (expert_K.to(tl.int64) * (fixed.D * fixed.M))[None, :, None]
    at = w_ptr + expert_1K1 + d[:, None, None] * fixed.STRIDE_N + m[None, None, :] * fixed.STRIDE_K
    is_column = (d < fixed.D)[:, None, None]
    inside = is_used_K[None, :, None] & is_column & (m < fixed.M)[None, None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def down_fused(
    # pointers
    act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, gates_ptr, ids_ptr, out_ptr,
    # sizes and numbers
    tokens,
    # compile-time
    fixed: tl.constexpr,
):  # fmt: skip
    """A tile of one token's output, all its slots: no slot's result is written or waited for.

    Without the matrix unit, which one row would leave idle. Each step's weights are asked for a
    step ahead, the first step's before the first product has ended: they need nothing from it.
    """
    token, tile = (tl.program_id(0) % tokens).to(tl.int64), tl.program_id(0) // tokens
    s, d = tl.arange(0, fixed.SLOTS), tile * fixed.BLOCK_N + tl.arange(0, fixed.BLOCK_N)
    expert_K = tl.load(ids_ptr + token * fixed.K + s, mask=s < fixed.K, other=fixed.E)
    is_used_K = expert_K < fixed.E
    # An expert that a token names twice was computed at the first of the two.
    same_KK = expert_K[:, None] == expert_K[None, :]
    row_K = token * fixed.K + tl.min(tl.where(same_KK, s[None, :], fixed.SLOTS), axis=1)
    gate_K = tl.load(gates_ptr + token * fixed.K + s, mask=is_used_K, other=0.0).to(tl.float32)
    weights = _slots_weights(w_ptr, expert_K, is_used_K, d, 0, fixed)
    if fixed.USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc_JI = tl.zeros((fixed.BLOCK_N, fixed.BLOCK_K), dtype=tl.float32)
    for start in range(0, fixed.M, fixed.BLOCK_K):
        m = start + tl.arange(0, fixed.BLOCK_K)
        inside_KI = is_used_K[:, None] & (m < fixed.M)[None, :]
        x_at = act_ptr + row_K[:, None] * (fixed.FP8_TERMS * fixed.M) + m[None, :]
        x_KI = tl.load(x_at, mask=inside_KI, other=0.0).to(tl.float32)
        if fixed.FP8_TERMS == 2:
            rest_KI = tl.load(x_at + fixed.M, mask=inside_KI, other=0.0)
            x_KI += rest_KI.to(tl.float32) * (1.0 / REST)
        x_KI *= gate_K[:, None]
        if fixed.SCALED:
            TILES: tl.constexpr = (fixed.M + fixed.X_BLOCK - 1) // fixed.X_BLOCK
            BLOCKS: tl.constexpr = (fixed.M + 127) // 128
            own = expert_K.to(tl.int64) * ((fixed.D + 127) // 128) + tile * fixed.BLOCK_N // 128
            at = act_scale_ptr + row_K[:, None] * TILES + (m // fixed.X_BLOCK)[None, :]
            x_KI *= tl.load(at, mask=inside_KI, other=0.0)
            at = scale_ptr + (own * BLOCKS)[:, None] + (m // 128)[None, :]
            x_KI *= tl.load(at, mask=inside_KI, other=0.0)
        ahead = _slots_weights(w_ptr, expert_K, is_used_K, d, start + fixed.BLOCK_K, fixed)
        acc_JI += tl.sum(weights.to(tl.float32) * x_KI[None, :, :], axis=1)
        weights = ahead
    total_J = tl.sum(acc_JI, axis=1)
    if fixed.HAS_BIAS:
        at = bias_ptr + (expert_K.to(tl.int64) * fixed.D)[:, None] + d[None, :]
        bias_KJ = tl.load(at, mask=is_used_K[:, None] & (d < fixed.D)[None, :], other=0.0)
        total_J += tl.sum(bias_KJ.to(tl.float32) * gate_K[:, None], axis=0)
    tl.store(out_ptr + token * fixed.D + d, total_J.to(out_ptr.dtype.element_ty), mask=d < fixed.D)
