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
def _uses(ids_ptr, slot, tokens, E: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr,
          SLOTS: tl.constexpr):  # fmt: skip
    """Of the expert at a slot: its id, whether the slot is its first, who uses it and where.

    Without expert blocks: a step of few tokens is looked through by every program. A token that
    names an expert twice counts once, with both weights.
    """
    r, k = tl.arange(0, BLOCK_M), tl.arange(0, SLOTS)
    number_TK = r[:, None] * K + k[None, :]
    there_TK = (r < tokens)[:, None] & (k < K)[None, :]
    ids_TK = tl.load(ids_ptr + number_TK, mask=there_TK, other=E)
    expert = tl.load(ids_ptr + slot)
    same_TK = there_TK & (ids_TK == expert)
    here_TK = tl.where(same_TK, number_TK, BLOCK_M * SLOTS * 2)
    slots_T = tl.min(here_TK, axis=1)
    is_first = (expert < E) & (tl.min(slots_T, axis=0) == slot)
    return expert, is_first, slots_T, slots_T < BLOCK_M * SLOTS * 2, same_TK, number_TK


@triton.jit(do_not_specialize=["tokens"])
def gate_up_direct(
    # pointers
    x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr, ids_ptr,
    # sizes and numbers
    tokens, limit, alpha, up_offset,
    # compile-time
    E: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LIMIT: tl.constexpr,
    ACTIVATION: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SWAP_AB: tl.constexpr, USE_TMA: tl.constexpr, FP8_TERMS: tl.constexpr,
    WIDEN: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """The first product of the expert at one slot, for all tokens of a small step."""
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()  # not before: whoever comes next relies on what was waited for
    TILES: tl.constexpr = (M + BLOCK_N - 1) // BLOCK_N
    slot, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    expert, is_first, slots_T, is_row, _same, _number = _uses(
        ids_ptr, slot, tokens, E, K, BLOCK_M, SLOTS
    )
    if is_first:
        tokens_T = tl.arange(0, BLOCK_M).to(tl.int64)
        gate_up_block(
            x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr,
            expert, tokens_T, slots_T, is_row, tokens_T, slots_T, is_row,
            tile, limit, alpha, up_offset,
            D, M, STRIDE_N, STRIDE_K, GATED, INTERLEAVED, HAS_BIAS, HAS_LIMIT, ACTIVATION,
            SCALED, BLOCK_M, 0, BLOCK_N, BLOCK_K, SWAP_AB, USE_TMA, FP8_TERMS, WIDEN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def down_direct(
    # pointers
    act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr, gates_ptr, ids_ptr, arrived_ptr,
    out_ptr,
    # sizes and numbers
    tokens,
    # compile-time
    E: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    X_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP_AB: tl.constexpr, USE_TMA: tl.constexpr, FP8_TERMS: tl.constexpr, WIDEN: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """The second product of the expert at one slot; the last at a tile adds up the tokens' slots.

    `arrived_ptr` counts, tile by tile, how many slots are done; it is zero again at the end.
    """
    TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    slot, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    expert, is_first, slots_T, is_row, same_TK, number_TK = _uses(
        ids_ptr, slot, tokens, E, K, BLOCK_M, SLOTS
    )
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    if is_first:
        gates_TK = tl.load(gates_ptr + number_TK, mask=same_TK, other=0.0).to(tl.float32)
        weight_T = tl.sum(gates_TK, axis=1)
        down_block(
            act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr,
            expert, slots_T, weight_T, is_row, slots_T, weight_T, is_row, tile,
            D, M, STRIDE_N, STRIDE_K, HAS_BIAS, SCALED, X_BLOCK, BLOCK_M, 0, BLOCK_N, BLOCK_K,
            SWAP_AB, USE_TMA, FP8_TERMS, WIDEN,
        )  # fmt: skip
    tl.debug_barrier()  # every thread's part is written before this program counts as arrived
    before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel")
    if before == tokens * K - 1:
        _add_slots(part_ptr, ids_ptr, out_ptr, tokens, tile, E, K, D, BLOCK_M, BLOCK_N)
        tl.store(arrived_ptr + tile, 0)


@triton.jit
def _add_slots(
    # pointers
    part_ptr, ids_ptr, out_ptr,
    # sizes and numbers
    tokens,
    # rows and places
    tile,
    # compile-time
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of columns of every token: its slots' results in order, a doubled expert's once."""
    r, d = tl.arange(0, BLOCK_M), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    total_TJ = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(K):
        ids_T = tl.load(ids_ptr + r * K + k, mask=r < tokens, other=E)
        used_T = ids_T < E
        for other in range(k):
            used_T = used_T & (tl.load(ids_ptr + r * K + other, mask=r < tokens, other=E) != ids_T)
        at = part_ptr + (r * K + k)[:, None] * D + d[None, :]
        inside = used_T[:, None] & (d < D)[None, :]
        total_TJ += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    inside = (r < tokens)[:, None] & (d < D)[None, :]
    at = out_ptr + r[:, None] * D + d[None, :]
    tl.store(at, total_TJ.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _slots_weights(
    # pointers
    w_ptr,
    # rows and places
    expert_K, is_used_K, d, start,
    # compile-time
    D: tl.constexpr, M: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(C,S,K) of the second product: rows `d` of each slot's, `BLOCK_K` columns from `start` on.

    Columns first: Triton spreads warps over the first axis, so that slots are added in a thread.
    """
    m = start + tl.arange(0, BLOCK_K)
    expert_1K1 = (expert_K.to(tl.int64) * (D * M))[None, :, None]
    at = w_ptr + expert_1K1 + d[:, None, None] * STRIDE_N + m[None, None, :] * STRIDE_K
    inside = is_used_K[None, :, None] & (d < D)[:, None, None] & (m < M)[None, None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def down_fused(
    # pointers
    act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, gates_ptr, ids_ptr, out_ptr,
    # sizes and numbers
    tokens,
    # compile-time
    E: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    X_BLOCK: tl.constexpr, FP8_TERMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """A tile of one token's output, all its slots: no slot's result is written or waited for.

    Without the matrix unit, which one row would leave idle. Each step's weights are asked for a
    step ahead, the first step's before the first product has ended: they need nothing from it.
    """
    token, tile = (tl.program_id(0) % tokens).to(tl.int64), tl.program_id(0) // tokens
    s, d = tl.arange(0, SLOTS), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    expert_K = tl.load(ids_ptr + token * K + s, mask=s < K, other=E)
    is_used_K = expert_K < E
    # An expert that a token names twice was computed at the first of the two.
    same_KK = expert_K[:, None] == expert_K[None, :]
    row_K = token * K + tl.min(tl.where(same_KK, s[None, :], SLOTS), axis=1)
    gate_K = tl.load(gates_ptr + token * K + s, mask=is_used_K, other=0.0).to(tl.float32)
    weights = _slots_weights(w_ptr, expert_K, is_used_K, d, 0, D, M, STRIDE_N, STRIDE_K, BLOCK_K)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc_JI = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, M, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        inside_KI = is_used_K[:, None] & (m < M)[None, :]
        x_at = act_ptr + row_K[:, None] * (FP8_TERMS * M) + m[None, :]
        x_KI = tl.load(x_at, mask=inside_KI, other=0.0).to(tl.float32)
        if FP8_TERMS == 2:
            rest_KI = tl.load(x_at + M, mask=inside_KI, other=0.0)
            x_KI += rest_KI.to(tl.float32) * (1.0 / REST)
        x_KI *= gate_K[:, None]
        if SCALED:
            TILES: tl.constexpr = (M + X_BLOCK - 1) // X_BLOCK
            BLOCKS: tl.constexpr = (M + 127) // 128
            own = expert_K.to(tl.int64) * ((D + 127) // 128) + tile * BLOCK_N // 128
            at = act_scale_ptr + row_K[:, None] * TILES + (m // X_BLOCK)[None, :]
            x_KI *= tl.load(at, mask=inside_KI, other=0.0)
            at = scale_ptr + (own * BLOCKS)[:, None] + (m // 128)[None, :]
            x_KI *= tl.load(at, mask=inside_KI, other=0.0)
        ahead = _slots_weights(
            w_ptr, expert_K, is_used_K, d, start + BLOCK_K, D, M, STRIDE_N, STRIDE_K, BLOCK_K
        )
        acc_JI += tl.sum(weights.to(tl.float32) * x_KI[None, :, :], axis=1)
        weights = ahead
    total_J = tl.sum(acc_JI, axis=1)
    if HAS_BIAS:
        at = bias_ptr + (expert_K.to(tl.int64) * D)[:, None] + d[None, :]
        bias_KJ = tl.load(at, mask=is_used_K[:, None] & (d < D)[None, :], other=0.0)
        total_J += tl.sum(bias_KJ.to(tl.float32) * gate_K[:, None], axis=0)
    tl.store(out_ptr + token * D + d, total_J.to(out_ptr.dtype.element_ty), mask=d < D)
