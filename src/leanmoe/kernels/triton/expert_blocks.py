"""The work list: which rows each awake expert computes, in blocks, all on the device.

Letters: T tokens, K slots a token, E experts, N = T*K slots, B blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leanmoe.kernels.triton.state import power_of_two, zeros_for

MOST_IN_ONE = 2048
"""So many slots are grouped by one program, in one launch."""
CHUNK = 512
"""Slots a program groups where there are more."""


class WorkList(NamedTuple):
    """Slots grouped by expert and cut into blocks; skipped slots and sleeping experts are in none.

    Its sizes depend on T, K, E and `block_rows` alone, so that a captured graph can be replayed.
    """

    rows: Tensor
    """int32: slot numbers t*K + k; those of one expert lie together, in any order."""
    blocks_3B: Tensor
    """int32: each block's expert, its first place in `rows`, its number of rows. Blocks of one
    expert follow each other; all but its last are full."""
    used_1: Tensor
    """int32: how many blocks there are; what lies in `blocks_3B` beyond them is undefined."""
    block_rows: int
    """Rows in a full block."""


def most_blocks(slots: int, experts: int, block_rows: int) -> int:
    """The most blocks that this many slots can make, however they are spread."""
    return min(slots, slots // block_rows + min(experts, slots))


def expert_blocks_reference(ids_TK: Tensor, experts: int, block_rows: int) -> WorkList:
    """The work list in plain torch, rows of an expert in order; waits for the device."""
    flat_N = ids_TK.reshape(-1)
    order_N = flat_N.sort(stable=True)[1]
    counts: list[int] = torch.bincount(flat_N, minlength=experts + 1)[:experts].tolist()
    entries: list[tuple[int, int, int]] = []
    start = 0
    for expert, count in enumerate(counts):
        for first in range(0, count, block_rows):
            entries.append((expert, start + first, min(block_rows, count - first)))
        start += count
    blocks_3B = torch.zeros(3, most_blocks(flat_N.numel(), experts, block_rows), dtype=torch.int32)
    if entries:
        blocks_3B[:, : len(entries)] = torch.tensor(entries, dtype=torch.int32).T
    device = ids_TK.device
    used_1 = torch.tensor([len(entries)], dtype=torch.int32, device=device)
    return WorkList(order_N.to(torch.int32), blocks_3B.to(device), used_1, block_rows)


def build_expert_blocks(ids_TK: Tensor, experts: int, block_rows: int) -> WorkList:
    """The work list of ids from anywhere, (T,K); E for a skipped slot. Waits for nothing."""
    rows, blocks_3B, used_1 = _expert_blocks_op(ids_TK.contiguous(), experts, block_rows)
    return WorkList(rows, blocks_3B, used_1, block_rows)


@torch.library.custom_op("leanmoe::work_list", mutates_args=())
def _expert_blocks_op(
    ids_TK: Tensor, experts: int, block_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    from leanmoe.kernels.triton.expert_blocks_program import group_slots, scatter_slots

    slots, (rows, blocks_3B, used_1) = ids_TK.numel(), _empty(ids_TK, experts, block_rows)
    if not slots:
        return rows, blocks_3B, used_1.zero_()
    is_one = slots <= MOST_IN_ONE
    chunk = max(32, power_of_two(slots)) if is_one else CHUNK
    programs = 1 if is_one else -(-slots // chunk)
    counts = zeros_for("work list", experts + 1, ids_TK.device)
    places, starts = torch.empty_like(rows), rows.new_empty(experts)
    group_slots[(programs,)](
        ids_TK, counts, places, starts, rows, blocks_3B, used_1, slots, blocks_3B.shape[1],
        E=experts, PADDED_E=power_of_two(experts), ROWS=block_rows, CHUNK=chunk, IS_ONE=is_one,
        num_warps=8 if chunk > CHUNK else 4,
    )  # fmt: skip
    if not is_one:
        scatter_slots[(programs,)](ids_TK, places, starts, rows, slots, E=experts, CHUNK=chunk)
    return rows, blocks_3B, used_1


@_expert_blocks_op.register_fake
def _expert_blocks_fake(
    ids_TK: Tensor, experts: int, block_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(ids_TK, experts, block_rows)


def _empty(ids_TK: Tensor, experts: int, block_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = ids_TK.numel()
    blocks = most_blocks(slots, experts, block_rows)
    return (
        ids_TK.new_empty(slots, dtype=torch.int32),
        ids_TK.new_empty(3, blocks, dtype=torch.int32),
        ids_TK.new_empty(1, dtype=torch.int32),
    )
