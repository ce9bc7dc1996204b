"""The experts of a small step, straight from the ids: two launches and no work list.

Letters: T tokens, K slots a token, N = T*K slots, E experts, D hidden width, M expert width,
R rows (all tokens of the step), C columns of one tile.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from leanmoe.kernels.triton.tile_program import REST, down_block, gate_up_block


@triton.jit
def _uses(ids_ptr, slot, tokens, E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
          SLOTS: tl.constexpr):  # fmt: skip
    """Of the expert at a slot: its id, whether the slot is its first, who uses it and where.

    Without a work list: a step of few tokens is looked through by every program. A token that
    names an expert twice counts once, with both weights.
    """
    r, k = tl.arange(0, ROWS), tl.arange(0, SLOTS)
    number_RK = r[:, None] * K + k[None, :]
    there_RK = (r < tokens)[:, None] & (k < K)[None, :]
    ids_RK = tl.load(ids_ptr + number_RK, mask=there_RK, other=E)
    expert = tl.load(ids_ptr + slot)
    same_RK = there_RK & (ids_RK == expert)
    here_RK = tl.where(same_RK, number_RK, ROWS * SLOTS * 2)
    slots_R = tl.min(here_RK, axis=1)
    is_first = (expert < E) & (tl.min(slots_R, axis=0) == slot)
    return expert, is_first, slots_R, slots_R < ROWS * SLOTS * 2, same_RK, number_RK


@triton.jit(do_not_specialize=["tokens"])
def gate_up_direct(
    x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr, ids_ptr,
    tokens, limit, alpha, up_offset,
    E: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    STRIDE_C: tl.constexpr, STRIDE_K: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LIMIT: tl.constexpr,
    ACTIVATION: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    DESCRIBED: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first product of the expert at one slot, for all tokens of a small step."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # not before: whoever comes next relies on what was waited for
    TILES: tl.constexpr = (M + BLOCK_C - 1) // BLOCK_C
    slot, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    expert, is_first, slots_R, is_row, _same, _number = _uses(
        ids_ptr, slot, tokens, E, K, ROWS, SLOTS
    )
    if is_first:
        tokens_R = tl.arange(0, ROWS).to(tl.int64)
        gate_up_block(
            x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr,
            expert, tokens_R, slots_R, is_row, tokens_R, slots_R, is_row,
            tile, limit, alpha, up_offset,
            D, M, STRIDE_C, STRIDE_K, GATED, INTERLEAVED, HAS_BIAS, HAS_LIMIT, ACTIVATION,
            SCALED, ROWS, 0, BLOCK_C, BLOCK_K, SWAP, DESCRIBED, PARTS, WIDEN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def down_direct(
    act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr, gates_ptr,
    ids_ptr, arrived_ptr, out_ptr, tokens,
    E: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    STRIDE_C: tl.constexpr, STRIDE_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr, X_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, DESCRIBED: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The second product of the expert at one slot; the last at a tile adds up the tokens' slots.

    `arrived_ptr` counts, tile by tile, how many slots are done; it is zero again at the end.
    """
    TILES: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    slot, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    expert, is_first, slots_R, is_row, same_RK, number_RK = _uses(
        ids_ptr, slot, tokens, E, K, ROWS, SLOTS
    )
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if is_first:
        gates_RK = tl.load(gates_ptr + number_RK, mask=same_RK, other=0.0).to(tl.float32)
        weight_R = tl.sum(gates_RK, axis=1)
        down_block(
            act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr,
            expert, slots_R, weight_R, is_row, slots_R, weight_R, is_row, tile,
            D, M, STRIDE_C, STRIDE_K, HAS_BIAS, SCALED, X_BLOCK, ROWS, 0, BLOCK_C, BLOCK_K, SWAP,
            DESCRIBED, PARTS, WIDEN,
        )  # fmt: skip
    tl.debug_barrier()  # every thread's part is written before this program counts as arrived
    before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel")
    if before == tokens * K - 1:
        _add_slots(part_ptr, ids_ptr, out_ptr, tokens, tile, E, K, D, ROWS, BLOCK_C)
        tl.store(arrived_ptr + tile, 0)


@triton.jit
def _add_slots(
    part_ptr, ids_ptr, out_ptr, tokens, tile,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of columns of every token: its slots' parts in order, a doubled expert's once."""
    r, d = tl.arange(0, ROWS), tile * BLOCK_C + tl.arange(0, BLOCK_C)
    total_RC = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    for k in range(K):
        ids_R = tl.load(ids_ptr + r * K + k, mask=r < tokens, other=E)
        used_R = ids_R < E
        for other in range(k):
            used_R = used_R & (tl.load(ids_ptr + r * K + other, mask=r < tokens, other=E) != ids_R)
        at = part_ptr + (r * K + k)[:, None] * D + d[None, :]
        inside = used_R[:, None] & (d < D)[None, :]
        total_RC += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    inside = (r < tokens)[:, None] & (d < D)[None, :]
    at = out_ptr + r[:, None] * D + d[None, :]
    tl.store(at, total_RC.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _slots_weights(
    w_ptr, expert_S, is_used_S, d, start, D: tl.constexpr, M: tl.constexpr,
    STRIDE_C: tl.constexpr, STRIDE_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(C,S,K) of the second product: rows `d` of each slot's, `BLOCK_K` columns from `start` on.

    Columns first: Triton spreads warps over the first axis, so that slots are added in a thread.
    """
    m = start + tl.arange(0, BLOCK_K)
    expert_1S1 = (expert_S.to(tl.int64) * (D * M))[None, :, None]
    at = w_ptr + expert_1S1 + d[:, None, None] * STRIDE_C + m[None, None, :] * STRIDE_K
    inside = is_used_S[None, :, None] & (d < D)[:, None, None] & (m < M)[None, None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def down_joined(
    act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, gates_ptr, ids_ptr, out_ptr, tokens,
    E: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    STRIDE_C: tl.constexpr, STRIDE_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr, X_BLOCK: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of one token's output, all its slots: no parts to write, no other program to await.

    Without the matrix unit, which one row would leave idle. Each step's weights are asked for a
    step ahead, the first step's before the first product has ended: they need nothing from it.
    """
    token, tile = (tl.program_id(0) % tokens).to(tl.int64), tl.program_id(0) // tokens
    s, d = tl.arange(0, SLOTS), tile * BLOCK_C + tl.arange(0, BLOCK_C)
    expert_S = tl.load(ids_ptr + token * K + s, mask=s < K, other=E)
    is_used_S = expert_S < E
    # An expert that a token names twice was computed at the first of the two.
    same_SS = expert_S[:, None] == expert_S[None, :]
    row_S = token * K + tl.min(tl.where(same_SS, s[None, :], SLOTS), axis=1)
    gate_S = tl.load(gates_ptr + token * K + s, mask=is_used_S, other=0.0).to(tl.float32)
    weights = _slots_weights(w_ptr, expert_S, is_used_S, d, 0, D, M, STRIDE_C, STRIDE_K, BLOCK_K)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc_CK = tl.zeros((BLOCK_C, BLOCK_K), dtype=tl.float32)
    for start in range(0, M, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        inside_SK = is_used_S[:, None] & (m < M)[None, :]
        x_at = act_ptr + row_S[:, None] * (PARTS * M) + m[None, :]
        x_SK = tl.load(x_at, mask=inside_SK, other=0.0).to(tl.float32)
        if PARTS == 2:
            rest_SK = tl.load(x_at + M, mask=inside_SK, other=0.0)
            x_SK += rest_SK.to(tl.float32) * (1.0 / REST)
        x_SK *= gate_S[:, None]
        if SCALED:
            TILES: tl.constexpr = (M + X_BLOCK - 1) // X_BLOCK
            BLOCKS: tl.constexpr = (M + 127) // 128
            own = expert_S.to(tl.int64) * ((D + 127) // 128) + tile * BLOCK_C // 128
            at = act_scale_ptr + row_S[:, None] * TILES + (m // X_BLOCK)[None, :]
            x_SK *= tl.load(at, mask=inside_SK, other=0.0)
            at = scale_ptr + (own * BLOCKS)[:, None] + (m // 128)[None, :]
            x_SK *= tl.load(at, mask=inside_SK, other=0.0)
        ahead = _slots_weights(
            w_ptr, expert_S, is_used_S, d, start + BLOCK_K, D, M, STRIDE_C, STRIDE_K, BLOCK_K
        )
        acc_CK += tl.sum(weights.to(tl.float32) * x_SK[None, :, :], axis=1)
        weights = ahead
    total_C = tl.sum(acc_CK, axis=1)
    if HAS_BIAS:
        at = bias_ptr + (expert_S.to(tl.int64) * D)[:, None] + d[None, :]
        bias_SC = tl.load(at, mask=is_used_S[:, None] & (d < D)[None, :], other=0.0)
        total_C += tl.sum(bias_SC.to(tl.float32) * gate_S[:, None], axis=0)
    tl.store(out_ptr + token * D + d, total_C.to(out_ptr.dtype.element_ty), mask=d < D)
